# SPDX-License-Identifier: Apache-2.0
"""Samples made of whole documents, for fine-tuning: `unpacked` (one a sample) and `pack_until_overflow` (several).

The order is GPT-NeoX's (gpt2_dataset.py), with its defects mended: the documents are those of the set's own range, no
token of the next sample's document is appended, documents are skipped safely, padding is not trained on even without a
label dataset, and no label dataset is needed. A document longer than a sample is cut; with `allow_chopped: false` it is
left out, as is a document none of whose labels is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from libneox.data.mmap import MMapDataset
from libneox.data.samples import (
    NO_LOSS,
    Sample,
    SampleSet,
    digest,
    fill,
    positions_of,
    require_contiguous,
    require_same_layout,
)
from libneox.errors import DataError, UsageError

Array = np.ndarray[Any, Any]
PACKINGS = ("packed", "pack_until_overflow", "unpacked")
_CHUNK_TOKENS = 1 << 22


class DocumentSamples(SampleSet):
    """Samples of whole documents, padded on the right: token 0, label -100, reward 0.

    Args:
        packing: "unpacked" or "pack_until_overflow".
        segments: samples of each segment. Each is shuffled by its own RandomState(seed + segment).
        labels, rewards: pairs that go with `text`: labels of the same layout; rewards with one value a document.
        kept: the documents to use, if they were chosen already (preference pairs use the same on both sides).
        lengths: what each document counts for when samples are packed, if not its own length, int [n].

    Raises:
        DataError: no document is left to use, or the pairs do not fit together.
    """

    def __init__(
        self,
        text: MMapDataset,
        lo: int,
        hi: int,
        *,
        packing: str,
        seed: int,
        seq_length: int,
        segments: Sequence[int],
        allow_chopped: bool = True,
        labels: MMapDataset | None = None,
        rewards: MMapDataset | None = None,
        kept: Array | None = None,
        lengths: Array | None = None,
    ):
        if labels is not None:
            require_same_layout(text, labels, "labels")
        if rewards is not None:
            _require_rewards(text, rewards)
        self._text, self._labels, self._rewards, self._range = text, labels, rewards, (lo, hi)
        self._packing, self._chop = packing, allow_chopped
        self._seed, self._length, self._segments = seed, seq_length, list(segments)
        self._bounds = np.cumsum([0, *segments], dtype=np.int64)
        self._lengths = text.sizes if lengths is None else lengths
        self._kept = (
            usable(text, lo, hi, seq_length, allow_chopped=allow_chopped, labels=labels) if kept is None else kept
        )
        if not len(self._kept):
            raise DataError(
                f"{text.prefix}: none of its documents {lo}:{hi} can be used: all are empty, wholly masked, or longer "
                f"than {seq_length + 1} tokens with allow_chopped: false"
            )
        self._orders: dict[int, tuple[Array, Array, Array]] = {}

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def plan(self) -> list[list[int]]:
        """Samples of each segment."""
        return [self._segments]

    @property
    def fingerprint(self) -> str:
        """Digest of data, range, packing, seed and sample length."""
        data = [pair.fingerprint if pair is not None else None for pair in (self._text, self._labels, self._rewards)]
        return digest(self._packing, data, *self._range, self._chop, self._seed, self._length)

    def documents(self, position: int) -> Array:
        """The documents of a sample, in their order, int64."""
        segment = int(np.searchsorted(self._bounds, position, side="right")) - 1
        if segment not in self._orders:
            self._orders[segment] = self._order(segment)
        shuffle, starts, documents = self._orders[segment]
        number = int(shuffle[position - int(self._bounds[segment])])
        return documents[starts[number] : starts[number + 1]]

    def read(self, indices: Sequence[int] | Array) -> Sample:
        """See `SampleSet.read`."""
        positions = positions_of(indices, len(self))
        tokens = np.zeros((len(positions), self._length + 1), np.int64)
        labels = np.full_like(tokens, NO_LOSS)
        rewards = None if self._rewards is None else np.zeros(tokens.shape, np.float32)
        for row, position in enumerate(positions.tolist()):
            pieces, room = [], self._length + 1
            for document in self.documents(position).tolist():
                taken = min(int(self._text.sizes[document]), room)
                if rewards is not None and self._rewards is not None:
                    at = self._length + 1 - room
                    rewards[row, at : at + taken] = self._rewards.get(document, 0, 1)[0]
                pieces.append((document, 0, taken))
                room -= taken
            end = fill(tokens[row], self._text, pieces)
            if self._labels is None:
                labels[row, :end] = tokens[row, :end]
            else:
                fill(labels[row], self._labels, pieces)
        return Sample(tokens, labels, rewards)

    def _order(self, segment: int) -> tuple[Array, Array, Array]:
        """Shuffle of the samples; where each begins in the list of documents, and the list."""
        samples = self._segments[segment]
        rng = np.random.RandomState((self._seed + segment) % 2**32)
        shuffle = np.arange(samples, dtype=np.int64)
        rng.shuffle(shuffle)
        if self._packing == "unpacked":
            turn = np.arange(samples, dtype=np.int64) + int(self._bounds[segment])
            return shuffle, np.arange(samples + 1), self._kept[turn % len(self._kept)]
        starts, documents = _pack(self._lengths, *self._range, self._kept, samples, self._length + 1, rng)
        return shuffle, starts, documents


def usable(
    text: MMapDataset, lo: int, hi: int, seq_length: int, *, allow_chopped: bool, labels: MMapDataset | None
) -> Array:
    """The documents of lo..hi that a sample can be made of, ascending, int64."""
    sizes = text.sizes[lo:hi]
    keep = sizes > 0
    if not allow_chopped:
        keep &= sizes <= seq_length + 1
    if labels is not None:
        keep &= _trained(labels, lo, hi, seq_length + 1)
    return np.flatnonzero(keep).astype(np.int64) + lo


def _trained(labels: MMapDataset, lo: int, hi: int, room: int) -> Array:
    """Whether any label within the first `room` tokens of each document is trained on, bool [hi - lo]."""
    require_contiguous(labels)
    found = np.zeros(hi - lo, bool)
    starts = labels.pointers[lo:hi] // labels.dtype.itemsize
    ends = starts + np.minimum(labels.sizes[lo:hi], room)
    at = 0
    while at < hi - lo:
        first = int(starts[at])
        stop = max(at + 1, int(np.searchsorted(starts, first + _CHUNK_TOKENS)))
        trained = labels.tokens[first : int(ends[stop - 1])] >= 0
        before = np.concatenate(([0], np.cumsum(trained, dtype=np.int64)))
        found[at:stop] = before[ends[at:stop] - first] > before[starts[at:stop] - first]
        at = stop
    return found


def _pack(
    sizes: Array, lo: int, hi: int, kept: Array, samples: int, room: int, rng: np.random.RandomState
) -> tuple[Array, Array]:
    """Fill samples with shuffled documents until the next one would not fit.

    Returns:
        Where each sample begins in the list of documents, int64 [samples + 1]; the list, int64.
    """
    usable_mask = np.zeros(hi - lo, bool)
    usable_mask[kept - lo] = True
    permutation = np.arange(hi - lo, dtype=np.int64)  # the original draws over all documents and skips afterwards
    passes: list[Array] = []
    starts: list[int] = []
    while len(starts) < samples + 1:
        # a pass of the original reshuffles the shuffled permutation; several at a time keep the search below linear
        for _ in range(max(1, len(passes))):
            rng.shuffle(permutation)
            passes.append(permutation[usable_mask[permutation]] + lo)
        documents = np.concatenate(passes)
        starts = _first_fit(sizes[documents], room, samples + 1)
    return np.array(starts[: samples + 1], np.int64), documents[: starts[samples]]


def _first_fit(lengths: Array, room: int, wanted: int) -> list[int]:
    """Where samples begin, at most `wanted` of them; one that the list may not fill is followed by none."""
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    fits = np.searchsorted(ends, ends[:-1] + room, side="right") - 1  # first document that does not fit any more
    following = np.maximum(fits, np.arange(1, len(lengths) + 1)).tolist()
    starts, at = [0], 0
    while len(starts) < wanted and following[at] < len(lengths):
        at = following[at]
        starts.append(at)
    return starts


def _require_rewards(text: MMapDataset, rewards: MMapDataset) -> None:
    if len(text) != len(rewards) or (len(rewards) and int(rewards.sizes.min()) < 1):
        raise DataError(
            f"{rewards.prefix}: must hold one reward for each of the {len(text)} documents of {text.prefix}"
        )


def check_packing(packing: str) -> None:
    """Raise UsageError for an unknown `pack_impl`."""
    if packing not in PACKINGS:
        raise UsageError(f"pack_impl: {packing!r} is unknown; it is one of {', '.join(PACKINGS)}")
