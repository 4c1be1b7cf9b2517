# SPDX-License-Identifier: Apache-2.0
"""A sequence length that grows (`curriculum_learning`), as a pure function of the step.

The lengths are those of DeepSpeed's curriculum scheduler, which GPT-NeoX used, and which DeepSpeed no longer applies by
itself: linear and root grow from `min_difficulty` to `max_difficulty`, rounded down to multiples of `difficulty_step`
(but never under the first multiple that reaches `min_difficulty`); discrete takes lengths from a list.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig

_KEY = "curriculum_learning"
_FOREVER = 1 << 40  # steps
_CONFIG = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """From `first` to `last` tokens over `total` steps, with the `root`-th root of the share of them that is over."""

    first: int
    last: int
    total: int
    multiple: int
    root: float = 1.0

    def length_at(self, step: int) -> int:
        """Tokens of a sample in step number `step`, from 1."""
        grown = math.floor((step / self.total) ** (1 / self.root) * (self.last - self.first) + self.first)
        smallest = -(-self.first // self.multiple) * self.multiple
        return min(max(grown - grown % self.multiple, smallest), self.last)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stairs:
    """`lengths[i]` up to and with step `until[i]`, and the last length after that."""

    lengths: tuple[int, ...]
    until: tuple[int, ...]

    def length_at(self, step: int) -> int:
        """Tokens of a sample in step number `step`, from 1."""
        return self.lengths[bisect.bisect_left(self.until, step)]


Curriculum = Growth | Stairs


def periods(curriculum: Curriculum, steps: int) -> Iterator[tuple[int, int]]:
    """(length, number of steps) of a run of `steps` steps, in order."""
    first = 1
    while first <= steps:
        length = curriculum.length_at(first)
        count = bisect.bisect_right(range(first, steps + 1), length, key=curriculum.length_at)
        yield length, count
        first += count


def curriculum_of(config: NeoxConfig) -> Curriculum | None:
    """The curriculum of a configuration, if it has one that is enabled.

    Raises:
        UsageError: its section says something else than a curriculum.
    """
    section = config.deepspeed.curriculum_learning or {}
    if not section.get("enabled"):
        return None
    kind = section.get("curriculum_type", "seqlen")
    if kind != "seqlen":
        raise UsageError(f"{_KEY}.curriculum_type: {kind!r} is none; the length of samples grows: seqlen")
    schedule, given = section.get("schedule_type"), section.get("schedule_config") or {}
    if not isinstance(schedule, str) or schedule not in _CONFIG:
        raise UsageError(f"{_KEY}.schedule_type: {schedule!r} is none of {', '.join(_CONFIG)}")
    names = _CONFIG[schedule]
    if not isinstance(given, dict) or set(given) != set(names):
        raise UsageError(f"{_KEY}.schedule_config: {schedule} takes {', '.join(names)}, and all of them")
    first, last = _whole(section, "min_difficulty"), _whole(section, "max_difficulty")
    seq_length = config.seq_length
    if first > last or (seq_length is not None and last > seq_length):
        raise UsageError(
            f"{_KEY}.max_difficulty: {last} tokens is not between min_difficulty {first} and seq_length {seq_length}"
        )
    if schedule == "fixed_discrete":
        curriculum: Curriculum = _stairs(given, first, last)
    else:
        root = given.get("root_degree", 1)
        if isinstance(root, bool) or not isinstance(root, int | float) or root < 1:
            raise UsageError(f"{_KEY}.schedule_config.root_degree: expected a number from 1, found {root!r}")
        curriculum = Growth(
            first=first,
            last=last,
            total=_whole(given, "total_curriculum_step", "schedule_config."),
            multiple=_whole(given, "difficulty_step", "schedule_config."),
            root=float(root),
        )
    _check_splits(config, curriculum)
    return curriculum


def _stairs(given: Mapping[str, Any], first: int, last: int) -> Stairs:
    lengths, until = given["difficulty"], given["max_step"]
    for name, values in (("difficulty", lengths), ("max_step", until)):
        whole = isinstance(values, list) and all(isinstance(v, int) and v > 0 for v in values)
        if not whole or values != sorted(set(values)):
            raise UsageError(f"{_KEY}.schedule_config.{name}: expected whole numbers that rise, found {values!r}")
    if len(lengths) != len(until) + 1 or not until:
        raise UsageError(
            f"{_KEY}.schedule_config.max_step: {len(lengths)} lengths change at {len(lengths) - 1} steps, found "
            f"{len(until)}; the last length has no end"
        )
    if lengths[0] < first or lengths[-1] > last:
        raise UsageError(
            f"{_KEY}.schedule_config.difficulty: {lengths[0]} to {lengths[-1]} tokens is not within min_difficulty "
            f"{first} and max_difficulty {last}"
        )
    return Stairs(lengths=tuple(lengths), until=tuple(until))


def _whole(section: Mapping[str, Any], name: str, prefix: str = "") -> int:
    value = section.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{_KEY}.{prefix}{name}: expected a whole number from 1, found {value!r}")
    return value


def _check_splits(config: NeoxConfig, curriculum: Curriculum) -> None:
    """Sequence parallelism cuts every length into equal parts."""
    if not config.parallel.sequence_parallel:
        return
    bad = [length for length, _ in periods(curriculum, _FOREVER) if length % config.tensor_parallel]
    if bad:
        raise UsageError(
            f"{_KEY}: {bad[0]} tokens cannot be split over model_parallel_size {config.tensor_parallel} by "
            "sequence_parallel; choose difficulty_step, min_difficulty and max_difficulty that can"
        )
