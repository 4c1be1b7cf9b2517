# SPDX-License-Identifier: Apache-2.0
"""The measure that other tests trust: it sees the command's memory, and nothing of the tests' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.peak_memory import measured

MEGABYTE = 1 << 20


def ends_with(script: str, report: Path) -> int:
    command = measured([sys.executable, "-S", "-c", script], report)
    return subprocess.run(command, timeout=60, check=False).returncode


def peak_of(script: str, report: Path) -> int:
    assert ends_with(script, report) == 0
    return int(report.read_text())


def test_the_parents_memory_does_not_count(tmp_path: Path) -> None:
    ballast = b"x" * (300 * MEGABYTE)
    assert peak_of("pass", tmp_path / "report") < 50 * MEGABYTE
    assert len(ballast) == 300 * MEGABYTE


def test_the_commands_memory_counts(tmp_path: Path) -> None:
    peak = peak_of("b'x' * (100 << 20)", tmp_path / "report")
    assert 100 * MEGABYTE <= peak < 150 * MEGABYTE


def test_the_largest_of_its_processes_counts(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'b\"x\" * (100 << 20)'])"
    assert peak_of(script, tmp_path / "report") >= 100 * MEGABYTE


def test_exit_codes_are_passed_on(tmp_path: Path) -> None:
    assert ends_with("raise SystemExit(65)", tmp_path / "report") == 65
    assert ends_with("import os; os.kill(os.getpid(), 9)", tmp_path / "report") == 137
