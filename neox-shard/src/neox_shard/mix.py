# SPDX-License-Identifier: Apache-2.0
"""Datasets mixed in given shares, document by document.

Each document has a starting time on its source's own clock: what the source gave before it, divided by the source's
share. The mixture is all documents in the order of these times (start-time fair queueing), so that every beginning of
it has the shares asked for, to within a document of each source. Documents of a source keep their order; shuffle the
sources first, or the result. The work goes window by window of that time: memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.data.blend import normalized
from libneox.data.mmap import MMapDataset, pair_paths
from libneox.errors import DataError, UsageError
from libneox.progress import Progress
from neox_shard.cat import span
from neox_shard.shuffle import ragged
from neox_shard.sink import PROG, Sink

UNITS = ("tokens", "documents")
_WINDOW = {"tokens": 1 << 20, "documents": 1 << 13}  # of the mixture, worked out at a time
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recipe:
    """What to mix.

    Attributes:
        by: whether shares are of tokens or of documents.
        alpha: shares follow size ** alpha where no weights are given.
        tokens, documents: exact length of the result; neither: until the first source runs out.
        repeat: begin a source again that runs out, instead of ending or failing.
    """

    by: str = "tokens"
    alpha: float | None = None
    tokens: int | None = None
    documents: int | None = None
    repeat: bool = False

    def __post_init__(self) -> None:
        if self.by not in UNITS:
            raise UsageError(f"--by {self.by}: is one of {', '.join(UNITS)}")
        if self.tokens is not None and self.documents is not None:
            raise UsageError("--tokens and --documents: give one of them")
        if self.repeat and self.tokens is None and self.documents is None:
            raise UsageError("--repeat has no end without --tokens or --documents")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise UsageError(f"--alpha {self.alpha}: is a number from 0 (equal shares) on, 1 being by size")


def mix_datasets(
    arguments: Sequence[str], out: Path | None, stdout: BinaryIO, recipe: Recipe, *, force: bool, quiet: bool
) -> None:
    """Mix datasets named as PREFIX or PREFIX=WEIGHT.

    Raises:
        UsageError: weights for some sources only, bad ones, or different tokenizers.
        DataError: a source runs out before the length asked for; different dtypes.
    """
    named = [parse_source(argument) for argument in arguments]
    datasets = [MMapDataset(prefix) for prefix, _ in named]
    weights = _weights(named, datasets, recipe)
    used = [(data, weight) for data, weight in zip(datasets, weights, strict=True) if weight > 0]
    sources = [_Source(data, weight, recipe) for data, weight in used]
    with (
        Sink(out, stdout, datasets, force=force) as sink,
        Progress(PROG, "tokens", quiet=quiet, live=out is not None) as progress,
    ):
        until = _end(sources, recipe)
        window = 0
        while not _full(sink, recipe) and window * _WINDOW[recipe.by] < until:
            window += 1
            parts = [source.take(min(window * _WINDOW[recipe.by], until)) for source in sources]
            before = sink.tokens
            _emit(parts, sink, recipe)
            progress.update(sink.tokens - before)
            if not any(source.left for source in sources):
                break
        _check_length(sink, recipe, min(sources, key=lambda source: source.whole))
        sink.commit(quiet)


def parse_source(argument: str) -> tuple[Path, float | None]:
    """PREFIX or PREFIX=WEIGHT; a dataset whose own name ends like a weight wins."""
    prefix, equals, weight = argument.rpartition("=")
    if not equals or pair_paths(argument)[0].exists():
        return Path(argument), None
    try:
        return Path(prefix), float(weight)
    except ValueError:
        return Path(argument), None


def _weights(
    named: Sequence[tuple[Path, float | None]], datasets: Sequence[MMapDataset], recipe: Recipe
) -> list[float]:
    given = [weight for _, weight in named if weight is not None]
    if given and recipe.alpha is not None:
        raise UsageError("--alpha makes the weights; leave out those behind the names")
    if given and len(given) < len(named):
        bare = next(prefix for prefix, weight in named if weight is None)
        raise UsageError(f"{bare}: has no weight, but others have; write {bare}=WEIGHT, or give none at all")
    if given:
        return normalized(given)
    sizes = [data.num_tokens if recipe.by == "tokens" else len(data) for data in datasets]
    return normalized([size ** (1.0 if recipe.alpha is None else recipe.alpha) if size else 0.0 for size in sizes])


class _Source:
    """The documents of one dataset, given out in the order of their starting times."""

    def __init__(self, data: MMapDataset, weight: float, recipe: Recipe):
        if len(data) == 0 or data.num_tokens == 0:
            raise DataError(f"{data.prefix}: has a share of the mixture, but holds no tokens")
        self._data, self._weight, self._recipe = data, weight, recipe
        self._next = 0
        self._given = 0  # tokens or documents, over all rounds

    @property
    def prefix(self) -> Path:
        """Its name."""
        return self._data.prefix

    @property
    def left(self) -> bool:
        """Whether it can give more."""
        return self._recipe.repeat or self._next < len(self._data)

    @property
    def whole(self) -> float:
        """The time at which all of it has been given once."""
        size = self._data.num_tokens if self._recipe.by == "tokens" else len(self._data)
        return size / self._weight

    def take(self, until: float) -> list[tuple[Array, Array, Array]]:
        """Documents that start before a time: (tokens, lengths, starting times) of consecutive ones."""
        found = []
        while self.left:
            if self._next == len(self._data):
                self._next = 0
            lengths = self._data.sizes[self._next : self._next + _WINDOW["documents"]].astype(np.int64)
            costs = lengths if self._recipe.by == "tokens" else np.ones_like(lengths)
            times = (self._given + np.cumsum(costs) - costs) / self._weight
            count = int(np.searchsorted(times, until, side="left"))
            if count:
                values = span(self._data, self._next, self._next + count)
                found.append((values, lengths[:count], times[:count]))
                self._given += int(costs[:count].sum())
                self._next += count
            if count < len(lengths):
                break
        return found


def _end(sources: Sequence[_Source], recipe: Recipe) -> float:
    """The time at which the first source has been given whole: from there on the shares would be wrong."""
    if recipe.repeat:
        return math.inf
    # a little later, so that sources in proportion to their size, which end together, lose no last document to rounding
    return min(source.whole for source in sources) * (1 + 1e-13)


def _emit(parts: Sequence[Sequence[tuple[Array, Array, Array]]], sink: Sink, recipe: Recipe) -> None:
    flat = [piece for source in parts for piece in source]
    if not flat:
        return
    values = np.concatenate([piece[0] for piece in flat])
    lengths = np.concatenate([piece[1] for piece in flat])
    order = np.argsort(np.concatenate([piece[2] for piece in flat]), kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    lengths = _cut(lengths[order], sink, recipe)
    sink.add(ragged(values, starts[: len(lengths)], lengths), lengths)


def _cut(lengths: Array, sink: Sink, recipe: Recipe) -> Array:
    """The lengths that still fit the result; the document that reaches its end in tokens is cut there."""
    if recipe.documents is not None:
        return lengths[: recipe.documents - sink.documents]
    if recipe.tokens is None:
        return lengths
    room = recipe.tokens - sink.tokens
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, room, side="left")) + 1
    kept = lengths[:count].copy()
    if count <= len(ends):
        kept[-1] -= int(ends[count - 1]) - room
    return kept


def _full(sink: Sink, recipe: Recipe) -> bool:
    reached = recipe.tokens is not None and sink.tokens >= recipe.tokens
    return reached or (recipe.documents is not None and sink.documents >= recipe.documents)


def _check_length(sink: Sink, recipe: Recipe, first: _Source) -> None:
    if (recipe.tokens is not None or recipe.documents is not None) and not _full(sink, recipe):
        raise DataError(
            f"{first.prefix}: runs out when the mixture has {sink.tokens} tokens in {sink.documents} documents; ask "
            "for less, give it a smaller share, or add --repeat"
        )
