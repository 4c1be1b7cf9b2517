# SPDX-License-Identifier: Apache-2.0
"""H-06: a model of 2 GB is converted in the memory of two of its tensors."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "convert.py"


def load_bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_convert", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_h06_two_gigabytes(scratch: Path) -> None:
    bench: Any = load_bench()
    sources, largest = bench.make_sources(scratch, 2.0)
    for verb, source in sources.items():
        found = bench.convert_once(verb, source, scratch / verb)
        assert found["private_bytes"] <= 2 * largest + 150_000_000, (verb, found)
        shutil.rmtree(scratch / verb)
