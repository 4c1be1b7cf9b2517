# SPDX-License-Identifier: Apache-2.0
"""Runs that are stopped, killed and run again; ranks that die, hang or fail."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libneox import run_directory
from tests.neox_train.conftest import command

LONG = {"train_iters": 100_000, "checkpoint_factor": 100_000}


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.05)
    raise TimeoutError("it did not happen")


def steps_done(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def status(run: Path) -> dict[str, Any]:
    """run_status.json."""
    return run_directory.read_status(run) or {}


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's ranks, by rank."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            env = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid:
            found |= {int(value[5:]): int(entry.name) for value in env if value.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not only waiting to be collected."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW), pytest.param(signal.SIGUSR1, marks=SLOW)],
)
def test_a_signal_saves_and_stops(start, config, train, losses, number: int, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    path = config(**LONG)
    with start(path, "-q") as process:
        wait_for(lambda: steps_done(run) > 3)
        asked = time.monotonic()
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - asked < 25
    (step,) = run_directory.list_steps(run)
    assert out.splitlines() == [str(run / f"step_{step}")]
    assert status(run) | {"pid": 0, "host": ""} == {
        "state": "stopped",
        "step": step,
        "rank": 0,
        "host": "",
        "pid": 0,
        "code": 75,
        "reason": f"stopped by {signal.Signals(number).name} after step {step}, state saved; "
        "run the same command again",
    }
    train(path, "-q", "--set", f"exit_interval={step + 3}", code=75)
    short = config("short.yml", save=str(tmp_path / "whole"), **LONG)
    train(short, "-q", "--set", f"exit_interval={step + 3}", code=75)
    assert losses(run) == losses(tmp_path / "whole")


@SLOW
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_signal_to_the_group_while_blocks_are_compiled(start, config, tmp_path: Path) -> None:
    """Ctrl-C and schedulers signal every process of the group, the compiler among them."""
    run, cache = tmp_path / "RUN", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    changes = {"compile": "on", "hidden_size": 64, "zero_optimization": {"stage": 0}} | LONG
    with start(config(**changes), "-q", start_new_session=True, more_env=cache) as process:
        wait_for(lambda: compiles_now(process.pid))
        for _ in range(5):  # one compilation follows the other
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.3)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert run_directory.list_steps(run) == [1]


def compiles_now(session: int) -> bool:
    """Whether a compiler runs in a session."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = entry.read_text().rpartition(")")
            if "cc1plus" in name and int(rest.split()[3]) == session:
                return True
    return False


@SLOW
def test_a_second_interrupt_ends_at_once(start, config, script, tmp_path: Path) -> None:
    """In the middle of a step that takes a minute."""
    run = tmp_path / "RUN"
    path = script(
        "step = loop.one_step",
        "def slow(work):",
        "    if work.state.step == 3:",
        "        time.sleep(60)",
        "    return step(work)",
        "loop.one_step = slow",
    )
    with start(config(checkpoint_factor=2, **{"train_iters": 8}), "-q", script=path) as process:
        wait_for(lambda: steps_done(run) == 3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert time.monotonic() - asked < 10
    assert (status(run)["code"], status(run)["state"]) == (130, "failed")
    assert run_directory.verify_step(run / "step_2").step == 2


def test_two_trainers_on_one_run(start, train, config, tmp_path: Path) -> None:
    with start(config(**LONG), "-q") as process:
        wait_for(lambda: steps_done(tmp_path / "RUN") > 1)
        done = train(config("other.yml"), code=73)
        assert f"process {process.pid}" in done.stderr
        assert (status(tmp_path / "RUN")["state"], status(tmp_path / "RUN")["pid"]) == ("running", process.pid)
        process.kill()
    train(config("other.yml"), "-q")


def test_nothing_not_finite_is_saved(train, config, tmp_path: Path) -> None:
    optimizer = {"type": "sgd", "params": {"lr": 1e30}}
    path = config(optimizer=optimizer, gradient_clipping=0, checkpoint_factor=1, min_lr=0.0, lr_decay_style="constant")
    done = train(path, "-q", code=80)
    assert "step 2" in done.stderr or "step 3" in done.stderr
    assert "samples" in done.stderr or "gradient" in done.stderr
    assert status(tmp_path / "RUN")["code"] == 80
    assert run_directory.list_steps(tmp_path / "RUN")


@pytest.mark.parametrize("file", ["model-", "optimizer-", "trainer.json", "manifest.json"])
def test_a_full_disk_keeps_the_last_checkpoint(train, config, losses, monkeypatch, file: str, tmp_path: Path) -> None:
    """The disk is full when a file of the second checkpoint is written."""
    from libneox.checkpoint import store

    path = config(checkpoint_factor=4)
    write, add = store.TensorWriter.append, run_directory.add_file

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def append(self: Any, name: str, tensor: Any) -> None:
        full() if "step_8" in str(self._path) and self._path.name.startswith(file) else write(self, name, tensor)

    def add_file(folder: Path, name: str, data: bytes) -> Any:
        return full() if folder.name.startswith("step_8") and name == file else add(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(store.TensorWriter, "append", append)
        patch.setattr(run_directory, "add_file", add_file)
        done = train(path, "-q", code=74)
    assert "No space left" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [4]
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))
    train(path, "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), checkpoint_factor=4), "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")


KILL_POINTS = [
    pytest.param("step_4.tmp-*", marks=SLOW),
    pytest.param("step_4.tmp-*/model-*", marks=SLOW),
    "step_4.tmp-*/optimizer-*",
    pytest.param("step_4.tmp-*/trainer.json", marks=SLOW),
    "step_4.tmp-*/manifest.json",
    pytest.param("step_4", marks=SLOW),
    pytest.param("latest", marks=SLOW),
]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_in_the_middle_of_a_save(start, train, config, losses, command_env, point: str, tmp_path: Path) -> None:
    """A process that kills itself when a file of the commit protocol appears, then the same command again."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, threading, pathlib, time\n"
        f"run = pathlib.Path({str(tmp_path / 'RUN')!r})\n"
        "def watch():\n"
        "    while True:\n"
        f"        if any(run.glob({point!r})):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(0)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
    )
    changes = {"checkpoint_factor": 4, "extra_save_iters": [2] if point != "latest" else []}
    env = {**command_env, "PYTHONPATH": str(hook)}
    with start(config(**changes), "-q", env=env) as process:
        process.wait(60)
    assert process.returncode == -signal.SIGKILL
    train(config(**changes), "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), **changes), "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    for name in ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors", "trainer.json"):
        assert (tmp_path / "RUN/step_8" / name).read_bytes() == (tmp_path / "whole/step_8" / name).read_bytes()
    assert not list((tmp_path / "RUN").glob("*.tmp-*"))


@SLOW
def test_killed_at_random(start, train, config, losses, tmp_path: Path) -> None:
    """Four times, each a few steps and a moment after it began; `tests/bench/kills.py` does it thirty times."""
    chosen, run = random.Random(0), tmp_path / "RUN"
    path = config(checkpoint_factor=3, train_iters=100)
    for _ in range(4):
        with start(path, "-q") as process:
            target = max(run_directory.list_steps(run), default=0) + chosen.randrange(1, 12)
            wait_for(lambda: status(run).get("pid") == process.pid and steps_done(run) >= target)  # noqa: B023
            time.sleep(0.03 * chosen.random())
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run_directory.list_steps(run)[-1] < 100
    train(path, "-q")
    train(config("whole.yml", save=str(tmp_path / "whole"), checkpoint_factor=3, train_iters=100), "-q")
    assert losses(run) == losses(tmp_path / "whole")
    for name in ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors", "trainer.json"):
        assert (run / "step_100" / name).read_bytes() == (tmp_path / "whole/step_100" / name).read_bytes()


@SLOW
def test_killed_with_one_rank_behind_in_a_save(start, train, config, script, losses, tmp_path: Path) -> None:
    """Rank 0 has written its weights of step 4, rank 1 nothing: DeepSpeed's own format would point at it by now."""
    run = tmp_path / "RUN"
    path = script(
        "from libneox.checkpoint.store import TensorWriter",
        "write = TensorWriter.append",
        "def append(self, name, tensor):",
        "    if os.environ['RANK'] == '1' and 'step_4' in str(self._path):",
        "        time.sleep(600)",
        "    write(self, name, tensor)",
        "TensorWriter.append = append",
    )
    changes = {"checkpoint_factor": 2, "train_micro_batch_size_per_gpu": 2}
    with start(config(**changes), "-q", ranks=2, script=path) as process:
        wait_for(lambda: any(p.stat().st_size > 10_000 for p in run.glob("step_4.tmp-*/model-00001*")))
        ranks = children(process)
        for pid in (*ranks, process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)
    (unfinished,) = run.glob("step_4.tmp-*")
    assert list(unfinished.glob("model-00001-of-*"))
    assert (run / "latest").resolve().name == "step_2"
    done = train(config(**changes))
    assert f"{unfinished}: was never finished; removed" in done.stderr
    assert f"continuing {run} after step 2" in done.stderr
    train(config("whole.yml", save=str(tmp_path / "whole"), **changes), "-q")
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize(
    ("whom", "number", "stages"),
    [
        (1, signal.SIGTERM, 1),
        pytest.param(0, signal.SIGUSR1, 1, marks=SLOW),
        pytest.param("launcher", signal.SIGTERM, 1, marks=SLOW),
        pytest.param(1, signal.SIGTERM, 2, marks=SLOW),
        pytest.param(0, signal.SIGUSR1, 2, marks=SLOW),
    ],
)
def test_every_rank_saves_the_same_step(
    start, train_apart, config, losses, whom: int | str, number: int, stages: int, tmp_path: Path
) -> None:
    run = tmp_path / "RUN"
    changes = {"train_micro_batch_size_per_gpu": 2, "pipe_parallel_size": stages}
    with start(config(**changes, **LONG), "-q", ranks=2) as process:
        wait_for(lambda: steps_done(run) > 3)
        asked = time.monotonic()
        os.kill(process.pid if whom == "launcher" else children(process)[int(whom)], number)
        process.communicate(timeout=60)
    assert time.monotonic() - asked < 25
    (step,) = run_directory.list_steps(run)
    assert run_directory.verify_step(run / f"step_{step}").step == step
    assert (status(run)["state"], status(run)["code"], status(run)["step"]) == ("stopped", 75, step)
    if whom == 0:
        whole = config("whole.yml", save=str(tmp_path / "whole"), **changes, **LONG)
        for path in (whole, config(**changes, **LONG)):
            train_apart(path, "-q", "--set", f"exit_interval={step + 4}", ranks=2, code=None)
        assert losses(run) == losses(tmp_path / "whole")
        assert len(losses(run)) == step + 4


@pytest.mark.parametrize(
    ("rank", "how", "stages", "tensor"),
    [
        (1, signal.SIGKILL, 1, 1),
        pytest.param(0, signal.SIGKILL, 1, 1, marks=SLOW),
        pytest.param(1, signal.SIGSTOP, 1, 1, marks=SLOW),
        pytest.param(0, signal.SIGKILL, 2, 1, marks=SLOW),
        pytest.param(1, signal.SIGKILL, 2, 1, marks=SLOW),
        pytest.param(1, signal.SIGSTOP, 2, 1, marks=SLOW),
        pytest.param(2, signal.SIGKILL, 2, 2, marks=SLOW),
        pytest.param(3, signal.SIGSTOP, 2, 2, marks=SLOW),
    ],
)
def test_a_dead_rank_stops_the_others(  # F-05
    start, config, rank: int, how: int, stages: int, tensor: int, tmp_path: Path
) -> None:
    run = tmp_path / "RUN"
    layout = {"pipe_parallel_size": stages, "model_parallel_size": tensor}
    path = config(train_micro_batch_size_per_gpu=2, **layout, **(LONG | {"checkpoint_factor": 2}))
    with start(path, ranks=max(2, stages * tensor)) as process:
        wait_for(lambda: steps_done(run) > 3)
        ranks = children(process)
        os.kill(ranks[rank], how)
        died = time.monotonic()
        wait_for(lambda: not any(map(is_running, ranks[:rank] + ranks[rank + 1 :])), 30)
        assert time.monotonic() - died < 10
        os.kill(ranks[rank], signal.SIGKILL) if how == signal.SIGSTOP else None
        _, errors = process.communicate(timeout=60)
    assert f"rank {rank}" in errors
    assert "step" in status(run)["reason"]
    assert f"rank {rank}" in status(run)["reason"]
    assert status(run)["state"] == "failed"
    assert status(run)["code"] == 69
    assert run_directory.newest_verified(run) is not None


@SLOW
def test_a_rank_that_hangs_is_named_with_its_stack(train_apart, config, script, tmp_path: Path) -> None:
    """Its process lives, its training does not get on."""
    run = tmp_path / "RUN"
    path = script(
        "step = loop.one_step",
        "def hang_here(run):",
        "    if run.state.step == 4 and os.environ['RANK'] == '1':",
        "        time.sleep(600)",
        "    return step(run)",
        "loop.one_step = hang_here",
    )
    changes = {"checkpoint_factor": 2, "train_micro_batch_size_per_gpu": 2}
    done = train_apart(config(**changes), "-q", "--step-timeout", "20", ranks=2, script=path, code=None)
    assert done.returncode != 0
    line = f"rank 1 on {socket.gethostname()} hangs at step 5 for 20 s"
    assert line in done.stderr
    assert "hang_here" in done.stderr  # its stack
    assert (status(run)["code"], line in status(run)["reason"]) == (69, True)
    assert run_directory.list_steps(run) == [2, 4]


def test_bad_data_on_one_rank_stops_all(start, config, corpus, tmp_path: Path) -> None:
    """Rank 1 alone meets an id beyond the vocabulary; its error is the one that is told."""

    import numpy as np

    from libneox.data.mmap import MMapDataset

    for path in corpus.parent.iterdir():
        if path.suffix in (".bin", ".idx"):
            shutil.copy(path, tmp_path / path.name)
    tokens = np.fromfile(tmp_path / "text.bin", np.uint16)
    with MMapDataset(tmp_path / "text") as data:
        assert data.num_tokens == len(tokens)
    tokens[::400] = 300
    tokens.tofile(tmp_path / "text.bin")
    path = config(data_path=str(tmp_path / "text"), vocab_size=258, train_micro_batch_size_per_gpu=2)
    run = tmp_path / "RUN"
    with start(path, ranks=2) as process:
        ranks = wait_for(lambda: len(found := children(process)) == 2 and found)
        wait_for(lambda: status(run).get("state") == "failed")
        failed = time.monotonic()
        wait_for(lambda: not any(map(is_running, ranks)), 30)
        assert time.monotonic() - failed < 10
        _, errors = process.communicate(timeout=60)
    assert errors.count("token id 300") == 1  # the cause is told once
    assert errors.index("token id 300") < min(at for at in (errors.find("rank 1"), len(errors)) if at >= 0)
    assert status(run)["code"] == 65
    assert status(run)["reason"].startswith("sample")


@SLOW
def test_a_launcher_that_starts_the_ranks_again(train, config, script, losses, command_env, tmp_path: Path) -> None:
    """`torchrun --max-restarts`: the next attempt takes nothing that the one before has said for its own."""
    path = script(
        "step = loop.one_step",
        "def die(run):",
        "    if run.state.step == 5 and (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0'):",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "    return step(run)",
        "loop.one_step = die",
    )
    keys = {"checkpoint_factor": 2, "train_micro_batch_size_per_gpu": 2}
    words = command((config(**keys), "-q"), 2, path)
    words.insert(words.index("--standalone"), "--max-restarts=1")
    done = subprocess.run(
        words, env=command_env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "RUN")["state"] == "finished"
    train(config("whole.yml", save=str(tmp_path / "whole"), **keys), "-q")
    assert losses(tmp_path / "RUN") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
