# SPDX-License-Identifier: Apache-2.0
"""What a user should know about a configuration that is no error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from libneox.config.tree import all_keys
from libneox.model_config import GATED

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig


def warnings_of(config: NeoxConfig) -> list[str]:
    """Lines about keys that change nothing, and about keys that mean something else than they seem to."""
    return [*_ignored(config), *_ffn_width(config), *_launch(config), *_odd(config)]


def _ignored(config: NeoxConfig) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, key in all_keys().items():
        if key.standing == "ignored" and key.group != "launch" and config.is_set(name):
            by_reason.setdefault(key.reason, []).append(name)
    return [f"{', '.join(names)}: changes nothing: {reason}" for reason, names in by_reason.items()]


def _ffn_width(config: NeoxConfig) -> list[str]:
    model = config.model
    if model.hidden_size is None or model.ffn_hidden_size is not None or model.activation not in GATED:
        return []
    from libneox.config.architecture import legacy_widths

    base = model.intermediate_size or int((model.expansion_factor or 4) * model.hidden_size)
    _, width = legacy_widths(base, model.mlp_multiple_of, gated=True)
    what = (
        "intermediate_size" if model.intermediate_size else "expansion_factor" if model.expansion_factor else "default"
    )
    return [
        f"{what}: {base} gives a {model.activation} MLP of true width {width}, as in GPT-NeoX; "
        f"ffn_hidden_size: {width} says it directly"
    ]


def _launch(config: NeoxConfig) -> list[str]:
    names = [
        name
        for name, key in all_keys().items()
        if key.group == "launch" and key.standing == "ignored" and config.is_set(name)
    ]
    if not names:
        return []
    return [f"{', '.join(names)}: start the ranks yourself: {equivalent_command(config)}"]


def equivalent_command(config: NeoxConfig) -> str:
    """The command line that does what the launch keys of GPT-NeoX ask for."""
    launch = config.launch
    module = "neox_train CONFIG..."
    nodes = f"{launch.num_nodes}" if launch.num_nodes > 0 else None
    if launch.launcher == "slurm" or launch.deepspeed_slurm:
        flags = {"--nodes": nodes, "--ntasks-per-node": launch.num_gpus, "--account": launch.account}
        flags |= {"--comment": launch.comment, "--nodelist": launch.include, "--exclude": launch.exclude}
        return " ".join(["srun", *_flags(flags), "python -m", module])
    if launch.launcher in ("openmpi", "mpich", "mvapich", "impi") or launch.deepspeed_mpi:
        count = launch.num_gpus * max(1, launch.num_nodes) if launch.num_gpus else "N"
        flags = {"--hostfile": launch.hostfile, "-np": count}
        words = [*_flags(flags), "python -m", module]
        if launch.launcher in ("mpich", "impi"):
            return " ".join([*_meeting(config), "mpirun", *words])
        return " ".join(["mpirun", *(f"-x {setting}" for setting in _meeting(config)), *words])
    if launch.launcher in ("jsrun", "flux"):
        command = "jsrun" if launch.launcher == "jsrun" else "flux run"
        return " ".join([*_meeting(config), command, "-n N python -m", module])
    if launch.hostfile or launch.include or launch.exclude or (launch.num_nodes or 0) > 1:
        flags = {"--hostfile": launch.hostfile, "--include": launch.include, "--exclude": launch.exclude}
        flags |= {"--num_nodes": nodes, "--num_gpus": launch.num_gpus, "--master_addr": launch.master_addr}
        flags |= {"--master_port": launch.master_port if config.is_set("master_port") else None}
        return " ".join(["deepspeed", *_flags(flags), "--module", module])
    flags = {"--nproc-per-node": launch.num_gpus or "N", "--master-addr": launch.master_addr}
    flags |= {"--master-port": launch.master_port if config.is_set("master_port") else None}
    return " ".join(["torchrun", *_flags(flags), "-m", module])


def _meeting(config: NeoxConfig) -> list[str]:
    """Settings of the environment by which ranks on several hosts meet, for launchers that do not see to it."""
    launch = config.launch
    if not (launch.hostfile or launch.num_nodes > 1 or launch.master_addr):
        return []
    return [f"MASTER_ADDR={launch.master_addr or 'HOST'}", f"MASTER_PORT={launch.master_port}"]


def _flags(values: Mapping[str, object]) -> list[str]:
    return [f"{flag} {value}" for flag, value in values.items() if value is not None]


def _odd(config: NeoxConfig) -> list[str]:
    found = []
    if config.model.gpt_j_tied and not config.model.gpt_j_residual:
        found.append("gpt_j_tied: changes nothing without gpt_j_residual")
    if config.model.bias_gelu_fusion and config.model.activation != "gelu":
        found.append(f"bias_gelu_fusion: changes nothing with activation {config.model.activation}")
    if config.parallel.sequence_parallel and config.tensor_parallel == 1:
        found.append("sequence_parallel: there is nothing to split with model_parallel_size 1")
    return found
