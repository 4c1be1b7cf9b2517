# SPDX-License-Identifier: Apache-2.0
"""Ranks from the environments that launchers leave."""

from __future__ import annotations

import pytest

from libneox.errors import UsageError
from libneox.parallel.launch import Launch, discover, first_host, unled, without_launcher

OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-1234@1",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "localhost,otherhost",
}


def facts(launch: Launch) -> tuple[int, int, int, int]:
    return launch.rank, launch.world_size, launch.local_rank, launch.local_world_size


def test_nothing_is_a_single_process() -> None:
    assert facts(discover({})) == (0, 1, 0, 1)
    in_sbatch = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert facts(discover(in_sbatch)) == (0, 1, 0, 1)  # a plain python in a batch script


@pytest.mark.parametrize(
    ("env", "expected", "launcher"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            (1, 2, 1, 2),
            "environment",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (1, 2, 1, 2), "environment"),
        (OMPI, (3, 4, 3, 4), "Open MPI"),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (1, 2, 1, 2),
            "MVAPICH",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 2, 1, 2), "PMI"),
        (
            {
                "JSM_NAMESPACE_RANK": "1",
                "JSM_NAMESPACE_SIZE": "2",
                "JSM_NAMESPACE_LOCAL_RANK": "1",
                "JSM_NAMESPACE_LOCAL_SIZE": "2",
            },
            (1, 2, 1, 2),
            "jsrun",
        ),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1"}, (1, 2, 1, 2), "flux"),
        (SLURM, (5, 8, 1, 4), "srun"),
    ],
)
def test_launchers(env: dict[str, str], expected: tuple[int, ...], launcher: str) -> None:
    address = {} if launcher == "srun" else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    found = discover(env | address)
    assert facts(found) == expected
    assert found.launcher == launcher


def test_all_ranks_of_a_job_find_the_same_port() -> None:
    ports = {discover(OMPI | {"OMPI_COMM_WORLD_RANK": str(rank)}).master_port for rank in range(4)}
    other = discover(OMPI | {"PMIX_NAMESPACE": "prterun-host-99@1"}).master_port
    assert len(ports) == 1
    assert other not in ports
    assert discover(SLURM).master_addr == "localhost"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "rank 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "no MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "no port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1"}, "can reach"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "no MASTER_ADDR"),
    ],
)
def test_what_cannot_be_is_an_error_at_once(env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        discover(env)


@pytest.mark.parametrize(
    ("env", "expected", "launcher"),
    [
        # mpirun of MPICH starts its helpers with srun: one Slurm task a node, several ranks in it
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (3, 4, 1, 2), "PMI"),
        (OMPI, (3, 4, 3, 4), "Open MPI"),
        # srun --mpi=pmi2 leaves PMI's variables too, which say nothing of hosts
        ({"PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, 4), "srun"),
    ],
)
def test_launchers_inside_slurm(env: dict[str, str], expected: tuple[int, ...], launcher: str) -> None:
    found = discover(SLURM | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"} | env)
    assert (facts(found), found.launcher) == (expected, launcher)


def test_flux_speaks_pmi_and_names_its_hosts() -> None:
    env = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_ID": "ƒ2Xy"}
    env |= {"PMI_RANK": "1", "PMI_SIZE": "2"}
    found = discover(env | {"FLUX_JOB_NNODES": "1"})
    assert (found.launcher, found.master_addr, facts(found)) == ("flux", "127.0.0.1", (1, 2, 1, 2))
    with pytest.raises(UsageError, match="no MASTER_ADDR"):  # on two hosts 127.0.0.1 would be two runs of nobody
        discover(env | {"FLUX_JOB_NNODES": "2"})


def test_a_process_beside_several_slurm_tasks_is_told() -> None:
    in_sbatch = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert "8 tasks" in unled(in_sbatch)
    assert not unled({"SLURM_NTASKS": "1"})
    assert not unled({})


@pytest.mark.parametrize("env", [OMPI, SLURM, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}])
def test_a_child_can_be_no_rank(env: dict[str, str]) -> None:
    left = without_launcher(env | {"PATH": "/bin"})
    assert left == {"PATH": "/bin"}
    assert discover(left).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-12,15],login1", "gpu07"), ("a,b", "a"), ("n1", "n1"), ("rack[1-2]-node", "rack1-node")],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
