# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a configuration, and the values it begins with."""

from __future__ import annotations

from typing import Any

import torch

from libneox.checkpoint.store import open_tensors, read_trainer
from libneox.config import NeoxConfig
from libneox.config.engine import is_plain
from libneox.config.partition import partition
from libneox.errors import UsageError
from libneox.model.init import initial_value
from libneox.model_config import ModelConfig
from libneox.parallel.mesh import Mesh
from libneox.parallel.shard import Shard
from libneox.parallel.tensor import sharded_model, sharded_part
from neox_train import speed
from neox_train.objective import build_objective
from neox_train.optimizers import build_optimizer, kind_of, state_names
from neox_train.resume import Start
from neox_train.saving import restore_optimizer, restore_weights
from neox_train.steps import Engine

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


def build_engine(config: NeoxConfig, model_config: ModelConfig, device: torch.device, mesh: Mesh) -> Engine:
    """The model under the engine that fits the optimiser and the mesh; its values are not set yet."""
    dtype, plan = DTYPES[config.compute_precision], config.batch_plan(mesh.world_size)
    shard = Shard.of(mesh, sequence=config.parallel.sequence_parallel)
    plain = mesh.pipe_size == 1 and runs_plain(config, mesh.world_size)
    speed.check_graphs(config, device, plain=plain)

    def optimizer(named: Any) -> torch.optim.Optimizer:
        return build_optimizer(config, named, mup_width_mult=model_config.mup_width_mult)

    if mesh.pipe_size > 1:
        from neox_train.pipeline import PipelineEngine

        return PipelineEngine(
            pipeline_parts(config, model_config, plan.grad_accum),
            lambda pieces: build_objective(config, sharded_part(model_config, pieces, shard, device), shard),
            optimizer,
            settings=config.deepspeed_dict(plan),
            states=state_names(config),
            device=device,
            mesh=mesh,
        )
    model = sharded_model(model_config, shard)
    if speed.compiles(config, device):
        speed.compile_blocks(model)
    objective = build_objective(config, model, shard)
    if plain:
        from neox_train.plain import PlainEngine

        return PlainEngine(
            objective,
            optimizer,
            dtype=dtype,
            device=device,
            grad_accum=plan.grad_accum,
            clipping=config.optim.gradient_clipping,
            mesh=mesh,
            recorded=config.speed.cuda_graphs,
            queues=speed.runs_ahead(config, device),
        )
    from neox_train.engine import DeepSpeedEngine

    settings = config.deepspeed_dict(plan)
    return DeepSpeedEngine(
        objective, optimizer, settings=settings, states=state_names(config), device=device, mesh=mesh
    )


def pipeline_parts(config: NeoxConfig, model_config: ModelConfig, micro_batches: int) -> list[range]:
    """What each part of a pipeline holds: one part a stage, with DualPipeV two.

    Raises:
        UsageError: a step is too short for the schedule, or the layers do not fill the parts.
    """
    needed = 2 * config.pipeline_stages
    if config.folds_pipeline and micro_batches < needed:
        raise UsageError(
            f"pipe_schedule: dualpipev over {config.pipeline_stages} stages needs {needed} micro-batches a step, there "
            f"are {micro_batches}; lower train_micro_batch_size_per_gpu, or set pipe_schedule: 1f1b"
        )
    return partition(model_config, config.pipeline_parts, config.parallel.pipe_partition_method)


def runs_plain(config: NeoxConfig, world_size: int) -> bool:
    """Whether the plain engine runs this: `is_plain`, where nothing speaks against it.

    Raises:
        UsageError: the configuration asks for two things that exclude each other.
    """
    shaped, asked = kind_of(config).shaped, config.get("engine")
    kind = "use_bnb_optimizer" if config.optim.use_bnb_optimizer else config.optimizer_type
    if (shaped or asked == "plain") and config.zero_stage > 1:
        why = f"{kind} needs whole matrices" if shaped else "engine: plain partitions nothing"
        raise UsageError(f"zero_optimization.stage: {why}; set stage: 0")
    if shaped and asked == "deepspeed":
        raise UsageError(f"engine: {kind} needs whole matrices, which ZeRO flattens; set engine: auto")
    if shaped and config.tensor_parallel > 1:
        raise UsageError(
            f"model_parallel_size: {kind} needs whole matrices, which {config.tensor_parallel} ranks would cut; "
            "set it to 1, or take adam, sgd or lion"
        )
    return is_plain(config, world_size)


def restore(config: NeoxConfig, engine: Engine, start: Start) -> None:
    """Give the engine its values: initial ones, or the checkpoint's."""
    source, model_config = start.source, engine.objective.model.config
    if source is None:
        for name in engine.local():
            engine.restore_master(name, initial_value(model_config, name, config.train.seed))
        return
    if source.kind == "hf":
        from libneox.checkpoint.hf import open_hf

        restore_weights(engine, open_hf(source.path), {}, source.path)
        return
    with open_tensors(source.path) as model, open_tensors(source.path, "optimizer") as optimizer:
        fresh = (config.train.no_load_optim and not start.again) or (config.train.finetune and not start.own)
        # finetune takes the rounded weights too: the masters are the same model, only finer
        restore_weights(engine, model, optimizer, source.path)
        stored = (read_trainer(source.path) or {}).get("optimizer")
        if stored and not fresh:
            names = set() if kind_of(config).shaped else set(state_names(config))
            restore_optimizer(engine, optimizer, stored, names)
