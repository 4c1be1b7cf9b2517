# SPDX-License-Identifier: Apache-2.0
"""Sizes that are out of the ordinary: very long lines, very many files (A-13 and A-21)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.peak_memory import measured

MEGABYTE = 1 << 20


def feed(process: subprocess.Popen[bytes], megabytes: int) -> None:
    """Write one JSON line with a text of that size, or as much of it as is wanted."""
    assert process.stdin is not None
    try:
        process.stdin.write(b'{"text": "')
        for _ in range(megabytes):
            process.stdin.write(b"word of text and " * (MEGABYTE // 17))
        process.stdin.write(b'"}\n')
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has seen enough


def tokenize_line(megabytes: int, report: Path, *options: str) -> tuple[int, str]:
    """Exit code and stderr of `neox-tokenize` over one line; its peak memory (bytes) is in `report`."""
    command = measured([sys.executable, "-m", "neox_tokenize", *options], report)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    feeder = threading.Thread(target=feed, args=(process, megabytes))
    feeder.start()
    assert process.stderr is not None
    message = process.stderr.read().decode()
    feeder.join()
    return process.wait(), message


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["bytes", "gigatoken"])
def test_a_line_of_100_megabytes(tmp_path: Path, request: pytest.FixtureRequest, engine: str) -> None:
    tokenizer = "bytes"
    if engine == "gigatoken":
        tokenizer = str(request.getfixturevalue("tokenizers_folder") / "20B_tokenizer.json")
    code, message = tokenize_line(100, tmp_path / "peak", "--tokenizer", tokenizer)
    assert code == 0, message
    assert f"engine {engine}" in message
    peak = int((tmp_path / "peak").read_text())
    print(f"A-13: {peak / MEGABYTE:.0f} MB for a line of 100 MB, engine {engine}")
    assert peak <= 6 * 100 * MEGABYTE


@pytest.mark.slow
def test_a_line_over_a_gibibyte_is_refused_by_its_number(tmp_path: Path) -> None:
    code, message = tokenize_line(1100, tmp_path / "peak", "--tokenizer", "bytes", "--max-doc-bytes", "1G")
    assert code == 65
    assert "stdin:1:" in message
    assert "--max-doc-bytes" in message


@pytest.mark.slow
def test_twelve_thousand_files(tmp_path: Path) -> None:
    for number in range(12_000):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(b'{"text": "%05d"}\n' % number)
    line = f"ulimit -n 256; {sys.executable} -m neox_tokenize count --tokenizer bytes *.jsonl"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "12,000" in done.stdout.replace("12000", "12,000")
    assert "60,000" in done.stdout.replace("60000", "60,000")
