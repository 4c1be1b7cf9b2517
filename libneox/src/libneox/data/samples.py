# SPDX-License-Identifier: Apache-2.0
"""Sample sets: positions of a run to arrays.

A set answers for every position 0..len-1, in any order, with the same arrays whatever was asked before, on any rank.
What it holds is decided by a plan, one list of segments for each dataset: for the order of GPT-NeoX a segment is a
number of epochs shuffled together. A run made longer appends a segment, shuffled with the next seed, and leaves the
earlier ones as they were.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from libneox.data.blend import Blend
from libneox.data.mmap import MMapDataset
from libneox.data.order import HashOrder, PackedOrder, samples_in
from libneox.errors import DataError, UsageError

Array = np.ndarray[Any, Any]
NO_LOSS = -100


@dataclass(frozen=True)
class Sample:
    """One sample, or several stacked. L is seq_length.

    Attributes:
        tokens: int64 [L + 1] or [n, L + 1]; position t is predicted from positions before it.
        labels: int64, same shape: the token where position t is trained on, negative where not. None: all are.
        rewards: float32, same shape: the reward of the document a token belongs to.
        rejected: the worse answer of a preference pair, aligned with this one.
    """

    tokens: Array
    labels: Array | None = None
    rewards: Array | None = None
    rejected: Sample | None = None


class SampleSet(ABC):
    """What training and evaluation read from."""

    @property
    @abstractmethod
    def plan(self) -> list[list[int]]:
        """The segments of each dataset, to be stored in the checkpoint."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the samples, except how many there are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int] | Array) -> Sample:
        """The samples at these positions, stacked in this order.

        Raises:
            IndexError: a position is not below the length.
        """

    def get(self, i: int) -> Sample:
        """The sample at one position, not stacked."""
        return unstack(self.read([i]))

    def batch(self, indices: Sequence[int] | Array) -> Array:
        """Only the tokens of `read`, int64 [n, L + 1]."""
        return self.read(indices).tokens


def unstack(sample: Sample) -> Sample:
    """The first of stacked samples."""
    return Sample(
        sample.tokens[0],
        None if sample.labels is None else sample.labels[0],
        None if sample.rewards is None else sample.rewards[0],
        None if sample.rejected is None else unstack(sample.rejected),
    )


def digest(*facts: Any) -> str:
    """Hex sha256 of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def positions_of(indices: Sequence[int] | Array, length: int) -> Array:
    """Indices as int64 [n].

    Raises:
        IndexError: one is negative or not below `length`.
    """
    positions = np.asarray(indices, np.int64).reshape(-1)
    if len(positions) and (int(positions.min()) < 0 or int(positions.max()) >= length):
        raise IndexError(f"positions {positions.min()} to {positions.max()} asked for, the set has {length} samples")
    return positions


def require_same_layout(text: MMapDataset, other: MMapDataset, what: str) -> None:
    """Raise DataError unless both hold sequences of the same lengths."""
    if len(text) != len(other) or not np.array_equal(text.sizes, other.sizes):
        raise DataError(
            f"{other.prefix}: its documents differ in number or length from {text.prefix}, whose {what} it holds"
        )


def require_contiguous(data: MMapDataset) -> None:
    """Raise DataError unless the sequences lie back to back."""
    if not data.contiguous:
        raise DataError(f"{data.prefix}: its sequences do not lie back to back; run neox-shard merge on it")


class PackedSamples(SampleSet):
    """Samples cut from the shuffled documents lo..hi of a pair: GPT-NeoX's `packed`.

    Args:
        segments: epochs shuffled together, one entry a segment.
        labels: a pair of the same layout holding labels.
    """

    def __init__(
        self,
        text: MMapDataset,
        lo: int,
        hi: int,
        *,
        seed: int,
        seq_length: int,
        segments: Sequence[int],
        labels: MMapDataset | None = None,
    ):
        if labels is not None:
            require_same_layout(text, labels, "labels")
        self._text, self._labels, self._lo, self._hi = text, labels, lo, hi
        self._seed, self._length, self._segments = seed, seq_length, list(segments)
        tokens = int(text.sizes[lo:hi].sum(dtype=np.int64))
        counts = [samples_in(epochs, seq_length, tokens) for epochs in segments]
        self._bounds = np.cumsum([0, *counts], dtype=np.int64)
        self._orders: dict[int, PackedOrder] = {}

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def plan(self) -> list[list[int]]:
        """Epochs of each segment."""
        return [self._segments]

    @property
    def fingerprint(self) -> str:
        """Digest of data, range, seed and sample length."""
        data = [pair.fingerprint for pair in (self._text, self._labels) if pair is not None]
        return digest("packed", data, self._lo, self._hi, self._seed, self._length)

    def read(self, indices: Sequence[int] | Array) -> Sample:
        """See `SampleSet.read`."""
        positions = positions_of(indices, len(self))
        tokens = np.empty((len(positions), self._length + 1), np.int64)
        labels = None if self._labels is None else np.empty_like(tokens)
        segments = np.searchsorted(self._bounds, positions, side="right") - 1
        for segment in np.unique(segments).tolist():
            order = self.order(segment)
            here = np.flatnonzero(segments == segment)
            starts = order.starts(positions[here] - self._bounds[segment])
            for row, start in zip(here.tolist(), starts.tolist(), strict=True):
                pieces = order.pieces(start, self._length + 1)
                fill(tokens[row], self._text, pieces)
                if labels is not None and self._labels is not None:
                    fill(labels[row], self._labels, pieces)
        return Sample(tokens, labels)

    def order(self, segment: int) -> PackedOrder:
        """The order of one segment, worked out when first needed."""
        if segment not in self._orders:
            self._orders[segment] = PackedOrder(
                self._text.sizes,
                self._lo,
                self._hi,
                seed=(self._seed + segment) % 2**32,
                seq_length=self._length,
                epochs=self._segments[segment],
            )
        return self._orders[segment]


class HashedSamples(SampleSet):
    """Samples cut from the documents lo..hi in file order, visited in the keyed order. As many epochs as asked for.

    Raises:
        UsageError: the documents hold less than one sample.
        DataError: they do not lie back to back in the file.
    """

    def __init__(
        self,
        text: MMapDataset,
        lo: int,
        hi: int,
        *,
        seed: int,
        seq_length: int,
        samples: int,
        labels: MMapDataset | None = None,
    ):
        if labels is not None:
            require_same_layout(text, labels, "labels")
        self._sources = [text] if labels is None else [text, labels]
        for source in self._sources:
            require_contiguous(source)
        self._range, self._seed, self._length, self._samples = (lo, hi), seed, seq_length, samples
        last = int(text.pointers[hi - 1]) // text.dtype.itemsize + int(text.sizes[hi - 1])
        self._first = int(text.pointers[lo]) // text.dtype.itemsize
        tokens = last - self._first
        if tokens <= seq_length:
            raise UsageError(
                f"{text.prefix}: {tokens} tokens, less than one sample of {seq_length + 1}; use order: neox"
            )
        self._order = HashOrder(tokens, seed=seed, seq_length=seq_length)

    def __len__(self) -> int:
        return self._samples

    @property
    def plan(self) -> list[list[int]]:
        """Nothing to remember: the order does not depend on the length of the run."""
        return [[]]

    @property
    def per_epoch(self) -> int:
        """Samples in one epoch."""
        return self._order.per_epoch

    @property
    def fingerprint(self) -> str:
        """Digest of data, range, seed and sample length."""
        return digest("hash", [pair.fingerprint for pair in self._sources], *self._range, self._seed, self._length)

    def read(self, indices: Sequence[int] | Array) -> Sample:
        """See `SampleSet.read`."""
        starts = self._order.starts(positions_of(indices, len(self))) + self._first
        arrays = []
        for source in self._sources:
            rows = np.empty((len(starts), self._length + 1), np.int64)
            for row, start in enumerate(starts.tolist()):
                rows[row] = source.tokens[start : start + self._length + 1]
            arrays.append(rows)
        return Sample(*arrays)


class BlendedSamples(SampleSet):
    """A mixture of sets: position s is served by the set that `libneox.data.blend` names.

    Args:
        samples: its length. Every set must hold what falls to it, see `blend.samples_of_each`.
    """

    def __init__(self, sets: Sequence[SampleSet], weights: Sequence[float], samples: int):
        self._sets, self._weights, self._samples = list(sets), list(weights), samples
        self._blend = Blend(weights)

    def __len__(self) -> int:
        return self._samples

    @property
    def plan(self) -> list[list[int]]:
        """The plans of the sets, in their order."""
        return [segments for each in self._sets for segments in each.plan]

    @property
    def fingerprint(self) -> str:
        """Digest of the sets' and the weights."""
        return digest("blend", [each.fingerprint for each in self._sets], self._weights)

    def read(self, indices: Sequence[int] | Array) -> Sample:
        """See `SampleSet.read`."""
        positions = positions_of(indices, len(self))
        datasets, samples = self._blend.lookup(positions)
        rows: list[Array] = []
        parts: list[Sample] = []
        for dataset in np.unique(datasets).tolist():
            here = np.flatnonzero(datasets == dataset)
            rows.append(here)
            parts.append(self._sets[dataset].read(samples[here]))
        return join(parts, np.argsort(np.concatenate(rows), kind="stable")) if parts else self._sets[0].read([])


class PairedSamples(SampleSet):
    """Two aligned sets, preferred and rejected."""

    def __init__(self, preferred: SampleSet, rejected: SampleSet):
        self._preferred, self._rejected = preferred, rejected

    def __len__(self) -> int:
        return len(self._preferred)

    @property
    def plan(self) -> list[list[int]]:
        """That of the preferred set; the other follows it."""
        return self._preferred.plan

    @property
    def fingerprint(self) -> str:
        """Digest of both."""
        return digest("pair", self._preferred.fingerprint, self._rejected.fingerprint)

    def read(self, indices: Sequence[int] | Array) -> Sample:
        """See `SampleSet.read`."""
        chosen, rejected = self._preferred.read(indices), self._rejected.read(indices)
        return Sample(chosen.tokens, chosen.labels, chosen.rewards, rejected)


def join(parts: Sequence[Sample], order: Array) -> Sample:
    """Stacked samples, one behind the other, then reordered."""

    def joined(arrays: Sequence[Array | None]) -> Array | None:
        present = [array for array in arrays if array is not None]
        return np.concatenate(present)[order] if len(present) == len(arrays) else None

    rejected = [part.rejected for part in parts if part.rejected is not None]
    return Sample(
        np.concatenate([part.tokens for part in parts])[order],
        joined([part.labels for part in parts]),
        joined([part.rewards for part in parts]),
        join(rejected, order) if rejected else None,
    )


def fill(row: Array, source: MMapDataset, pieces: Sequence[tuple[int, int, int]]) -> int:
    """Copy pieces (document, from, to) one behind the other into `row`; returns where they end."""
    at = 0
    for document, start, stop in pieces:
        row[at : at + stop - start] = source.get(document, start, stop - start)
        at += stop - start
    return at
