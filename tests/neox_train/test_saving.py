# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a run: written at once or aside, what a failure to write does, and which of them stay."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libneox import run_directory
from libneox.checkpoint import store
from libneox.errors import DataError
from neox_train import loop, saving
from neox_train.batches import Batches

Append = Callable[[Any, str, Any], None]


@pytest.fixture
def on_append(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Do something each time before a tensor of a checkpoint is written; it is told the file."""
    write: Append = store.TensorWriter.append

    def install(act: Callable[[Path], None]) -> None:
        def append(self: Any, name: str, tensor: Any) -> None:
            act(self._path)
            write(self, name, tensor)

        monkeypatch.setattr(store.TensorWriter, "append", append)

    return install


def wait_for_step(run: Path, step: int) -> None:
    """Return when metrics.jsonl has this step's line."""
    deadline = time.monotonic() + 30
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < step:
        if time.monotonic() > deadline:
            raise OSError(errno.ETIME, f"training did not go on to step {step}")
        time.sleep(0.01)


def contents(run: Path) -> dict[str, bytes]:
    """All files of all checkpoints of a run, but those that tell paths."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in run.glob("step_*/*")
        if path.name not in ("config.yml", "manifest.json")
    }


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_training_goes_on_and_the_files_are_the_same(
    train, config, on_append, losses, precision: str, tmp_path: Path
) -> None:
    """Each save is held up until training is a step further and has changed every weight."""
    run = tmp_path / "RUN"
    train(config("now.yml", save=str(tmp_path / "now"), checkpoint_factor=3, precision=precision), "-q")
    seen: list[int] = []

    def hold(path: Path) -> None:
        step = run_directory.step_number(path.parent.name.partition(".")[0])
        if step < 8:  # the last one is not written aside
            wait_for_step(run, step + 1)
        assert len(list(run.glob("*.tmp-*"))) == 1  # one at a time
        assert step not in run_directory.list_steps(run)  # in nobody's sight
        seen.append(step)

    on_append(hold)
    done = train(config(checkpoint_factor=3, async_save=True, precision=precision), "-q")
    assert sorted(set(seen)) == [3, 6, 8]
    assert done.lines == [str(run / f"step_{step}") for step in (3, 6, 8)]
    assert [run_directory.verify_step(run / f"step_{step}").samples for step in (3, 6, 8)] == [12, 24, 32]
    assert contents(run) == contents(tmp_path / "now")
    assert losses(run) == losses(tmp_path / "now")


def test_the_next_save_waits_for_the_one_before(train, config, on_append, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    train(config("now.yml", save=str(tmp_path / "now"), checkpoint_factor=1), "-q")
    on_append(lambda path: time.sleep(0.005))  # some 30 tensors: longer than a step takes
    done = train(config(checkpoint_factor=1, async_save=True), "-q")
    assert done.lines == [str(run / f"step_{step}") for step in range(1, 9)]
    files = contents(run)
    assert files == contents(tmp_path / "now")
    weights = [files[f"step_{step}/model-00001-of-00001.safetensors"] for step in range(1, 9)]
    assert len(set(weights)) == 8  # none of them is a stale copy


@pytest.mark.parametrize("aside", [False, True])
def test_signals_while_a_checkpoint_is_written(train, config, on_append, losses, aside: bool, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    left = [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM]

    def interrupt(path: Path) -> None:
        if path.parent.name.startswith("step_3") and left:
            os.kill(os.getpid(), left.pop())

    on_append(interrupt)
    path = config(checkpoint_factor=3, async_save=aside)
    done = train(path, "-q", code=75)
    steps = run_directory.list_steps(run)
    assert steps[0] == 3
    assert len(steps) == 2
    assert all(run_directory.verify_step(run / f"step_{step}") for step in steps)
    assert f"after step {steps[1]}, state saved" in done.stderr
    status = run_directory.read_status(run) or {}
    assert (status["state"], status["code"], status["step"]) == ("stopped", 75, steps[1])
    train(path, "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), checkpoint_factor=3), "-q")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("aside", "number"), [(False, errno.ESTALE), (True, errno.ENOSPC)])
def test_a_save_that_fails_stops_the_run(train, config, on_append, aside: bool, number: int, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        if path.parent.name.startswith("step_6") and path.name.startswith("optimizer-"):
            raise OSError(number, os.strerror(number))

    on_append(fail)
    done = train(config(checkpoint_factor=3, async_save=aside), "-q", code=74)
    assert f"step_6: not saved, rank 0: {os.strerror(number)}" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [3]
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))
    assert (run_directory.read_status(tmp_path / "RUN") or {})["code"] == 74


@pytest.mark.parametrize("aside", [False, True])
def test_a_file_that_cannot_grow(train, config, losses, monkeypatch, aside: bool, tmp_path: Path) -> None:
    """The system itself refuses to write on, in the midst of a tensor."""
    before, step = resource.getrlimit(resource.RLIMIT_FSIZE), loop.one_step

    def limit(work: loop.Run) -> str:
        if work.state.step == 5:
            loop.settle(work)  # step 3
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        return step(work)

    path = config(checkpoint_factor=3, async_save=aside)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", limit)
        try:
            done = train(path, "-q", code=74)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step_6: not saved, rank 0: File too large" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [3]
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))
    train(path, "-q")
    assert len(losses(tmp_path / "RUN")) == 8


@pytest.mark.parametrize("aside", [False, True])
def test_a_save_that_fails_may_be_gone_without(train, config, on_append, losses, aside: bool, tmp_path: Path) -> None:
    failing = {"step_4"}

    def fail(path: Path) -> None:
        if path.parent.name.partition(".")[0] in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_append(fail)
    keys = {"checkpoint_factor": 2, "async_save": aside, "on_save_error": "continue"}
    done = train(config(**keys), "-q")
    assert done.stderr.count("step_4: not saved, rank 0: No space left on device") == 1
    assert "going on without it" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [2, 6, 8]
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))
    failing.add("step_10")
    train(config(train_iters=10, **keys), "-q", code=74)  # what the run ends with must be saved
    assert run_directory.list_steps(tmp_path / "RUN") == [2, 6, 8]
    failing.clear()
    train(config(train_iters=10, **keys), "-q")
    assert len(losses(tmp_path / "RUN")) == 10


@pytest.mark.parametrize(("policy", "number"), [("stop", errno.EROFS), ("continue", errno.EACCES)])
def test_a_directory_that_cannot_be_made(train, config, monkeypatch, number: int, policy: str, tmp_path: Path) -> None:
    begin = run_directory.begin_step

    def refuse(target: Path, **more: Any) -> Path:
        if target.name == "step_4":
            raise OSError(number, os.strerror(number), str(target))
        return begin(target, **more)

    monkeypatch.setattr(run_directory, "begin_step", refuse)
    path = config(checkpoint_factor=2, on_save_error=policy)
    done = train(path, "-q", code=74 if policy == "stop" else 0)
    assert f"step_4: not saved, {os.strerror(number)}" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == ([2] if policy == "stop" else [2, 6, 8])


def test_a_directory_removed_while_it_is_written_to(train, config, on_append, tmp_path: Path) -> None:
    def remove(path: Path) -> None:
        if path.parent.name.startswith("step_4") and path.name.startswith("model-"):
            shutil.rmtree(path.parent)

    on_append(remove)
    done = train(config(checkpoint_factor=2), "-q", code=74)
    assert "No such file" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [2]


def test_a_bug_in_the_midst_of_a_save_waits_for_nobody(train, config, on_append, monkeypatch, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        if path.parent.name.startswith("step_4"):
            raise ZeroDivisionError

    waited: list[bool] = []
    monkeypatch.setattr(saving, "wait", lambda futures, seconds: waited.extend(future.done() for future in futures))
    on_append(fail)
    with pytest.raises(ZeroDivisionError):
        train(config(checkpoint_factor=2), "-q")
    assert waited == [True]
    assert run_directory.list_steps(tmp_path / "RUN") == [2]
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))


@pytest.mark.parametrize("error", ["data", "not-finite"])
def test_a_failure_while_a_checkpoint_is_written_aside(
    train, config, on_append, monkeypatch, error: str, tmp_path: Path
) -> None:
    """A loss that is not finite is seen by all ranks, so the checkpoint before is kept; else it is given up, whole."""
    run = tmp_path / "RUN"
    on_append(lambda path: wait_for_step(run, 4) if path.parent.name.startswith("step_4") else None)
    make, one_step = Batches.make, loop.one_step

    def bad(self: Batches, numbers: range, *rest: Any) -> Any:
        if numbers.start == 16:
            raise DataError("a bad sample")
        return make(self, numbers, *rest)

    def broken(work: loop.Run) -> str:
        if work.state.step == 4:
            work.engine.restore_master("embed.weight", work.engine.master("embed.weight") * float("nan"))
        return one_step(work)

    if error == "data":
        monkeypatch.setattr(Batches, "make", bad)
    else:
        monkeypatch.setattr(loop, "one_step", broken)
    train(config(checkpoint_factor=2, async_save=True), "-q", code=65 if error == "data" else 80)
    assert run_directory.list_steps(run) in ([[2, 4], [2]] if error == "data" else [[2, 4]])
    assert all(run_directory.verify_step(run / f"step_{step}") for step in run_directory.list_steps(run))
    assert not list(run.glob("*.tmp-*"))


def test_a_kill_between_a_save_and_the_deletion_of_older_ones(train, config, monkeypatch, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    path, run = config(checkpoint_factor=2, keep_last_n_checkpoints=1), tmp_path / "RUN"
    for name in ("prune", "shutil.rmtree"):  # before it, and with an old step renamed but still there
        with monkeypatch.context() as patch:
            patch.setattr(f"libneox.run_directory.{name}", killed)
            with pytest.raises(Killed):
                train(path, "-q")
        assert run_directory.newest_verified(run) is not None
    train(path, "-q")
    assert run_directory.list_steps(run) == [8]
    assert not list(run.glob("*.tmp-*"))


def test_nothing_is_deleted_while_the_newest_is_damaged(train, config, monkeypatch, tmp_path: Path) -> None:
    """A disk that loses what was written: the newest step fails to verify, so the older ones stay."""
    commit = run_directory.commit_step

    def lossy(temporary: Path, target: Path, manifest: Any) -> Path:
        commit(temporary, target, manifest)
        if target.name == "step_4":
            (target / "trainer.json").write_bytes(b"")
        return target

    monkeypatch.setattr(run_directory, "commit_step", lossy)
    done = train(config(checkpoint_factor=2, keep_last_n_checkpoints=1), "-q", code=81)
    assert "step_4/trainer.json" in done.stderr
    reference = run_directory.newest_verified(tmp_path / "RUN", warn=lambda text: None)
    assert reference is not None
    assert reference.step == 2


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"checkpoint_factor": 3}, [3, 6, 9]),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log"}, [1, 2, 4, 8]),
        ({"checkpoint_factor": 1.5, "checkpoint_scale": "log"}, [1, 2, 3, 5, 7]),
        ({"checkpoint_factor": 4, "extra_save_iters": [0, 5]}, [0, 4, 5, 8]),
        ({"extra_save_iters": [7]}, [7]),
        ({}, []),
    ],
)
def test_which_steps_are_due(config, keys: dict[str, Any], steps: list[int]) -> None:
    from libneox.config import load_config

    loaded = load_config([config(**keys)]).train
    assert [step for step in range(11) if loop.is_due(loaded, step)] == steps
