# SPDX-License-Identifier: Apache-2.0
"""How a run ends, in one process: signals at awkward moments, errors of every kind, and what is said of each."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox import run_directory
from libneox.errors import DataError, InputMissing, NeoxError, OutOfMemory, StorageError
from neox_train import loop, session
from neox_train.engine import DeepSpeedEngine


def test_a_second_sigint_leaves_within_a_moment_and_says_so(tmp_path: Path) -> None:
    """The handler alone, while something takes long."""
    code = (
        "import sys, time; from neox_train.signals import StopRequest; from pathlib import Path\n"
        "with StopRequest(echoes=False).listening() as stop:\n"
        "    stop.last_words = lambda: Path(sys.argv[1]).write_text('said')\n"
        "    print('ready', flush=True); time.sleep(60); print(stop.name, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "last")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)  # however often: it is saved
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - asked < 10
    assert errors.count(b"saving after the step under way") == 1
    assert (tmp_path / "last").read_text() == "said"


@pytest.mark.parametrize("moment", ["start", "evaluation", "evaluation at the end"])
def test_sigterm_at_awkward_moments(train, config, losses, monkeypatch, moment: str, tmp_path: Path) -> None:
    sent: list[int] = []

    def signalled(function: Callable[..., Any], number: int) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if len(sent) < number:
                sent.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **more)

        return call

    keys = {"eval_interval": 4, "eval_iters": 1}
    path, run = config(**keys), tmp_path / "RUN"
    with monkeypatch.context() as patch:
        if moment == "start":
            patch.setattr(session, "find_start", signalled(session.find_start, 1))
            train(path, "-q", code=75)
            assert run_directory.list_steps(run) == [1]
        elif moment == "evaluation":
            patch.setattr(loop, "evaluation", signalled(loop.evaluation, 2))  # twice, and it was not in vain
            train(path, "-q", code=75)
            assert run_directory.list_steps(run) == [5]
        else:
            patch.setattr(loop, "finish", signalled(loop.finish, 1))
            train(path, "-q")  # there is nothing left to stop
    train(path, "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), **keys), "-q")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_long_evaluation_is_left_out(train, config, losses, monkeypatch, at_the_end: bool, tmp_path: Path) -> None:
    """A launcher does not wait for a hundred batches."""
    evaluated: list[int] = []
    evaluate = DeepSpeedEngine.evaluate

    def signalled(self: DeepSpeedEngine, batches: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluated.append(1)
        return evaluate(self, batches)

    path, run = config(eval_interval=1000 if at_the_end else 4, eval_iters=5), tmp_path / "RUN"
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "evaluate", signalled)
        train(path, "-q", code=75)
    assert len(evaluated) == 1
    assert run_directory.list_steps(run) == [8 if at_the_end else 4]
    train(path, "-q")
    assert len(losses(run)) == 8
    assert (run_directory.read_status(run) or {})["evaluation"]["valid_loss"] > 0


@pytest.mark.parametrize(
    ("raised", "seen", "code"),
    [
        (DataError("text.bin: broken"), DataError, 65),
        (MemoryError(), OutOfMemory, 71),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), OutOfMemory, 71),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory, 71),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemory, 71),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl"), StorageError, 74),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), InputMissing, 66),
        (ZeroDivisionError("a bug"), ZeroDivisionError, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_is_in_the_status(
    config, train, monkeypatch, raised: Exception, seen: type[Exception], code: int, tmp_path: Path
) -> None:
    """In the fifth step; what was saved before stays, and the same command goes on from there."""
    step, path, run = loop.one_step, config(checkpoint_factor=2), tmp_path / "RUN"

    def fail(work: loop.Run) -> str:
        if work.state.step == 4:
            raise raised
        return step(work)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", fail)
        if issubclass(seen, NeoxError):
            done = train(path, "-q", code=code)
            if code == 71:
                assert "lower train_micro_batch_size_per_gpu (it is 4)" in done.stderr
        else:
            with pytest.raises(seen):
                train(path, "-q")
    status = run_directory.read_status(run) or {}
    assert (status["state"], status["code"], status["step"]) == ("failed", code, 4)
    assert (str(raised).partition("\n")[0].rpartition("] ")[2].partition(":")[0]) in status["reason"]
    train(path, "-q")
    status = run_directory.read_status(run) or {}
    assert (status["state"], status["code"], status["step"]) == ("finished", 0, 8)


def test_errors_before_the_first_step_are_in_the_status(train, config, tmp_path: Path) -> None:
    train(config(load=str(tmp_path / "nothing")), "-q", code=66)
    assert (run_directory.read_status(tmp_path / "RUN") or {})["code"] == 66
    train(config(engine="plain", zero_optimization={"stage": 2}), "-q", code=2)
    assert (run_directory.read_status(tmp_path / "RUN") or {})["code"] == 2


@pytest.mark.parametrize(("where", "stage"), [("weight", 0), ("loss", 0), ("gradient", 0), ("gradient", 1)])
def test_what_is_not_finite_is_named(train, config, monkeypatch, where: str, stage: int, tmp_path: Path) -> None:
    """Step, rank, samples and the first bad weight; no such step is ever saved."""
    step, run = loop.one_step, tmp_path / "RUN"

    def poison(work: loop.Run) -> str:
        if work.state.step == 4:
            name = "layers.1.mlp.up.weight"
            if where == "weight":
                work.engine.restore_master(name, work.engine.master(name) * float("inf"))
            elif where == "loss":
                backward = work.engine.backward
                monkeypatch.setattr(work.engine, "backward", lambda batches: backward(batches) * float("nan"))
            else:
                weight = dict(work.engine.objective.model.named_parameters())[name]
                weight.register_hook(lambda gradient: gradient * float("inf"))
        return step(work)

    monkeypatch.setattr(loop, "one_step", poison)
    done = train(config(checkpoint_factor=1, zero_optimization={"stage": stage}), "-q", code=80)
    assert "step 5: " in done.stderr
    assert "samples 16 to 19" in done.stderr
    assert "nothing of this step is saved" in done.stderr
    if where == "gradient":
        assert "(loss " in done.stderr
        assert "samples 16 to 19; the first is that of layers.1.mlp.up.weight)" in done.stderr
    else:
        named = "layers.1.mlp.up.weight of rank 0 is not finite" if where == "weight" else "all weights are finite"
        assert f"(rank 0, samples 16 to 19; {named})" in done.stderr
    assert run_directory.list_steps(run) == [1, 2, 3, 4]
    status = run_directory.read_status(run) or {}
    assert (status["state"], status["code"], status["step"]) == ("failed", 80, 4)


def test_a_step_without_manifest_is_passed_over_with_a_note(train, config, losses, tmp_path: Path) -> None:
    path, run = config(checkpoint_factor=4), tmp_path / "RUN"
    train(path, "-q")
    whole = losses(run)
    (run / "step_8/manifest.json").unlink()
    done = train(path, "-q")
    assert "step_8: no manifest.json; the checkpoint was never finished; falling back to an older step" in done.stderr
    assert losses(run) == whole
    assert run_directory.verify_step(run / "step_8").step == 8


def test_no_secret_of_the_environment_is_written(train, config, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "COMET_API_KEY"):
        monkeypatch.setenv(name, "canary-secret")
    train(config(checkpoint_factor=4))
    files = [path for path in (tmp_path / "RUN").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"canary-secret" in path.read_bytes()]
