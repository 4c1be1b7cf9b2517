# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generation at toy size: the command of tests/bench/README.md runs, and gives every figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "generate.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command(dtype: str) -> None:
    command = [sys.executable, str(BENCH), "--shape", "toy", "--dtype", dtype, "--tokens", "16", "--rounds", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(case["dtype"], case["batch"]) for case in cases] == [(dtype, 1), (dtype, 16)]
    for case in cases:
        assert case["same_greedy_texts"] or dtype == "bfloat16"
        # times are differences of two runs: of a toy, on a busy machine, they may be anything
        assert {"ours_ms", "transformers_ms", "ratio", "ratios", "tokens_per_second", "bandwidth_share"} <= case.keys()
        assert case["memory_gb_s"] > 0
