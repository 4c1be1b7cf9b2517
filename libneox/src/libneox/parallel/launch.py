# SPDX-License-Identifier: Apache-2.0
"""Which process of how many this is, learnt from the environment the launcher left. No torch.

Looked at in this order, first match wins:

    RANK, WORLD_SIZE              torchrun, `deepspeed`, or set by hand
    OMPI_COMM_WORLD_*             mpirun of Open MPI
    MV2_COMM_WORLD_*              MVAPICH
    MPI_LOCALRANKID, PMI_RANK     MPICH, Intel MPI
    JSM_NAMESPACE_*               jsrun
    FLUX_TASK_RANK, FLUX_JOB_SIZE flux
    SLURM_STEP_ID, SLURM_PROCID   srun (a plain python inside an sbatch script has no step id: a single process)
    PMI_RANK, PMI_SIZE            whatever else speaks PMI

and nothing of these is a single process. A launcher that says "several" without a way for them to meet is an error
here, at once; it never becomes several single runs. mpirun inside a Slurm job starts its helpers with srun, and srun
and flux speak PMI too: hence the order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import socket
from collections.abc import Mapping

from libneox.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One process of a run. `master_port` 0 means: any free port (single process only); `job` names it, if anything."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    job: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    """Variables of one launcher: rank, world size, local rank, local world size, what names the job, and hosts.

    `mark` is the variable that gives the launcher away; default: rank or world size. `attempt` counts restarts of the
    same job, which must not read each other's messages.
    """

    launcher: str
    rank: str
    world: str
    local: tuple[str, ...]
    local_world: tuple[str, ...]
    job: tuple[str, ...] = ()
    hosts: str = ""
    mark: str = ""
    attempt: str = ""


_PMI = _Family("PMI", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS",))
_FAMILIES = (
    _Family(
        "environment",
        "RANK",
        "WORLD_SIZE",
        ("LOCAL_RANK",),
        ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        ("TORCHELASTIC_RUN_ID",),
        attempt="TORCHELASTIC_RESTART_COUNT",
    ),
    _Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Family(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    dataclasses.replace(_PMI, mark="MPI_LOCALRANKID"),
    _Family(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
        ("LSB_JOBID",),
    ),
    _Family(
        "flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), (), ("FLUX_JOB_ID",), "FLUX_JOB_NNODES"
    ),
)
# Beginnings of variables by which a child would take itself for a rank of its parent's run.
_LEFT_BY_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "CROSS_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMIX_", "PMI_",
    "MPI_LOCAL", "MV2_", "JSM_", "FLUX_", "SLURM_",
)  # fmt: skip


def discover(env: Mapping[str, str]) -> Launch:
    """Read the environment.

    Raises:
        UsageError: variables are missing, contradict each other, or leave no address to meet at.
    """
    for family in _FAMILIES:
        if family.mark in env if family.mark else family.rank in env or family.world in env:
            return _from_family(family, env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _from_slurm(env)
    if _PMI.rank in env or _PMI.world in env:
        return _from_family(_PMI, env)
    return Launch(0, 1, 0, 1, "127.0.0.1", 0, "none")


def unled(env: Mapping[str, str]) -> str:
    """What to say of a process that belongs to no launcher although a job wants several; empty if all is well."""
    tasks = env.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal() or int(tasks) < 2:
        return ""
    return f"this Slurm job has {tasks} tasks, but srun did not start this process: it is alone; put srun before it"


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that is no rank of this run."""
    return {name: value for name, value in env.items() if not name.startswith(_LEFT_BY_LAUNCHERS)}


def _from_family(family: _Family, env: Mapping[str, str]) -> Launch:
    rank, world = _number(env, family.rank), _number(env, family.world)
    local = _first(env, family.local)
    local_world = _first(env, family.local_world)
    one_host = local_world == world or (bool(family.hosts) and env.get(family.hosts) == "1")
    if local_world is None or local is None:
        local, local_world = rank if local is None else local, world  # the most there can be
    job = _job(family.job, env)
    if family.attempt in env:
        job = f"{job}.{env[family.attempt]}"
    return _checked(rank, world, local, local_world, env, family.launcher, job, one_host=one_host)


def _from_slurm(env: Mapping[str, str]) -> Launch:
    rank = _number(env, "SLURM_PROCID")
    world = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    local_world = world if nodes == 1 else _tasks_here(env, world, nodes)
    filled = dict(env)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST")
    if "MASTER_ADDR" not in env and hosts and nodes > 1:
        filled["MASTER_ADDR"] = first_host(hosts)
    job = f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}"
    local = _number(env, "SLURM_LOCALID")
    return _checked(rank, world, local, local_world, filled, "srun", job, one_host=nodes == 1)


def _tasks_here(env: Mapping[str, str], world: int, nodes: int) -> int:
    """This node's share of SLURM_STEP_TASKS_PER_NODE, which reads like `2(x3),1`."""
    counts: list[int] = []
    for part in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else -(-world // nodes)


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `gpu[07-12,15],login1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodelist)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodelist!r} cannot be read; set MASTER_ADDR")
    first = re.split(r"[,-]", match[2])[0] if match[2] else ""
    return match[1] + first + match[3]


def _checked(
    rank: int,
    world: int,
    local: int,
    local_world: int,
    env: Mapping[str, str],
    launcher: str,
    job: str,
    *,
    one_host: bool,
) -> Launch:
    if world < 1 or not 0 <= rank < world or not 0 <= local < local_world:
        raise UsageError(
            f"{launcher}: rank {rank} of {world}, local rank {local} of {local_world} cannot be; check the launcher"
        )
    address = env.get("MASTER_ADDR", "")
    if not address and (world == 1 or (one_host and launcher != "environment")):
        address = "127.0.0.1"  # all on this host
    if not address:
        raise UsageError(
            f"{launcher}: {world} processes and no MASTER_ADDR; set MASTER_ADDR (and MASTER_PORT) for all of them"
        )
    port = _port(env, world, job, launcher)
    if world > 1:
        _check_resolves(address)
    return Launch(rank, world, local, local_world, address, port, launcher, job)


def _port(env: Mapping[str, str], world: int, job: str, launcher: str) -> int:
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
        if not 0 < port < 65536:
            raise UsageError(f"MASTER_PORT={port} is no port")
        return port
    if world == 1:
        return 0
    if not job:
        raise UsageError(f"{launcher}: {world} processes and no MASTER_PORT; set it for all of them")
    digest = hashlib.sha256(job.encode()).digest()  # the same on every rank, another for each job
    return 20000 + int.from_bytes(digest[:4], "big") % 20000


def _check_resolves(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR={address}: {error.strerror or error}; name a host all ranks can reach"
        ) from error


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise UsageError(
            f"{name} is not set although other variables of its launcher are; set it or unset them"
        ) from None
    except ValueError:
        raise UsageError(f"{name}={env[name]!r} is no number") from None


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_number(env, name) for name in names if name in env), None)


def _job(names: tuple[str, ...], env: Mapping[str, str]) -> str:
    return next((env[name] for name in names if env.get(name)), "")
