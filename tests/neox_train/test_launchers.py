# SPDX-License-Identifier: Apache-2.0
"""One command line under the launchers that are installed: the same losses as without any."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from libneox import run_directory
from tests.neox_train.conftest import TINY, Started

MODULE = (sys.executable, "-m", "neox_train")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--master_port=29517", "--num_accelerators=2")
LAUNCHERS = {
    "torchrun": (*MODULE[:2], "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "neox_train"),
    "deepspeed": (*DEEPSPEED, "--module", "neox_train"),
    "deepspeed-no-local-rank": (*DEEPSPEED, "--no_local_rank", "--module", "neox_train"),
    "mpirun": ("mpirun", "-n", "2", *MODULE),
    "srun": ("srun", "-n", "2", "--overcommit", *MODULE),
}
RunUnder = Callable[[str], tuple[Path, list[str]]]
BeginUnder = Callable[[str, int], tuple[Path, Started]]


def works(launcher: str) -> bool:
    """Whether this machine has it (for Slurm: a cluster that answers)."""
    if launcher == "srun":
        return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode
    return launcher != "mpirun" or shutil.which("mpirun") is not None


@pytest.fixture(scope="module")
def begin_under(corpus: Path, command_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> BeginUnder:
    """Start a run of two ranks under a launcher, in a session of its own: the run directory and the process."""
    env = command_env | {
        "PATH": os.environ["PATH"],
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }

    def begin(launcher: str, train_iters: int) -> tuple[Path, Started]:
        folder = tmp_path_factory.mktemp(launcher)
        path = folder / "config.yml"
        keys = {"data_path": str(corpus), "save": str(folder / "RUN"), "train_iters": train_iters}
        path.write_text(json.dumps(TINY | keys))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [*LAUNCHERS[launcher], str(path)]
        return folder / "RUN", Started(command, cwd=folder, env=env, start_new_session=True, **pipes)

    return begin


@pytest.fixture(scope="module")
def run_under(begin_under: BeginUnder) -> RunUnder:
    """Three steps under a launcher: the run directory and the lines of stdout."""

    def run(launcher: str) -> tuple[Path, list[str]]:
        folder, process = begin_under(launcher, 3)
        with process:
            out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        return folder, out.splitlines()

    return run


@pytest.fixture(scope="module")
def expected(run_under: RunUnder) -> Path:
    """The run under torchrun."""
    return run_under("torchrun")[0]


# whom to signal of those that a launcher starts, and how, as the README says
SIGNALS = {
    "deepspeed": ("deepspeed.launcher.launch", signal.SIGTERM),
    "mpirun": ("mpirun", signal.SIGUSR1),
    "srun": ("srun", signal.SIGUSR1),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", SIGNALS)
def test_a_signal_to_the_launcher_saves_and_stops(  # F-03
    launcher: str, begin_under: BeginUnder, losses: Callable[[Path], list[float]]
) -> None:
    """Every rank the same step, in the time that launchers give them."""
    if not works(launcher):
        pytest.skip(f"no {launcher} here")
    run, process = begin_under(launcher, 100_000)
    with process:
        deadline = time.monotonic() + 150
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        program, number = SIGNALS[launcher]
        asked = time.monotonic()
        os.kill(in_session(process.pid, program), number)
        process.communicate(timeout=100)
    assert time.monotonic() - asked < 30
    (step,) = run_directory.list_steps(run)
    assert run_directory.verify_step(run / f"step_{step}").world["size"] == 2
    status = run_directory.read_status(run) or {}
    assert (status["state"], status["code"], status["step"]) == ("stopped", 75, step)
    assert len(losses(run)) == step


def in_session(session: int, program: str) -> int:
    """The first process of a session whose command line has this word in it."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
        with contextlib.suppress(OSError):
            theirs = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if theirs == session and program in words:
                return int(entry.name)
    raise LookupError(program)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", list(LAUNCHERS)[1:])
def test_the_same_run(launcher: str, run_under: RunUnder, expected: Path, losses) -> None:
    if not works(launcher):
        pytest.skip(f"no {launcher} here")
    run, lines = run_under(launcher)
    assert str(run / "step_3") in lines
    assert losses(run) == losses(expected)
    manifest = json.loads((run / "step_3" / "manifest.json").read_text())
    assert manifest["world"]["size"] == 2  # and not two runs of one
