# SPDX-License-Identifier: Apache-2.0
"""Processes that share an evaluation find each other under any launcher, by the variables it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def launched(launcher: str, rank: int, job: str) -> dict[str, str]:
    """The environment of one of two processes on this host."""
    if launcher == "Open MPI":
        return {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "PMIX_NAMESPACE": f"prterun-host-{job}@1",
        }
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }


def run_two(launcher: str, arguments: Sequence[str], timeout: float = 100) -> list[tuple[int, bytes, bytes]]:
    """Exit code, stdout and stderr of both processes."""
    job = f"{os.getpid()}{abs(hash((launcher, *arguments))) % 10**6}"
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **launched(launcher, rank, job)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


SCRIPT = """
from neox_eval.ranks import Ranks
ranks = Ranks()
print(ranks.local_rank, ranks.gather({"who": (ranks.rank, "x" * 3 * ranks.rank), 2: [None, 0.5]}))
ranks.barrier()
ranks.close()
"""


@pytest.mark.parametrize("launcher", ["Open MPI", "Slurm"])
def test_messages_between_two_processes(launcher: str) -> None:
    for rank, (code, out, errors) in enumerate(run_two(launcher, ["-c", SCRIPT])):
        assert code == 0, errors
        everything = [{"who": (0, ""), 2: [None, 0.5]}, {"who": (1, "xxx"), 2: [None, 0.5]}]
        assert out.decode() == f"{rank} {everything}\n"


LOST = """
import contextlib
from neox_eval.ranks import Ranks
with contextlib.closing(Ranks()) as ranks:
    if ranks.rank == 1:
        raise SystemExit(3)
    try:
        ranks.gather(1)
    except Exception as error:
        raise SystemExit(error.exit_code)
"""


def test_a_process_that_ended_is_noticed() -> None:
    (first, _, errors), (second, _, _) = run_two("Open MPI", ["-c", LOST])
    assert (first, second) == (69, 3), errors


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["Open MPI", "Slurm"])
def test_two_processes_measure_what_one_measures(
    launcher: str, hf_models: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    """Each takes every second document; the result is printed once."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "ab cd " * n}) + "\n" for n in (3, 1, 4, 15, 9)))
    arguments = ["perplexity", str(hf_models["pythia"]), str(texts), "-q"]
    alone = run_command(["neox-eval", *arguments])
    assert alone.returncode == 0, alone.stderr
    (code, out, errors), (other_code, other_out, other_errors) = run_two(launcher, ["-m", "neox_eval", *arguments])
    assert (code, other_code, other_out) == (0, 0, b""), errors + other_errors
    single, shared = json.loads(alone.stdout), json.loads(out)
    assert shared == {key: pytest.approx(x) if isinstance(x, float) else x for key, x in single.items()}
    assert shared["documents"] == 5


def test_variables_that_contradict_each_other_are_refused(run_command: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    env = {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    run = run_command(["neox-eval", "x", "-t", tmp_path / "t.jsonl"], env=env)
    assert run.returncode == 2
    assert b"rank 3 of 2" in run.stderr
