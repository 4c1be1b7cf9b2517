# SPDX-License-Identifier: Apache-2.0
"""The part of a configuration that DeepSpeed reads, in DeepSpeed's own form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libneox.config.batch import BatchPlan
    from libneox.config.tree import NeoxConfig

PASSED_ON = (
    "prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comms_logger", "data_types", "communication_data_type",
)  # fmt: skip
MEANINGLESS_FP16 = ("enabled", "type", "fp16", "precision")
WHOLE = ("sm3", "muon", "adafactor")  # need whole matrices, which ZeRO would cut


def is_plain(config: NeoxConfig, world_size: int) -> bool:
    """Whether the plain engine runs this: asked for, needed by the optimiser, or one rank that partitions nothing.

    DeepSpeed's flattening costs 15 % of a step of a 70M model at one rank on a CPU, and there is nothing to partition.
    """
    if config.pipeline_stages > 1:
        return False
    if config.optimizer_type in WHOLE or config.optim.use_bnb_optimizer:
        return True
    if config.get("engine") != "auto":
        return bool(config.get("engine") == "plain")
    alone = world_size == 1 and config.zero_stage <= 1 and config.compute_precision != "fp16"
    return alone and not wants_deepspeed(config)


def only_deepspeed(config: NeoxConfig) -> list[str]:
    """What is set and means something to DeepSpeed alone."""
    names = [name for name in (*PASSED_ON, "deepspeed_extra_args") if config.is_set(name)]
    for section, understood in (("zero_optimization", ("stage",)), ("bf16", MEANINGLESS_FP16)):
        options = config.get(section) or {}
        names += [f"{section}.{name}" for name in options if name not in understood]
    return names


def wants_deepspeed(config: NeoxConfig) -> bool:
    """Whether something is set that changes a run of a single rank, and that DeepSpeed alone does."""
    zero = config.parallel.zero_optimization or {}
    offload = any(zero.get(name) for name in ("offload_optimizer", "offload_param", "cpu_offload"))
    return offload or any(config.is_set(name) for name in (*PASSED_ON, "deepspeed_extra_args", "fp32_allreduce"))


def deepspeed_dict(config: NeoxConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's JSON config. The optimiser and the schedule are objects of ours and not in it.

    Stage 0 becomes stage 1: the same numbers, without the defects of DeepSpeed's own stage 0.
    """
    result: dict[str, Any] = dict(config.deepspeed.deepspeed_extra_args or {})
    result |= {name: config.get(name) for name in PASSED_ON if config.is_set(name)}
    result |= {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": config.optim.gradient_clipping,
    }
    zero = dict(config.parallel.zero_optimization or {})
    result["zero_optimization"] = zero | {"stage": max(1, config.zero_stage)}
    if config.compute_precision == "fp16":
        options = {k: v for k, v in (config.precision.fp16 or {}).items() if k not in MEANINGLESS_FP16}
        result["fp16"] = options | {"enabled": True}
    if config.compute_precision == "bfloat16":
        result["bf16"] = (config.precision.bf16 or {}) | {"enabled": True}
    if config.pipeline_stages > 1 and (config.parallel.sequence_parallel or config.folds_pipeline):
        # between stages it would send each tensor-parallel rank's part of a tensor that all have; with sequence
        # parallelism each has its own, and DualPipeV cannot
        result["pipeline"] = (result.get("pipeline") or {}) | {"pipe_partitioned": False, "grad_partitioned": False}
    if config.parallel.fp32_allreduce:
        result["communication_data_type"] = "fp32"
    return result
