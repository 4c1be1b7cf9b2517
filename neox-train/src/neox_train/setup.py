# SPDX-License-Identifier: Apache-2.0
"""From a configuration and a starting point to a run that is ready for its first step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from libneox import run_directory
from libneox.checkpoint.store import read_trainer
from libneox.config import BatchPlan, NeoxConfig
from libneox.config.engine import only_deepspeed
from libneox.curriculum import curriculum_of
from libneox.data.splits import SampleSet
from libneox.errors import UsageError
from libneox.model_config import ModelConfig
from libneox.parallel.group import Group
from libneox.parallel.mesh import Mesh
from libneox.run_directory import CheckpointRef
from libneox.tokenizer import Tokenizer
from neox_train import loop, recompute, speed
from neox_train.ahead import Ahead
from neox_train.batches import Batches, batches_of
from neox_train.engines import DTYPES, build_engine, restore, runs_plain
from neox_train.forward_check import check_forward
from neox_train.inputs import check_same_data, find_tokenizer, open_data, resolve_model
from neox_train.observers import build_observers
from neox_train.report import Report, measured_tflops
from neox_train.resume import Start, run_path, stored_config
from neox_train.saving import Description, Saver
from neox_train.signals import StopRequest
from neox_train.state import TrainState
from neox_train.steps import Engine
from neox_train.tasks import Tasks


def prepare(
    config: NeoxConfig,
    group: Group,
    device: torch.device,
    start: Start,
    *,
    stdout: int | None,
    quiet: bool,
    stop: StopRequest,
    saved: Callable[[int], None],
    mark: Callable[[int], None],
) -> loop.Run:
    """Data, model, engine and state, ready for the first step.

    Args:
        stdout: file descriptor that checkpoint paths go to.
        saved: told the step of each committed checkpoint.
        mark: told the step under way, each time this rank got somewhere.
    """
    plan = config.batch_plan(group.world_size)
    seq_length = config.seq_length
    assert seq_length is not None, "check_supported asks for it"
    state = first_state(config, start, plan.global_batch, seq_length)
    splits, train_iters = open_data(config, state, plan.global_batch)
    state.epochs = splits.epochs
    check_same_data(state, splits, start)
    tokenizer = find_tokenizer(config, splits, start.source)
    if config.train.char_level_ppl and tokenizer is None:
        raise UsageError("char_level_ppl: needs a tokenizer, and there is none beside the data; name it: vocab_file")
    model_config = resolve_model(config, tokenizer, start.source)
    config, change = with_schedule(with_model(config, model_config), start, train_iters)
    mesh = mesh_of(config, plan, group)
    config, kernel = with_kernel(config, model_config, plan, device, start, group)
    engine, chosen = _engine(config, model_config, plan, device, mesh, group)
    restore(config, engine, start)
    run = run_path(config)
    begin_metrics(run, group, state, own=start.own)
    report = _report(config, run, group, model_config, device, train_iters, stdout=stdout, quiet=quiet)
    if change:
        report.warn(change)
    for note in (*splits.notes, *kernel, *chosen, *_notes(config, state, plan, device)):
        report.note(note)
    if config.train.checkpoint_validation_with_forward_pass and start.source is not None:
        _check_forward(config, engine, start.source, report)
    if start.own and group.is_first:  # now that nothing can refuse to go on from there
        for path in run_directory.set_aside(run, state.step):
            report.warn(f"{path}: set aside, as the run goes on from step {state.step}; delete it if you like")

    batches = functools.partial(
        _batches,
        config,
        plan,
        data_rank=mesh.data_rank,
        data_group=mesh.groups.get("data"),
        device=device,
        vocab_size=model_config.vocab_size,
        eod_id=tokenizer.eod_id if tokenizer is not None else None,
    )
    train = batches(splits.train)
    assert train is not None
    observers = build_observers(
        config, group, mesh, run=run, first_step=state.step + 1, device=device, warn=report.warn
    )
    return loop.Run(
        config,
        group,
        engine,
        state,
        config.lr_schedule(train_iters),
        train_iters,
        seq_length,
        _prefetched(config, train),
        batches(splits.valid),
        batches(splits.test),
        Saver(run, group, engine, describe(config, mesh, tokenizer)),
        report,
        stop,
        saved,
        mark,
        observers,
        curriculum_of(config),
        tokenizer,
        runs_ahead=engine.queues and not any(observer.within for observer in observers),
        tasks=tasks_of(config, run, group, device, stop, mark, report) if config.train.eval_tasks else None,
    )


def _engine(
    config: NeoxConfig, model: ModelConfig, plan: BatchPlan, device: torch.device, mesh: Mesh, group: Group
) -> tuple[Engine, list[str]]:
    """The engine, its values not set yet, and what was chosen for it."""
    dtype, compiled = DTYPES[config.compute_precision], speed.compiles(config, device)
    speed.prefer_kernel(config.speed.attention_kernel, device)
    policy = recompute.choose(config, model, dtype, device, world=mesh.world_size, compiled=compiled)
    policy = max(group.gather(policy), key=recompute.POLICIES.index)  # ranks may have found other things in memory
    chosen = []
    if policy != recompute.policy_of(config):
        chosen.append(f"checkpoint_policy: {policy}, so that it fits the memory of the device")
    return build_engine(config.replace(checkpoint_policy=policy), model, device, mesh), chosen


def _batches(config: NeoxConfig, plan: BatchPlan, samples: SampleSet | None, **more: Any) -> Batches | None:
    return None if samples is None or len(samples) == 0 else batches_of(config, samples, plan, **more)


def _prefetched(config: NeoxConfig, train: Batches) -> Batches | Ahead:
    by_token = config.optim.loss_weighting == "tokens"  # ranks agree on a divisor: collectives stay in one thread
    return Ahead(train) if config.speed.prefetch and not by_token else train


def _report(
    config: NeoxConfig,
    run: Path,
    group: Group,
    model: ModelConfig,
    device: torch.device,
    train_iters: int,
    *,
    stdout: int | None,
    quiet: bool,
) -> Report:
    return Report(
        run,
        active=group.is_first,
        stdout=stdout,
        quiet=quiet,
        log_interval=config.log.log_interval,
        train_iters=train_iters,
        flops_per_token=functools.cache(lambda length: model.flops_per_token(length).palm),
        devices=group.world_size,
        peak_tflops=config.log.peak_theoretical_tflops or measured_tflops(DTYPES[config.compute_precision], device),
    )


def _notes(config: NeoxConfig, state: TrainState, plan: BatchPlan, device: torch.device) -> Iterator[str]:
    """What the user might wonder about."""
    if speed.compiles(config, device):
        yield "compile: the first step takes the time of a compilation"
    if state.samples != state.step * plan.global_batch:
        yield f"going on at sample {state.samples} of the order, {plan.global_batch} samples a step from here"
    world = plan.data_parallel * config.tensor_parallel * config.pipeline_stages
    if device.type == "cpu" and world > 1:
        yield f"{torch.get_num_threads()} threads in each rank"
    if not runs_plain(config, world):
        if config.zero_stage == 0:
            yield "ZeRO stage 0 runs as stage 1: the same numbers"
        return
    unused = only_deepspeed(config)
    if world == 1:  # how ZeRO moves partitions is no loss where there are none
        unused = [name for name in unused if not name.startswith("zero_optimization.") or "offload" in name]
    if unused:
        yield f"{', '.join(unused)}: the plain engine runs this and does nothing about it"


def _check_forward(config: NeoxConfig, engine: Engine, source: CheckpointRef, report: Report) -> None:
    stored = (read_trainer(source.path) or {}).get("forward_check") if source.kind != "hf" else None
    if stored is None:
        report.warn(f"{source.path}: holds no forward pass to compare with")
    else:
        check_forward(engine, stored, DTYPES[config.compute_precision], source.path)


def tasks_of(
    config: NeoxConfig,
    run: Path,
    group: Group,
    device: torch.device,
    stop: StopRequest,
    mark: Callable[[int], None],
    report: Report,
) -> Tasks:
    """What evaluates checkpoints on the way, on the device of rank 0."""
    return Tasks(config, run, group, str(device), asked=lambda: bool(stop), mark=mark, warn=report.warn)


def mesh_of(config: NeoxConfig, plan: BatchPlan, group: Group) -> Mesh:
    """The ranks of the run as `model_parallel_size` and `pipe_parallel_size` cut them."""
    mesh = Mesh(group.rank, config.pipeline_stages, plan.data_parallel, config.tensor_parallel)
    return mesh.connected() if mesh.world_size > mesh.data_size else mesh


def begin_metrics(run: Path, group: Group, state: TrainState, *, own: bool) -> None:
    """Bring metrics.jsonl to the step the run begins at: what came after it never happened."""
    if not group.is_first:
        return
    if own:
        run_directory.cut_metrics(run, state.step)
    else:
        (run / run_directory.METRICS).unlink(missing_ok=True)


def describe(config: NeoxConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> Description:
    """What every checkpoint of the run says about itself."""
    world = {"size": mesh.world_size, "data_parallel": mesh.data_size}
    if mesh.world_size > mesh.data_size:
        world |= {"tensor_parallel": mesh.tensor_size, "pipe_parallel": mesh.pipe_size}
    return Description(
        config_yaml=config.to_yaml(),
        config_sha256=config.hash,
        tokenizer=tokenizer.data if tokenizer is not None else None,
        tokenizer_kind=tokenizer.kind if tokenizer is not None else "",
        optimizer=config.optimizer_type,
        world=world,
        dtype=DTYPES[config.compute_precision],
        with_optimizer=not config.train.no_save_optim,
        forward_length=config.seq_length if config.train.checkpoint_validation_with_forward_pass else None,
    )


def first_state(config: NeoxConfig, start: Start, global_batch: int, seq_length: int) -> TrainState:
    """Counters to begin with: those of the checkpoint, or zeros for new weights and for `finetune`."""
    if start.source is None or (config.train.finetune and not start.own) or start.source.kind == "hf":
        return TrainState()
    stored = read_trainer(start.source.path)
    if stored is None:  # an imported model without a training state
        return TrainState()
    state = TrainState.from_json(stored, global_batch=global_batch, seq_length=seq_length)
    if config.train.no_load_rng and not start.again:
        state.rng_base = state.step
    return state


def with_model(config: NeoxConfig, model: ModelConfig) -> NeoxConfig:
    """The configuration with what the data and the checkpoint have settled of the model."""
    return config.replace(
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        qk_norm_groups=model.qk_norm_groups if model.qk_norm == "joint" else None,
    )


def with_kernel(
    config: NeoxConfig, model: ModelConfig, plan: BatchPlan, device: torch.device, start: Start, group: Group
) -> tuple[NeoxConfig, list[str]]:
    """The configuration with the kernel of attention that rank 0's trial chose, and what is to be said of it.

    A run that is continued keeps the choice it began with: another kernel would round differently.
    """
    if config.speed.attention_kernel != "auto" or device.type != "cuda":
        return config, []
    begun = stored_config(start.source.path) if start.own and start.source is not None else config
    kernel, dtype = begun.speed.attention_kernel, DTYPES[config.compute_precision]
    if kernel == "auto":
        kernel = group.on_first(lambda: speed.kernel_of(config, model, plan.micro_batch, dtype, device))
    return config.replace(attention_kernel=kernel), [f"attention_kernel: {kernel}"]


def with_schedule(config: NeoxConfig, start: Start, train_iters: int) -> tuple[NeoxConfig, str]:
    """The configuration with the learning rate that holds, and what is to be said of a change.

    With `use_checkpoint_lr_scheduler` it is the checkpoint's; the run's own checkpoints hold it too, so that they are
    continued at the same rate.
    """
    if start.source is None or start.source.kind == "hf" or config.train.finetune:
        return config, ""
    ours, stored = config.lr_schedule(train_iters), stored_config(start.source.path)
    theirs = stored.lr_schedule(stored.train.train_iters or train_iters)
    if theirs == ours:
        return config, ""
    if config.train.use_checkpoint_lr_scheduler:
        keys = dataclasses.asdict(stored.schedule) | {"lr_decay_iters": theirs.horizon, "lr_decay_fraction": None}
        return config.replace(**keys, **{"optimizer.params.lr": theirs.lr}), ""
    told = not config.train.override_lr_scheduler
    return config, f"the learning rate changes from {theirs.describe()} to {ours.describe()}" if told else ""
