# SPDX-License-Identifier: Apache-2.0
"""Reading a configuration is quick and needs neither torch nor numpy."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
start = time.process_time()
from libneox.config import load_config
from libneox.config.estimate import dry_run, render
from libneox.config.reference import help_key
from libneox.errors import UsageError
from libneox.schedule import Schedule
render(dry_run(load_config(["20B"], overrides=["model_parallel_size=2", "pipe_parallel_size=4"])))
help_key("seed")
try:
    load_config([{"num_layer": 1}])
except UsageError:
    pass
heavy = {"torch", "numpy", "transformers", "deepspeed", "tokenizers", "pyarrow", "safetensors"} & set(sys.modules)
print(sorted(heavy), time.process_time() - start)
"""


@pytest.mark.timeout(60)
def test_no_heavy_import_and_quick() -> None:
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=True)
        heavy, _, spent = run.stdout.strip().rpartition(" ")
        assert heavy == "[]"
        seconds.append(float(spent))
    assert min(seconds) < 0.3, f"{min(seconds):.2f} s of processor time"
