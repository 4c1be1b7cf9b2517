# SPDX-License-Identifier: Apache-2.0
"""Traces of steps, and the copy of stderr."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from neox_train.log_copy import StderrCopy, copy_stderr

WINDOW = ("--set", "profile_step_start=2", "--set", "profile_step_stop=4")


def test_a_trace_of_some_steps(train, config, losses, tmp_path: Path) -> None:
    train(config(train_iters=5, profile=True), *WINDOW)
    (path,) = (tmp_path / "RUN" / "profile").iterdir()
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert "aten::mm" in names or "aten::addmm" in names
    train(config(train_iters=5), "--set", f"save={tmp_path / 'PLAIN'}")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "PLAIN")  # looking on changes no number


def test_a_window_that_is_over_is_said(train, config, tmp_path: Path) -> None:
    train(config(train_iters=5))
    done = train(config(train_iters=6, profile=True), *WINDOW)
    assert "profile_step_stop: 4 is not after step 6, which this start begins with" in done.stderr
    assert not (tmp_path / "RUN" / "profile").exists()


def test_memory_history_needs_a_gpu(train, config) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = train(config(memory_profiling=True), code=2)
    assert "memory_profiling: records the allocator of a GPU and there is none" in done.stderr


@pytest.mark.gpu
def test_memory_history(train, config, tmp_path: Path) -> None:
    train(config(train_iters=5, memory_profiling=True, memory_profiling_path=str(tmp_path / "M")), *WINDOW)
    (path,) = (tmp_path / "M").iterdir()
    with gzip.open(path) as file:
        snapshot = json.load(file)
    assert snapshot["segments"]
    assert any(event["action"] == "alloc" for trace in snapshot["device_traces"] for event in trace)


def test_complete_lines_are_copied() -> None:
    stream, file = io.StringIO(), io.StringIO()
    copy = StderrCopy(stream, file)
    for text in ("\r\x1b[Kstep 1", "\r\x1b[Kstep 2\n", "a warn", "ing\nhalf a line"):
        copy.write(text)
    assert file.getvalue() == "step 2\na warning\n"
    assert stream.getvalue() == "\r\x1b[Kstep 1\r\x1b[Kstep 2\na warning\nhalf a line"


def test_a_path_that_is_no_text_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    copy_stderr(str(tmp_path), 0)
    print("runs/\udcff: not there", file=sys.stderr)
    (path,) = tmp_path.iterdir()
    assert path.read_text() == "runs/\\udcff: not there\n"


def test_a_copy_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    stream = io.StringIO()
    with open("/dev/full", "w", buffering=1) as file:
        copy = StderrCopy(stream, file)
        copy.write("one\n")
        copy.write("two\n")
        assert stream.getvalue().count("log_dir has gaps") == 1
        with pytest.raises(OSError, match="No space"):
            file.close()


def test_runs_append_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("first", "second"):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        copy_stderr(str(tmp_path / "logs"), 3)
        print(word, file=sys.stderr)
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name.endswith("_rank3.log")
    assert path.read_text() == "first\nsecond\n"


def test_the_error_that_ends_a_run_is_in_the_copy(train_apart, config, tmp_path: Path) -> None:
    done = train_apart(config(data_path=None, log_dir="logs", hostfile="hosts"), code=2)
    (path,) = (tmp_path / "logs").iterdir()
    assert path.read_text() == done.stderr
    assert "data_path: is unknown" in done.stderr
    assert "warning: hostfile" in done.stderr


def test_deepspeed_prints_what_it_was_asked_for(train_apart, config, tmp_path: Path) -> None:
    """Its profiler, times, state, summary of communication and CSV files; they move a run of one rank to it."""
    pytest.importorskip("deepspeed")
    reports = {
        "wall_clock_breakdown": True,
        "steps_per_print": 2,
        "dump_state": True,
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "comms_logger": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "tiny"},
    }
    done = train_apart(config(train_iters=4, **reports))
    for said in ("bwd_microstep", "DeepSpeed Flops Profiler", "DeepSpeedEngine configuration", "Comm. Op"):
        assert said in done.stderr
    assert (tmp_path / "csv" / "tiny" / "Train_Samples_lr.csv").read_text().count("\n") >= 3
    assert done.lines == [str(tmp_path / "RUN" / "step_4")]
