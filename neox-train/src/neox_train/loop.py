# SPDX-License-Identifier: Apache-2.0
"""The loop: step, evaluate, save, until the run is done or somebody asks it to stop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from libneox import run_directory
from libneox.config import NeoxConfig
from libneox.curriculum import Curriculum
from libneox.errors import NonFiniteLoss, StoppedEarly, StorageError
from libneox.parallel.group import Group
from libneox.schedule import Schedule
from libneox.tokenizer import Tokenizer
from neox_train import blame
from neox_train.ahead import Ahead
from neox_train.batches import Batches
from neox_train.characters import Characters
from neox_train.late import Read, later
from neox_train.objective import MicroBatch
from neox_train.observers import Observer
from neox_train.remote import Uploads
from neox_train.report import Report
from neox_train.saving import Saver
from neox_train.signals import StopRequest
from neox_train.state import TrainState
from neox_train.steps import Engine
from neox_train.tasks import Tasks


@dataclasses.dataclass
class Begun:
    """A step whose outcome the loop has not looked at yet.

    Attributes:
        before: the counters it began with.
        started: time.perf_counter() then.
        length: positions of each sample.
        sums: reads the loss and the numbers of ranks that are to stop and that have written the checkpoint under way,
            each summed over ranks, and the loss of this rank.
        outcome: reads the norm of the gradient, and whether the update was left out.
        extra: what observers have for its record.
        loss, stops: mean over ranks, and whether one is to stop; once `sums` was read.
    """

    before: TrainState
    started: float
    lr: float
    length: int
    sums: Read
    outcome: Read = list
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss: float = math.nan
    stops: bool = False

    @property
    def step(self) -> int:
        """Its number, from 1."""
        return self.before.step + 1


@dataclasses.dataclass
class Run:
    """Everything a loop works with."""

    config: NeoxConfig
    group: Group
    engine: Engine
    state: TrainState
    schedule: Schedule
    train_iters: int
    seq_length: int
    train: Batches | Ahead
    valid: Batches | None
    test: Batches | None
    saver: Saver
    report: Report
    stop: StopRequest
    saved: Callable[[int], None]  # told the step of each committed checkpoint
    mark: Callable[[int], None]  # told the step under way, each time this rank got somewhere
    observers: Sequence[Observer] = ()
    curriculum: Curriculum | None = None
    tokenizer: Tokenizer | None = None
    uploads: Uploads | None = None  # on rank 0, if copies are kept elsewhere
    tasks: Tasks | None = None
    runs_ahead: bool = False  # a step begins before the outcome of the last one is looked at
    begun: Begun | None = None  # that one
    ended: float = 0.0  # time.perf_counter() when a step was last done with
    told: dict[str, Any] = dataclasses.field(default_factory=dict)  # figures for the next record


def train(run: Run) -> dict[str, Any]:
    """Train to the last step; returns the figures of the closing evaluations.

    Raises:
        StoppedEarly: a signal, or `exit_interval`; the state is saved.
        NonFiniteLoss: loss or gradient is not a number; what was saved before stays the newest.
    """
    state, keys = run.state, run.config.train
    if state.step == 0 and 0 in (keys.extra_save_iters or ()):
        save(run)
    while state.step < run.train_iters:
        try:
            stopping = one_step(run)
        except NonFiniteLoss:
            settle(run)  # a checkpoint under way is of an earlier step
            raise
        reason = stopping or ("exit_interval" if exits(run) else "")
        asked = run.tasks is not None and run.tasks.due(state.step)
        if state.step < run.train_iters and (reason or asked or is_due(keys, state.step)):
            save(run, last=bool(reason))
            if asked and not reason:
                run.told |= task_figures(run)
        if reason and state.step < run.train_iters:
            raise StoppedEarly(f"stopped by {reason} after step {state.step}, state saved; run the same command again")
    if run.train_iters > 0:
        save(run, last=True)
    figures = finish(run)
    for observer in run.observers:
        observer.end_run(state.step, figures)
    return figures


def one_step(run: Run) -> str:
    """Do one optimiser step and report it; returns the name of the signal if any rank was asked to stop.

    A loop that runs ahead begins the step and reports the one before; where something comes after a step, or the run
    is to stop, it catches up.
    """
    earlier, run.begun = run.begun, begin_step(run)
    stopping = "" if earlier is None else end_step(run, earlier)
    if not run.runs_ahead or stopping or something_follows(run):
        begun, run.begun = run.begun, None
        stopping = end_step(run, begun) or stopping
    return stopping


def something_follows(run: Run) -> bool:
    """Whether anything but the next step comes after the last one begun."""
    state, keys = run.state, run.config.train
    evaluates = run.valid is not None and state.step % keys.eval_interval == 0
    tested = run.tasks is not None and run.tasks.due(state.step)
    return evaluates or tested or exits(run) or is_due(keys, state.step) or state.step >= run.train_iters


def exits(run: Run) -> bool:
    """Whether `exit_interval` ends the run here."""
    every = run.config.train.exit_interval
    return bool(every) and run.state.step % every == 0


def begin_step(run: Run) -> Begun:
    """Compute and update, and advance the counters; a loop that runs ahead does not wait for the results.

    Raises:
        NonFiniteLoss: see `look_at_loss`; the weights are as they were.
    """
    state, engine = run.state, run.engine
    before, started, lr = dataclasses.replace(state), time.perf_counter(), run.schedule.lr_at(state.updates)
    for observer in run.observers:
        observer.begin_step(state.step + 1)
    length = run.curriculum.length_at(state.step + 1) if run.curriculum is not None else run.seq_length
    own = backward(run, before, length)
    sums = run.group.queue_sum([own, float(bool(run.stop)), float(run.saver.written)], engine.device)
    begun = Begun(before, started, lr, length, later([*sums, own], engine.device))
    if not run.runs_ahead:
        look_at_loss(run, begun)
    for observer in run.observers:
        begun.extra |= observer.before_update(engine)
    begun.outcome = later(engine.step(lr), engine.device)
    state.step += 1
    state.samples += run.train.plan.global_batch
    state.tokens += run.train.plan.global_batch * length
    state.updates += 1
    return begun


def look_at_loss(run: Run, begun: Begun) -> None:
    """Read what the ranks have found out together; commits the checkpoint under way once all have written theirs.

    Raises:
        NonFiniteLoss: the loss is not a number.
    """
    total, stops, written, own = begun.sums()
    if written == run.group.world_size:
        settle(run)
    begun.loss, begun.stops = total / run.group.world_size, bool(stops)
    if not math.isfinite(begun.loss):
        raise NonFiniteLoss(blame.loss(run.group, run.engine, begun.step, samples_of(run, begun), begun.loss, own))


def end_step(run: Run, begun: Begun) -> str:
    """Look at the results of a step, evaluate if it is time, report; see `one_step`.

    Raises:
        NonFiniteLoss: loss or gradient is not a number.
    """
    state, plan = run.state, run.train.plan
    if run.runs_ahead:
        look_at_loss(run, begun)
    grad_norm, skipped = begun.outcome()
    scaler = run.engine.scalars().get("loss_scaler") if skipped else None
    if skipped and scaler is None:
        backward(run, begun.before, begun.length)  # again, as the engine has let go of the gradient
        raise NonFiniteLoss(blame.gradient(run.engine, begun.step, samples_of(run, begun), begun.loss))
    state.updates -= bool(skipped)
    tokens, before = plan.global_batch * begun.length, begun.before
    record = {"step": begun.step, "samples": before.samples + plan.global_batch, "tokens": before.tokens + tokens}
    record |= {"loss": begun.loss, "lr": begun.lr, "grad_norm": grad_norm if math.isfinite(grad_norm) else None}
    if run.curriculum is not None:
        record["curriculum_seqlen"] = begun.length
    record |= begun.extra | run.told
    run.told = {}
    if scaler is not None:
        record |= {"skipped": True, "loss_scale": scaler["cur_scale"]}
    seconds = time.perf_counter() - max(begun.started, run.ended)
    stops = begun.stops
    if not stops and run.valid is not None and begun.step % run.config.train.eval_interval == 0:
        number = begun.step // run.config.train.eval_interval - 1
        figures = evaluation(run, run.valid, "valid", number)
        record |= figures or {}
        stops = figures is None
    run.report.step(record, seconds, tokens, begun.length)
    for observer in run.observers:
        observer.end_step(record)
    run.ended = time.perf_counter()
    return (run.stop.name or "a signal to another rank") if stops else ""


def samples_of(run: Run, begun: Begun) -> range:
    """Where the samples of a step are in the order."""
    return range(begun.before.samples, begun.before.samples + run.train.plan.global_batch)


def backward(run: Run, before: TrainState, length: int) -> torch.Tensor:
    """Add up the gradients of the step after `before`; returns their mean loss. Done again, it gives the same."""
    # neighbours that share a model draw the same numbers (and others of their own where each does a part of the work)
    torch.manual_seed(before.random_seed(run.config.train.seed, run.group.rank // run.config.tensor_parallel))
    return run.engine.backward(marked(run, run.train.step(before.samples, length), before.step + 1))


def marked(run: Run, batches: Iterator[MicroBatch], step: int) -> Iterator[MicroBatch]:
    """The same micro-batches; taking one, and asking for one more, shows that this rank got somewhere."""
    for batch in batches:
        run.mark(step)
        yield batch
    run.mark(step)


def evaluation(run: Run, batches: Batches, name: str, number: int) -> dict[str, float | None] | None:
    """Mean loss over `eval_iters` global batches: those of the `number`th evaluation, so that all see other samples.

    A figure that is not finite is None, as JSON has no word for it. Instead of all figures None: a rank was asked to
    stop, and there is no time for this.
    """
    rounds = run.config.train.eval_iters
    if rounds == 0:
        return {}
    characters = Characters(run.tokenizer) if run.config.train.char_level_ppl and run.tokenizer is not None else None
    run.engine.train(False)
    losses = []
    for index in range(number * rounds, (number + 1) * rounds):
        made = marked(run, batches.step(index * batches.plan.global_batch), run.state.step)
        losses.append(run.engine.evaluate(made if characters is None else characters.counted(made)))
        if any(run.group.sum([float(bool(run.stop))], run.engine.device)):
            break
    run.engine.train(True)
    if len(losses) < rounds:
        run.report.note(f"step {run.state.step}: the {name} loss is left out, the run is to stop")
        return None
    (total,) = run.group.sum([torch.stack(losses).mean().item()], run.engine.device)
    loss = total / run.group.world_size
    run.report.note(f"step {run.state.step}: {name} loss {loss:.4f}, perplexity {safe_exp(loss):.4g}")
    figures = {f"{name}_loss": loss, f"{name}_ppl": safe_exp(loss)}
    if characters is not None:
        figures[f"{name}_char_ppl"] = safe_exp(loss * characters.tokens_each(run.group, run.engine.device))
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def safe_exp(value: float) -> float:
    """exp, infinite rather than an error where it is too large."""
    return math.exp(value) if value < 700 else math.inf


def is_due(keys: object, step: int) -> bool:
    """Whether `checkpoint_factor`, `checkpoint_scale` or `extra_save_iters` ask for a checkpoint after this step."""
    factor = getattr(keys, "checkpoint_factor", None)
    if step in (getattr(keys, "extra_save_iters", None) or ()):
        return True
    if not factor or step == 0:
        return False
    if getattr(keys, "checkpoint_scale", "linear") == "linear":
        return step % int(factor) == 0
    power = round(math.log(step) / math.log(factor))
    return any(int(factor**k) == step for k in range(max(0, power - 1), power + 2))


def save(run: Run, *, last: bool = False) -> None:
    """Checkpoint this step: at once if it is the last thing done, with `async_save` while training goes on.

    Raises:
        StorageError: it failed, and `on_save_error` says stop, or it was the last.
    """
    settle(run)  # never two at a time
    aside = run.config.train.async_save and not last
    run.mark(run.state.step)
    try:
        run.saver.start(run.state, aside=aside)
    except StorageError as error:
        tolerate(run, error, last=last)
    if not aside:
        settle(run, last=last)


def settle(run: Run, *, last: bool = False) -> None:
    """Commit the checkpoint under way, if there is one, say so on stdout, delete what is no longer kept."""
    if not run.saver.busy:
        return
    run.mark(run.state.step)
    try:
        path = run.saver.finish()
    except StorageError as error:
        tolerate(run, error, last=last)
        return
    run.mark(run.state.step)
    keep = run.config.train.keep_last_n_checkpoints
    if run.group.is_first:
        run.saved(run_directory.step_number(path))
        run.report.checkpoint(path)
        if run.uploads is not None:
            run.uploads.offer(run_directory.step_number(path))
        if keep:
            prune(run, path.parent, keep)


def prune(run: Run, folder: Path, keep: int) -> None:
    """Delete older steps; one that cannot be deleted costs space, not the run."""
    kept = set(run.config.train.extra_save_iters or ()) | (run.uploads.pending if run.uploads is not None else set())
    try:
        run_directory.prune(folder, keep, protect=kept)
    except OSError as error:
        run.report.warn(f"{folder}: older checkpoints stay, {error.strerror or error}")


def tolerate(run: Run, error: StorageError, *, last: bool) -> None:
    """Go on without a checkpoint if the configuration says so; the state at the end of a run is never let go."""
    if last or run.config.train.on_save_error == "stop":
        raise error
    run.report.warn(f"{error}; going on without it (on_save_error: continue)")


def finish(run: Run) -> dict[str, Any]:
    """The evaluations after the last step: the figures, by name.

    Raises:
        StoppedEarly: a signal.
    """
    results: dict[str, Any] = {}
    last = run.train_iters // run.config.train.eval_interval
    for batches, name, number in ((run.valid, "valid", last), (run.test, "test", 0)):
        figures = {} if batches is None else evaluation(run, batches, name, number)
        if figures is None:
            raise StoppedEarly(
                "stopped after the last step, in its evaluation, state saved; run the same command again"
            )
        results |= figures
    if run.tasks is not None and run.train_iters > 0:
        results |= task_figures(run)
    return results


def task_figures(run: Run) -> dict[str, Any]:
    """What neox-eval says of the checkpoint of this step, once it is committed; empty if it says nothing."""
    assert run.tasks is not None
    settle(run)
    if run.engine.device.type == "cuda":
        torch.cuda.empty_cache()  # the evaluation is another process on the same device
    figures = run.tasks.evaluate(run.state.step)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if shown:
        run.report.note(f"step {run.state.step}: {shown}")
    return {"tasks": {"step": run.state.step} | figures} if figures else {}
