# SPDX-License-Identifier: Apache-2.0
"""The demo, as `make demo` runs it, and again over its own folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo import corpus

ROOT = Path(__file__).parents[2]


def run_demo(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.demo", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_demo_holds_all_its_checks(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run_demo(out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "FAILS" not in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "").split("<h2>Samples")[0]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = run_demo(tmp_path)
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def test_tasks_are_the_same_every_time(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    texts = [f"def function_{i}(argument):\n    return argument + {i}\n" * 60 for i in range(8)]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    contents = []
    for _ in range(2):
        tasks = corpus.write_tasks(held_out, tmp_path)
        contents.append([path.read_text() for path in [*tasks, tmp_path / "bits.jsonl", tmp_path / "next_line.jsonl"]])
    assert contents[0] == contents[1]
    rows = [json.loads(line) for line in contents[0][3].splitlines()]
    assert len(rows) == 60
    assert all(len(row["choices"]) == 4 and 0 <= row["answer"] < 4 for row in rows)
    assert {corpus.is_held_out(f"name_{i}") for i in range(400)} == {True, False}
