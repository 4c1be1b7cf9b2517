# SPDX-License-Identifier: Apache-2.0
"""One command line under the launchers that are installed: the same losses as without any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.neox_train.conftest import TINY

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


def works(launcher: str) -> bool:
    """Whether this machine has it (for Slurm: a cluster that answers)."""
    if launcher == "srun":
        return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode
    return launcher != "mpirun" or shutil.which("mpirun") is not None


@pytest.fixture(scope="module")
def run_under(corpus: Path, command_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunUnder:
    """Three steps on two ranks under a launcher: the run directory and the lines of stdout."""
    env = command_env | {
        "PATH": os.environ["PATH"],
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }

    def run(launcher: str) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp(launcher)
        path = folder / "config.yml"
        path.write_text(json.dumps(TINY | {"data_path": str(corpus), "save": str(folder / "RUN"), "train_iters": 3}))
        command = [*LAUNCHERS[launcher], str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return folder / "RUN", done.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def expected(run_under: RunUnder) -> Path:
    """The run under torchrun."""
    return run_under("torchrun")[0]


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
