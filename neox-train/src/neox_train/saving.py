# SPDX-License-Identifier: Apache-2.0
"""A training state to a step directory and back, on all ranks together."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libneox import run_directory
from libneox.checkpoint import store
from libneox.checkpoint.store import TensorSpec
from libneox.errors import DataError, StorageError, UsageError
from libneox.parallel.group import Group
from libneox.run_directory import FileRecord, Manifest
from neox_train.state import TrainState
from neox_train.steps import Engine

MASTER = "master/"


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


class Saver:
    """Write checkpoints of one run."""

    def __init__(self, run: Path, group: Group, engine: Engine, description: Description):
        self._run, self._group, self._engine, self._about = run, group, engine, description

    def save(self, state: TrainState) -> Path:
        """Write RUN/step_N through the commit protocol; every rank calls this and writes its share of the files.

        Returns the path. A step that is there already and verifies is left alone.

        Raises:
            StorageError: a rank could not write; nothing is left behind and earlier steps are untouched.
        """
        target = run_directory.step_path(self._run, state.step)
        temporary = self._group.on_first(lambda: self._begin(target))
        if temporary is None:
            return target
        records, problem = self._write(Path(temporary), state)
        reports = self._group.gather({"records": {n: [r.bytes, r.sha256] for n, r in records.items()}, "bad": problem})
        bad = [f"rank {rank}: {report['bad']}" for rank, report in enumerate(reports) if report["bad"]]
        if bad:
            if self._group.is_first:
                run_directory.abort_step(Path(temporary))
            raise StorageError(f"{target}: not saved, {bad[0]}; earlier checkpoints are untouched, free some space")
        files = {name: FileRecord(*record) for report in reports for name, record in report["records"].items()}
        self._group.on_first(lambda: str(self._commit(Path(temporary), target, state, files)))
        return target

    def _begin(self, target: Path) -> str | None:
        if target.exists():
            try:
                run_directory.verify_step(target)
                return None
            except run_directory.IntegrityError as error:
                print(f"neox-train: warning: {error}; it is written again", file=sys.stderr, flush=True)
        return str(run_directory.begin_step(target, force=True))

    def _commit(self, temporary: Path, target: Path, state: TrainState, files: dict[str, FileRecord]) -> Path:
        about = self._about
        try:
            trainer = state.to_json({"type": about.optimizer} | self._engine.scalars())
            files |= dict(
                store.small_files(temporary, about.config_yaml, about.tokenizer, trainer, kind=about.tokenizer_kind)
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
            return run_directory.commit_step(temporary, target, manifest)
        except OSError as error:
            run_directory.abort_step(temporary)
            raise StorageError(f"{target}: {error.strerror or error}; earlier checkpoints are untouched") from error

    def _write(self, temporary: Path, state: TrainState) -> tuple[dict[str, FileRecord], str]:
        """This rank's files. A rank that cannot write still takes part in gathering, or the others would hang."""
        records: dict[str, FileRecord] = {}
        problem = ""
        for stem, specs, load in self._groups():
            plan = store.plan_files(stem, specs, writers=self._group.world_size)
            asked = _Counting(load)
            try:
                if problem:
                    raise OSError(problem)
                records |= store.write_planned(temporary, plan, asked, rank=self._group.rank)
            except OSError as error:
                problem = f"{error.strerror or error}"
                for spec in [spec for file in plan for spec in file.specs][asked.count :]:
                    load(spec.name)
        return records, problem

    def _groups(self) -> list[tuple[str, list[TensorSpec], Callable[[str], Tensor]]]:
        engine, dtype = self._engine, self._about.dtype
        shapes = engine.objective.model.config.parameter_shapes()
        groups = [("model", [TensorSpec(name, dtype, shapes[name]) for name in engine.names()], engine.weight)]
        if self._about.with_optimizer:
            states = [TensorSpec(f"{key}/{name}", torch.float32, shape) for key, name, shape in engine.state_specs()]
            if dtype != torch.float32:  # otherwise the model's own tensors are the masters
                states = [TensorSpec(MASTER + name, torch.float32, shapes[name]) for name in engine.names()] + states
            if states:
                groups.append(("optimizer", states, self._optimizer_tensor))
        return groups

    def _optimizer_tensor(self, name: str) -> Tensor:
        key, _, parameter = name.partition("/")
        return self._engine.master(parameter) if key + "/" == MASTER else self._engine.state(key, parameter)


class _Counting:
    def __init__(self, load: Callable[[str], Tensor]):
        self.count = 0
        self._load = load

    def __call__(self, name: str) -> Tensor:
        self.count += 1
        return self._load(name)


def restore_weights(engine: Engine, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], source: Path) -> None:
    """Give the engine every parameter of a checkpoint: the float32 master where there is one.

    Raises:
        DataError: a tensor has another shape than the model.
    """
    shapes = engine.objective.model.config.parameter_shapes()
    for name in engine.names():
        value = optimizer[MASTER + name] if MASTER + name in optimizer else model[name]
        if tuple(value.shape) != shapes[name]:
            raise DataError(f"{source}: {name} is {tuple(value.shape)}, the model has {shapes[name]}")
        engine.restore_master(name, value)


def restore_optimizer(
    engine: Engine, optimizer: Mapping[str, Tensor], stored: dict[str, Any], states: set[str]
) -> None:
    """Give the engine the optimiser's state.

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
    for name in names:
        key, _, parameter = name.partition("/")
        engine.restore_state(key, parameter, optimizer[name])
    engine.restore_scalars({key: value for key, value in stored.items() if key != "type"})
