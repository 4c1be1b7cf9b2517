# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a finished run: everything that is set up before the loop and taken down after it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libneox import run_directory
from libneox.checkpoint.store import open_tensors, read_trainer
from libneox.config import NeoxConfig
from libneox.config.engine import PASSED_ON
from libneox.data.manifest import load_tokenizer_of, read_manifest
from libneox.data.splits import Splits, build_splits, samples_wanted
from libneox.errors import InputMissing, NeoxError, PeerLost, UsageError
from libneox.model import Transformer
from libneox.model.init import initial_value
from libneox.model_config import ModelConfig
from libneox.parallel.group import Group
from libneox.parallel.launch import Launch
from libneox.run_directory import CheckpointRef
from libneox.tokenizer import Tokenizer, load_tokenizer
from neox_train import loop
from neox_train.batches import Batches, batches_of
from neox_train.objective import build_objective
from neox_train.optimizers import build_optimizer, kind_of, state_names
from neox_train.report import Report, measured_tflops
from neox_train.resume import Start, check_same_model, find_start, run_path, stored_config
from neox_train.saving import Description, Saver, restore_optimizer, restore_weights
from neox_train.signals import StopRequest
from neox_train.state import TrainState
from neox_train.steps import Engine
from neox_train.watch import Watch, is_communication

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line adds to the configuration."""

    stdout: int | None
    quiet: bool
    step_timeout_s: float


def run(config: NeoxConfig, launch: Launch, options: Options) -> None:
    """Train as configured, on this process of the run."""
    device = pick_device(launch, config)
    with StopRequest(echoes=launch.world_size > 1).listening() as stop:
        group = Group(launch, timeout_s=options.step_timeout_s)
        try:
            agree(group, config)
            group.start_collectives("nccl" if device.type == "cuda" else "gloo")
            _run_with_status(config, group, device, options, stop)
        finally:
            group.close()


def pick_device(launch: Launch, config: NeoxConfig) -> torch.device:
    """This rank's accelerator, else the CPU.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if config.compute_precision == "fp16":
        raise UsageError("precision: fp16 needs a GPU and there is none; use --set precision=fp32 (or bfloat16)")
    return torch.device("cpu")


def agree(group: Group, config: NeoxConfig) -> None:
    """Raise UsageError, naming keys and ranks, unless all ranks have the same configuration."""
    hashes = group.gather(config.hash)
    if len(set(hashes)) == 1:
        return
    dicts = group.gather(config.to_dict())
    other = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
    keys = [key for key in sorted({*dicts[0], *dicts[other]}) if dicts[0].get(key) != dicts[other].get(key)]
    raise UsageError(f"rank 0 and rank {other} differ in {', '.join(keys)}; give all ranks the same command line")


def _run_with_status(
    config: NeoxConfig, group: Group, device: torch.device, options: Options, stop: StopRequest
) -> None:
    """Hold the run directory and leave word of how it ended, whatever a launcher makes of the exit code."""
    path = run_path(config)
    with contextlib.ExitStack() as stack:
        group.on_first(lambda: stack.enter_context(run_directory.lock(path)))
        status = _Status(path, group)
        status.write("running")
        try:
            if group.is_first:
                run_directory.remove_unfinished(path)
            with Watch(group, step_timeout_s=options.step_timeout_s, on_loss=status.lost) as watch:
                figures = _prepare_and_train(config, group, device, options, stop, status, watch)
            status.write("finished", code=0, **({"evaluation": figures} if figures else {}))
        except NeoxError as error:
            status.write("stopped" if error.exit_code == 75 else "failed", code=error.exit_code, reason=str(error))
            raise
        except MemoryError as error:
            status.write("failed", code=71, reason=f"out of memory: {error}")
            raise
        except Exception as error:
            lost = group.world_size > 1 and is_communication(error)
            status.write("failed", code=69 if lost else 1, reason=f"{type(error).__name__}: {error}")
            if lost:
                raise PeerLost(f"another rank was lost ({error})") from error
            raise


class _Status:
    """RUN/run_status.json. A rank other than the first writes it only to say that it failed."""

    def __init__(self, run: Path, group: Group):
        self._run, self._group = run, group
        self.step: int | None = None

    def write(self, state: str, **fields: Any) -> None:
        if not self._group.is_first and state in ("running", "finished", "stopped"):
            return
        earlier = run_directory.read_status(self._run) or {}
        if state == "failed" and earlier.get("state") == "failed" and self._group.world_size > 1:
            return  # the first failure is the cause, the others are its echo
        where = {"rank": self._group.rank, "host": socket.gethostname(), "pid": os.getpid()}
        step = self.step if self._group.is_first else earlier.get("step")
        with contextlib.suppress(OSError):
            run_directory.write_status(self._run, state=state, step=step, **where, **fields)

    def lost(self, line: str) -> None:
        """Another rank is gone; called on whichever rank noticed."""
        earlier = run_directory.read_status(self._run) or {}
        with contextlib.suppress(OSError):
            run_directory.write_status(self._run, **(earlier | {"state": "failed", "code": 69, "reason": line}))

    def saved(self, step: int) -> None:
        """A checkpoint of this step is committed."""
        self.step = step
        if self._group.is_first:
            self.write("running")


def _prepare_and_train(
    config: NeoxConfig,
    group: Group,
    device: torch.device,
    options: Options,
    stop: StopRequest,
    status: _Status,
    watch: Watch,
) -> dict[str, float]:
    start = _start(config, group)
    if config.train.save is None and group.is_first:
        print(f"neox-train: `save` is not set, the run goes to ./{run_path(config)}", file=sys.stderr, flush=True)
    if not options.quiet and group.is_first:
        print(f"neox-train: {start.note}", file=sys.stderr, flush=True)
    status.step = start.source.step if start.own and start.source else None
    work = prepare(config, group, device, options, stop, start, saved=status.saved, mark=watch.mark)
    try:
        figures = loop.train(work)
    finally:
        work.report.close()
    work.engine.close()
    return figures


def _start(config: NeoxConfig, group: Group) -> Start:
    """Rank 0 looks and verifies, all begin with what it found."""

    def look() -> dict[str, Any]:
        found = find_start(config, warn=lambda text: print(f"neox-train: warning: {text}", file=sys.stderr, flush=True))
        source = found.source
        return {
            "source": None if source is None else [str(source.path), source.kind, source.step],
            "own": found.own,
            "note": found.note,
        }

    told = group.on_first(look)
    source = told["source"]
    ref = None if source is None else CheckpointRef(Path(source[0]), source[1], source[2])
    return Start(ref, told["own"], told["note"])


def prepare(
    config: NeoxConfig,
    group: Group,
    device: torch.device,
    options: Options,
    stop: StopRequest,
    start: Start,
    *,
    saved: Callable[[int], None],
    mark: Callable[[int], None],
) -> loop.Run:
    """Data, model, engine and state, ready for the first step."""
    plan = config.batch_plan(group.world_size)
    seq_length = config.model.seq_length
    state = first_state(config, start, plan.global_batch, seq_length)
    splits, train_iters = open_data(config, state, plan.global_batch)
    state.epochs = splits.epochs
    check_same_data(state, splits, start)
    tokenizer = find_tokenizer(config, splits, start.source)
    model_config = resolve_model(config, tokenizer, start.source)
    config = config.replace(
        vocab_size=model_config.vocab_size,
        padded_vocab_size=model_config.padded_vocab_size,
        qk_norm_groups=model_config.qk_norm_groups if model_config.qk_norm == "joint" else None,
    )
    engine = build_engine(config, model_config, device, group)
    restore(config, engine, start, state)
    schedule = pick_schedule(config, start, train_iters)
    run = run_path(config)
    if group.is_first:
        run_directory.cut_metrics(run, state.step) if start.own else (run / run_directory.METRICS).unlink(
            missing_ok=True
        )
    report = Report(
        run,
        active=group.is_first,
        stdout=options.stdout,
        quiet=options.quiet,
        log_interval=config.log.log_interval,
        train_iters=train_iters,
        flops_per_token=model_config.flops_per_token(seq_length).palm,
        devices=group.world_size,
        peak_tflops=config.log.peak_theoretical_tflops or measured_tflops(DTYPES[config.compute_precision], device),
    )
    for note in splits.notes:
        report.note(note)
    if config.zero_stage == 0 and not runs_plain(config, group.world_size):
        report.note("ZeRO stage 0 runs as stage 1: the same numbers")

    def batches(samples: Any) -> Batches | None:
        if samples is None or len(samples) == 0:
            return None
        eod = tokenizer.eod_id if tokenizer is not None else None
        return batches_of(
            config, samples, plan, data_rank=group.rank, device=device, vocab_size=model_config.vocab_size, eod_id=eod
        )

    train = batches(splits.train)
    assert train is not None
    description = Description(
        config_yaml=config.to_yaml(),
        config_sha256=config.hash,
        tokenizer=tokenizer.data if tokenizer is not None else None,
        tokenizer_kind=tokenizer.kind if tokenizer is not None else "",
        optimizer=config.optimizer_type,
        world={"size": group.world_size, "data_parallel": plan.data_parallel},
        dtype=DTYPES[config.compute_precision],
        with_optimizer=not config.train.no_save_optim,
    )
    return loop.Run(
        config,
        group,
        engine,
        state,
        schedule,
        train_iters,
        seq_length,
        train,
        batches(splits.valid),
        batches(splits.test),
        Saver(run, group, engine, description),
        report,
        stop,
        saved,
        mark,
    )


def first_state(config: NeoxConfig, start: Start, global_batch: int, seq_length: int) -> TrainState:
    """Counters to begin with: those of the checkpoint, or zeros for new weights and for `finetune`."""
    if start.source is None or (config.train.finetune and not start.own) or start.source.kind == "hf":
        return TrainState()
    stored = read_trainer(start.source.path)
    if stored is None:  # an imported model without a training state
        return TrainState()
    state = TrainState.from_json(stored, global_batch=global_batch, seq_length=seq_length)
    if config.train.no_load_rng:
        state.rng_base = state.step
    return state


def open_data(config: NeoxConfig, state: TrainState, global_batch: int) -> tuple[Splits, int]:
    """The sample sets and the length of the run in steps."""
    keys = config.train
    if keys.train_iters is None and keys.train_epochs is None:
        raise UsageError("train_iters: is not set; set it, or train_epochs")
    iters = keys.train_iters or 0
    train, valid, test = samples_wanted(iters, global_batch, keys.eval_interval, keys.eval_iters)
    left = max(0, iters - state.step) * global_batch
    wanted = max(train, state.samples + left)  # after a change of the global batch the two differ
    splits = build_splits(
        config,
        train_samples=None if keys.train_iters is None else max(1, wanted),
        valid_samples=valid,
        test_samples=test,
        epochs=state.epochs or None,
    )
    assert splits.train is not None
    if keys.train_iters is None:
        iters = len(splits.train) // global_batch
    return splits, iters


def check_same_data(state: TrainState, splits: Splits, start: Start) -> None:
    """Raise UsageError if a run goes on over data that is not what it began with, under whatever name."""
    assert splits.train is not None
    found = splits.train.fingerprint
    if start.own and state.data_fingerprint not in (None, found):
        raise UsageError(
            f"{', '.join(map(str, splits.prefixes))}: the training data, its order or seq_length changed since step "
            f"{state.step}; put it back, or begin another run with `save` elsewhere and `load`, finetune: true"
        )
    state.data_fingerprint = found


def find_tokenizer(config: NeoxConfig, splits: Splits, source: CheckpointRef | None) -> Tokenizer | None:
    """The configured tokenizer, else the one beside the data, else the checkpoint's.

    Raises:
        UsageError: it is not the one that made the data.
    """
    tokenizer = None
    if config.tokenizer_source:
        tokenizer = load_tokenizer(config.tokenizer_source)
    for prefix in splits.prefixes:
        if tokenizer is None:
            tokenizer = load_tokenizer_of(prefix)
        manifest = read_manifest(prefix)
        recorded = manifest.tokenizer if manifest is not None else None
        if tokenizer is not None and recorded is not None and recorded.sha256 != tokenizer.fingerprint:
            raise UsageError(
                f"{prefix}: made with tokenizer {recorded.sha256[:16]}, not with {tokenizer.fingerprint[:16]} "
                f"({config.tokenizer_source or 'of the other data'}); tokenize it again, or leave the tokenizer out"
            )
    if tokenizer is None and source is not None:
        with contextlib.suppress(InputMissing):
            tokenizer = load_tokenizer(source.path)
    return tokenizer


def resolve_model(config: NeoxConfig, tokenizer: Tokenizer | None, source: CheckpointRef | None) -> ModelConfig:
    """The model: its vocabulary from the tokenizer, its padding from the checkpoint if it comes from one."""
    if tokenizer is None and config.get("vocab_size") is None and config.get("padded_vocab_size") is None:
        raise UsageError("vocab_file: no tokenizer beside the data; name it with vocab_file, or set vocab_size")
    vocab_size = config.get("vocab_size") or (tokenizer.vocab_size if tokenizer is not None else None)
    ours = config.model_config(vocab_size)
    if source is None:
        return ours
    if source.kind == "hf":
        from libneox.checkpoint.hf import open_hf

        stored = open_hf(source.path).config
    else:
        stored = stored_config(source).model_config()
    if config.get("padded_vocab_size") is None:
        ours = dataclasses.replace(ours, padded_vocab_size=stored.padded_vocab_size)
    if config.get("qk_norm_groups") is None:
        ours = dataclasses.replace(ours, qk_norm_groups=stored.qk_norm_groups)
    if ours.vocab_size > ours.padded_vocab_size:
        raise UsageError(
            f"{source.path}: its embedding has {ours.padded_vocab_size} rows, the tokenizer {ours.vocab_size} ids"
        )
    check_same_model(ours, stored, source.path)
    return ours


def build_engine(config: NeoxConfig, model_config: ModelConfig, device: torch.device, group: Group) -> Engine:
    """The model under the engine that fits the optimiser; its values are not set yet."""
    dtype, plan = DTYPES[config.compute_precision], config.batch_plan(group.world_size)
    objective = build_objective(config, Transformer(model_config))

    def optimizer(named: Any) -> torch.optim.Optimizer:
        return build_optimizer(config, named, mup_width_mult=model_config.mup_width_mult)

    if runs_plain(config, group.world_size):
        from neox_train.plain import PlainEngine

        return PlainEngine(
            objective,
            optimizer,
            dtype=dtype,
            device=device,
            grad_accum=plan.grad_accum,
            clipping=config.optim.gradient_clipping,
            world_size=group.world_size,
        )
    from neox_train.engine import DeepSpeedEngine

    settings = config.deepspeed_dict(plan)
    return DeepSpeedEngine(objective, optimizer, settings=settings, states=state_names(config), device=device)


def runs_plain(config: NeoxConfig, world_size: int) -> bool:
    """Whether the plain engine runs this: asked for, needed by the optimiser, or one rank that partitions nothing.

    DeepSpeed's flattening costs 15 % of a step of a 70M model at one rank on a CPU, and there is nothing to partition.

    Raises:
        UsageError: the configuration asks for two things that exclude each other.
    """
    shaped, asked = kind_of(config).shaped, config.get("engine")
    if (shaped or asked == "plain") and config.zero_stage > 1:
        why = f"{config.optimizer_type} needs whole matrices" if shaped else "engine: plain partitions nothing"
        raise UsageError(f"zero_optimization.stage: {why}; set stage: 0")
    if shaped and asked == "deepspeed":
        raise UsageError(f"engine: {config.optimizer_type} needs whole matrices, which ZeRO flattens; set engine: auto")
    if shaped or asked != "auto":
        return shaped or asked == "plain"
    own_sections = any(config.is_set(name) for name in (*PASSED_ON, "deepspeed_extra_args", "fp32_allreduce"))
    return world_size == 1 and config.zero_stage == 0 and config.compute_precision != "fp16" and not own_sections


def restore(config: NeoxConfig, engine: Engine, start: Start, state: TrainState) -> None:
    """Give the engine its values: initial ones, or the checkpoint's."""
    source, model_config = start.source, engine.objective.model.config
    if source is None:
        for name in engine.names():
            engine.restore_master(name, initial_value(model_config, name, config.train.seed))
        return
    if source.kind == "hf":
        from libneox.checkpoint.hf import open_hf

        restore_weights(engine, open_hf(source.path), {}, source.path)
        return
    with open_tensors(source.path) as model, open_tensors(source.path, "optimizer") as optimizer:
        fresh = config.train.no_load_optim or (config.train.finetune and not start.own)
        # finetune takes the rounded weights too: the masters are the same model, only finer
        restore_weights(engine, model, optimizer, source.path)
        stored = (read_trainer(source.path) or {}).get("optimizer")
        if stored and not fresh:
            names = set() if kind_of(config).shaped else set(state_names(config))
            restore_optimizer(engine, optimizer, stored, names)


def pick_schedule(config: NeoxConfig, start: Start, train_iters: int) -> Any:
    """The learning rate: the configuration's, or with `use_checkpoint_lr_scheduler` the checkpoint's."""
    ours = config.lr_schedule(train_iters)
    if start.source is None or start.source.kind == "hf" or config.train.finetune:
        return ours
    stored = stored_config(start.source)
    theirs = stored.lr_schedule(stored.train.train_iters or train_iters)
    if config.train.use_checkpoint_lr_scheduler:
        return theirs
    if theirs != ours and not config.train.override_lr_scheduler:
        print(
            f"neox-train: the learning rate changes from {theirs.describe()} to {ours.describe()}",
            file=sys.stderr,
            flush=True,
        )
    return ours
