# SPDX-License-Identifier: Apache-2.0
"""A training state to a step directory and back, on all ranks together."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libneox import run_directory
from libneox.checkpoint import store
from libneox.checkpoint.store import PlannedFile, TensorSpec
from libneox.errors import DataError, StorageError, UsageError
from libneox.parallel.group import Group
from libneox.run_directory import FileRecord, Manifest
from neox_train.forward_check import forward_figures
from neox_train.state import TrainState
from neox_train.steps import Engine

MASTER = "master/"
GIVE_UP_S = 10.0  # how long a failed run waits for the thread that writes a checkpoint nobody will commit
Written = tuple[dict[str, FileRecord], str]


@dataclasses.dataclass(frozen=True)
class Description:
    """What every checkpoint of a run says about itself."""

    config_yaml: str
    config_sha256: str
    tokenizer: bytes | None
    tokenizer_kind: str
    optimizer: str
    world: dict[str, int]
    dtype: torch.dtype
    with_optimizer: bool = True
    forward_length: int | None = None  # tokens of the fixed input whose losses are stored, if they are


@dataclasses.dataclass
class _Unfinished:
    """A checkpoint between `start` and `finish`.

    Attributes:
        temporary: where its files are; None if the step is there already.
        trainer: trainer.json, on rank 0.
        written: records of this rank's files by name, and what went wrong, if anything did.
    """

    state: TrainState
    target: Path
    temporary: Path | None
    trainer: dict[str, Any]
    written: Future[Written]


class Saver:
    """Write checkpoints of one run, one at a time.

    `start` takes the values of a step, `finish` makes them a checkpoint; training may go on between the two. Both are
    called by every rank, at the same step; the messages between ranks are all theirs, the thread that writes a file
    sends none.
    """

    def __init__(self, run: Path, group: Group, engine: Engine, description: Description):
        self._run, self._group, self._engine, self._about = run, group, engine, description
        self._open: _Unfinished | None = None
        self._given_up = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was started and not finished."""
        return self._open is not None

    @property
    def written(self) -> bool:
        """Whether this rank's files of the checkpoint under way are on disk (or never will be)."""
        return self._open is not None and self._open.written.done()

    def start(self, state: TrainState, *, aside: bool = False) -> None:
        """Write this rank's share of the files of RUN/step_N, where no reader looks yet.

        A step that is there already and verifies is left alone.

        Args:
            aside: copy the values to host memory and write them in a thread, so that they may change at once.
        Raises:
            StorageError: on every rank alike, if a directory could not be made; earlier steps are untouched.
        """
        assert self._open is None, "the checkpoint before was not finished"
        target = run_directory.step_path(self._run, state.step)
        made = self._group.tell(self._make_directory(target) if self._group.is_first else None)
        if made["bad"]:
            raise StorageError(f"{target}: not saved, {made['bad']}; earlier checkpoints are untouched")
        temporary = None if made["path"] is None else Path(made["path"])
        trainer: dict[str, Any] = {}
        if self._group.is_first:
            trainer = state.to_json({"type": self._about.optimizer} | self._engine.scalars())
        if self._about.forward_length is not None and temporary is not None:
            trainer["forward_check"] = forward_figures(self._engine, self._about.forward_length, self._about.dtype)
        written: Future[Written] = Future()
        self._open = _Unfinished(dataclasses.replace(state), target, temporary, trainer, written)
        if temporary is None:
            written.set_result(({}, ""))
        elif aside:
            self._write_aside(temporary, written)
        else:
            try:
                written.set_result(self._write(temporary))
            except BaseException as error:  # then nobody works on it any more, and `close` has nothing to wait for
                written.set_exception(error)
                raise

    def finish(self) -> Path:
        """Wait for the files of all ranks and commit the step that was started; returns its path.

        Raises:
            StorageError: on every rank alike, if one could not write; nothing is left behind and earlier steps are
                untouched.
        """
        assert self._open is not None, "nothing was started"
        step, self._open = self._open, None
        records, problem = step.written.result()
        if step.temporary is None:
            return step.target
        reports = self._group.gather({"records": {n: [r.bytes, r.sha256] for n, r in records.items()}, "bad": problem})
        bad = next((f"rank {rank}: {report['bad']}" for rank, report in enumerate(reports) if report["bad"]), "")
        if not bad:
            files = {name: FileRecord(*record) for report in reports for name, record in report["records"].items()}
            bad = self._group.tell(self._commit(step, files) if self._group.is_first else None)
        if bad:
            if self._group.is_first:
                run_directory.abort_step(step.temporary)
            raise StorageError(f"{step.target}: not saved, {bad}; earlier checkpoints are untouched, free some space")
        return step.target

    def close(self) -> None:
        """Give up a checkpoint that was not finished, because the run has failed."""
        if self._open is None:
            return
        step, self._open = self._open, None
        self._given_up.set()
        wait([step.written], GIVE_UP_S)
        if step.temporary is not None and self._group.is_first:
            run_directory.abort_step(step.temporary)

    def _make_directory(self, target: Path) -> dict[str, Any]:
        if target.exists():
            try:
                run_directory.verify_step(target)
                return {"path": None, "bad": ""}
            except run_directory.IntegrityError as error:
                print(f"neox-train: warning: {error}; it is written again", file=sys.stderr, flush=True)
        try:
            return {"path": str(run_directory.begin_step(target, force=True)), "bad": ""}
        except OSError as error:
            return {"path": None, "bad": _reason(error)}

    def _commit(self, step: _Unfinished, files: dict[str, FileRecord]) -> str:
        """What went wrong, or an empty text."""
        about, state = self._about, step.state
        assert step.temporary is not None
        try:
            files |= dict(
                store.small_files(
                    step.temporary, about.config_yaml, about.tokenizer, step.trainer, kind=about.tokenizer_kind
                )
            )
            manifest = Manifest(
                step=state.step,
                samples=state.samples,
                tokens=state.tokens,
                world=about.world,
                config_sha256=about.config_sha256,
                tokenizer=store.describe_tokenizer(about.tokenizer, about.tokenizer_kind),
                files=files,
            )
            run_directory.commit_step(step.temporary, step.target, manifest)
        except OSError as error:
            return _reason(error)
        return ""

    def _write(self, temporary: Path) -> Written:
        """This rank's files. A rank that cannot write still takes part in gathering, or the others would hang."""
        records: dict[str, FileRecord] = {}
        problem = ""
        for plan, load in self._plans():
            asked = _Counting(load)
            try:
                if problem:
                    raise OSError(problem)
                records |= store.write_planned(temporary, plan, asked, rank=self._group.rank)
            except OSError as error:
                problem = _reason(error)
                for spec in [spec for file in plan for spec in file.specs][asked.count :]:
                    load(spec.name)
        return records, problem

    def _write_aside(self, temporary: Path, written: Future[Written]) -> None:
        """Copy this rank's tensors to host memory, then write them in a thread: the same files as `_write`'s."""
        mine: list[PlannedFile] = []
        held: dict[str, Tensor] = {}
        for plan, load in self._plans():
            mine += [file for file in plan if file.owner == self._group.rank]
            for file in plan:
                for spec in file.specs:
                    value = load(spec.name)  # a collective, whoever writes it
                    if file.owner == self._group.rank:
                        held[spec.name] = value.detach().to("cpu", copy=True)

        def take(name: str) -> Tensor:
            if self._given_up.is_set():
                raise OSError("given up")
            return held.pop(name)

        def work() -> None:
            try:
                written.set_result((store.write_planned(temporary, mine, take, rank=self._group.rank), ""))
            except OSError as error:
                written.set_result(({}, _reason(error)))
            except BaseException as error:
                written.set_exception(error)

        threading.Thread(target=work, name="neox-save", daemon=True).start()

    def _plans(self) -> list[tuple[list[PlannedFile], Callable[[str], Tensor]]]:
        """The files of each group of tensors, and what gives a tensor by its name."""
        engine, dtype = self._engine, self._about.dtype
        shapes = engine.objective.model.config.parameter_shapes()
        groups = [("model", [TensorSpec(name, dtype, shapes[name]) for name in engine.names()], engine.weight)]
        if self._about.with_optimizer:
            states = [TensorSpec(f"{key}/{name}", torch.float32, shape) for key, name, shape in engine.state_specs()]
            if dtype != torch.float32:  # otherwise the model's own tensors are the masters
                states = [TensorSpec(MASTER + name, torch.float32, shapes[name]) for name in engine.names()] + states
            if states:
                groups.append(("optimizer", states, self._optimizer_tensor))
        writers = self._group.world_size
        return [(store.plan_files(stem, specs, writers=writers), load) for stem, specs, load in groups]

    def _optimizer_tensor(self, name: str) -> Tensor:
        key, _, parameter = name.partition("/")
        return self._engine.master(parameter) if key + "/" == MASTER else self._engine.state(key, parameter)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}"


class _Counting:
    def __init__(self, load: Callable[[str], Tensor]):
        self.count = 0
        self._load = load

    def __call__(self, name: str) -> Tensor:
        self.count += 1
        return self._load(name)


def restore_weights(engine: Engine, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], source: Path) -> None:
    """Give the engine the parameters that this rank holds: the float32 master where the checkpoint has one.

    Raises:
        DataError: a tensor has another shape than the model.
    """
    shapes = engine.objective.model.config.parameter_shapes()
    for name in engine.local():
        value = optimizer[MASTER + name] if MASTER + name in optimizer else model[name]
        if tuple(value.shape) != shapes[name]:
            raise DataError(f"{source}: {name} is {tuple(value.shape)}, the model has {shapes[name]}")
        engine.restore_master(name, value)


def restore_optimizer(
    engine: Engine, optimizer: Mapping[str, Tensor], stored: dict[str, Any], states: set[str]
) -> None:
    """Give the engine the optimiser's state, as far as this rank holds it.

    Args:
        stored: `optimizer` of trainer.json.
        states: names of state tensors that the configured optimiser has, if they are known beforehand.
    Raises:
        UsageError: the checkpoint was made with another optimiser.
    """
    names = [name for name in optimizer if not name.startswith(MASTER)]
    found = {name.partition("/")[0] for name in names}
    if states and found and found != states:
        raise UsageError(
            f"optimizer: the checkpoint holds {', '.join(sorted(found))} of {stored.get('type')}, the configured one "
            f"has {', '.join(sorted(states))}; set no_load_optim: true to start it afresh"
        )
    elsewhere = set(engine.names()) - set(engine.local())
    for name in names:
        key, _, parameter = name.partition("/")
        if parameter not in elsewhere:
            engine.restore_state(key, parameter, optimizer[name])
    engine.restore_scalars({key: value for key, value in stored.items() if key != "type"})
