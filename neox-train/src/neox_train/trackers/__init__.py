# SPDX-License-Identifier: Apache-2.0
"""Where the figures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, Comet. No torch.

Each is an extra of this package, imported when it is asked for. metrics.jsonl stays the source of truth: a tracker
that fails while a run trains costs a warning, never the run.
"""

from __future__ import annotations

import json
import numbers
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from libneox.config import NeoxConfig
from libneox.errors import NeoxError
from libneox.files import write_text
from libneox.parallel.group import Group
from neox_train.observers import Observer

IDS = "trackers.json"
_SWITCHES = {"tensorboard_dir": "tensorboard", "use_wandb": "wandb", "use_comet": "comet"}


class Tracker(Protocol):
    """One service. Its methods may raise whatever its library raises."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step."""

    def close(self, code: int) -> None:
        """The run ends with this exit code."""


class Track(Observer):
    """Hands every record of metrics.jsonl to a tracker; what the tracker makes of it cannot stop a run."""

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]):
        """`warn` is told of the first failure."""
        self._name, self._tracker, self._warn, self._warned = name, tracker, warn, False

    def end_step(self, record: dict[str, Any]) -> None:
        """Log a step."""
        self._try(lambda: self._tracker.log(record["step"], dict(figures(record))))

    def end_run(self, step: int, closing: dict[str, Any]) -> None:
        """Log the figures of the closing evaluations."""
        if closing:
            self._try(lambda: self._tracker.log(step, dict(figures(closing))))

    def close(self) -> None:
        """End the tracker's own run, with the exit code of this one."""
        error = sys.exception()  # the one that ends the run, which closes its observers as it passes by
        code = 0 if error is None else error.exit_code if isinstance(error, NeoxError) else 1
        self._try(lambda: self._tracker.close(code))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a library's own errors, of whatever kind
            if not self._warned:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._warn(f"{self._name}: {reason}; training goes on, metrics.jsonl holds every figure")
            self._warned = True


def build_trackers(
    config: NeoxConfig, group: Group, run: Path, first_step: int, warn: Callable[[str], None]
) -> list[Observer]:
    """The trackers a configuration asks for: on rank 0, with `wandb_init_all_ranks` one on each.

    Args:
        first_step: the run goes on with this one; later ones that a tracker may know never happened.

    Raises:
        UsageError: one of them cannot be begun; nothing has been trained yet.
    """
    names = [name for key, name in _SWITCHES.items() if config.get(key)]
    if not names:
        return []
    ids = group.on_first(lambda: run_ids(run, fresh=first_step == 1))
    found: list[Observer] = []

    def begin() -> None:
        for name in names:
            if group.is_first or (name == "wandb" and config.log.wandb_init_all_ranks):
                found.append(Track(name, _begin(name, config, run, first_step, ids, group.rank), warn))

    group.on_first(begin)
    if not group.is_first:
        begin()
    return found


def _begin(name: str, config: NeoxConfig, run: Path, first_step: int, ids: Mapping[str, str], rank: int) -> Tracker:
    if name == "tensorboard":
        from neox_train.trackers.tensorboard import TensorBoard

        return TensorBoard(config, first_step)
    if name == "wandb":
        from neox_train.trackers.wandb import WeightsAndBiases

        return WeightsAndBiases(config, run, ids[name], rank)
    from neox_train.trackers.comet import Comet

    return Comet(config, run, ids[name])


def run_ids(run: Path, *, fresh: bool) -> dict[str, str]:
    """The names under which services know this run: those it had before, or new ones."""
    path = run / IDS
    try:
        ids = {} if fresh else dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        ids = {}
    wanted = {"wandb": secrets.token_hex(4), "comet": secrets.token_hex(16)}
    write_text(path, json.dumps(wanted | ids) + "\n")
    return wanted | ids


def figures(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record; those of mappings in it are called `mapping/name`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Real):
            yield prefix + name, float(value)
