# SPDX-License-Identifier: Apache-2.0
"""Which tokens are sample i of one dataset: the order of GPT-NeoX, and a keyed one without memory.

Both cut a stream of documents into samples of L + 1 tokens, neighbours sharing one: sample k of the stream S is
S[k*L : k*L + L + 1]. They are pure functions of (lengths, seed, L, epochs, i).

The order of GPT-NeoX (megatron/data/gpt2_dataset.py, pack_impl "packed"): one RandomState(seed) shuffles the documents
of all E epochs together, and then the samples. Position i is sample shuffle[i] of that stream. Where a sample begins is
found by search in a prefix sum, so the table of all beginnings is never built. The last sample, which the original can
not reach, is served.

The keyed order ("hash") leaves the documents in file order and permutes the samples of each epoch by a Feistel network.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from libneox.errors import UsageError

Array = np.ndarray[Any, Any]
_BLOCK = 64  # documents whose lengths are added up into one entry of the prefix sum
_CHUNK = 1 << 20
_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def split_bounds(split: str, count: int) -> tuple[int, int, int, int]:
    """Cut `count` documents into train, valid and test, as GPT-NeoX does.

    Args:
        split: up to three weights, separated by commas or slashes, for example "969, 30, 1".

    Returns:
        Bounds b, so that the three sets are the documents b[0]:b[1], b[1]:b[2] and b[2]:b[3].

    Raises:
        UsageError: no number, a negative one, or a sum of 0.
    """
    separator = "," if "," in split else "/"
    try:
        weights = [float(part) for part in split.split(separator)]
    except ValueError as error:
        raise UsageError(f"split: {split!r} is not a list of numbers such as 969,30,1") from error
    weights = (weights + [0.0] * 3)[:3]
    total = sum(weights)
    if not 0 < total < float("inf") or min(weights) < 0:
        raise UsageError(f"split: {split!r}: the weights must not be negative and must have a finite sum above 0")
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / total * float(count)))  # half to even, like the original
    surplus = bounds[-1] - count
    # the original takes the rounding surplus from all three bounds; never below the one before
    cut = [0]
    for bound in bounds[1:]:
        cut.append(min(max(bound - surplus, cut[-1]), count))
    return cut[0], cut[1], cut[2], count


def epochs_for(samples: int, seq_length: int, tokens: int) -> int:
    """The smallest number of epochs of `tokens` tokens that holds `samples` samples, at least 1."""
    return max(1, -(-(samples * seq_length + 1) // tokens))


def samples_in(epochs: int, seq_length: int, tokens: int) -> int:
    """Samples in that many epochs."""
    return max(0, (epochs * tokens - 1) // seq_length)


class PackedOrder:
    """The order of GPT-NeoX over some epochs of the documents lo..hi.

    Args:
        sizes: tokens of every document of the file, int32 [n]; only lo:hi are used.
        seed: of RandomState, 0 to 2**32 - 1.
        epochs: how many epochs are shuffled together.

    Raises:
        UsageError: the seed is out of range.

    Memory: 4 bytes a document and epoch, 4 a sample.
    """

    def __init__(self, sizes: Array, lo: int, hi: int, *, seed: int, seq_length: int, epochs: int):
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed: {seed} is not between 0 and 4294967295")
        self._sizes, self._length, self._range = sizes, seq_length, slice(lo, hi)
        rng = np.random.RandomState(seed)
        numbers = np.arange(lo, hi, dtype=np.int32 if hi < 2**31 else np.int64)
        self.documents: Array = np.tile(numbers, epochs) if epochs > 1 else numbers
        rng.shuffle(self.documents)
        self._ends = self._block_ends()
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        count = max(0, (tokens - 1) // seq_length)
        self.shuffle: Array = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
        rng.shuffle(self.shuffle)

    def __len__(self) -> int:
        return len(self.shuffle)

    def starts(self, positions: Array) -> Array:
        """First token of each sample in the shuffled stream, int64 [len(positions)]."""
        return self.shuffle[positions].astype(np.int64) * self._length

    def pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """The documents under tokens start : start + count of the shuffled stream, as (document, from, to)."""
        first, offset = self.locate(start)
        found: list[tuple[int, int, int]] = []
        while count > 0:
            documents = self.documents[first : first + _BLOCK].tolist()
            first += _BLOCK
            for document in documents:
                taken = min(int(self._sizes[document]) - offset, count)
                if taken > 0:
                    found.append((document, offset, offset + taken))
                count -= taken
                offset = 0
                if count == 0:
                    break
        return found

    def locate(self, token: int) -> tuple[int, int]:
        """Entry of `documents` that holds a token of the stream, and the token's offset in that document."""
        block = int(np.searchsorted(self._ends, token, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        ends = np.cumsum(self._sizes[self.documents[block * _BLOCK : (block + 1) * _BLOCK]], dtype=np.int64)
        inside = int(np.searchsorted(ends, token - before, side="right"))
        return block * _BLOCK + inside, token - before - (int(ends[inside - 1]) if inside else 0)

    def _block_ends(self) -> Array:
        """Tokens of the stream up to the end of each block of documents, int64."""
        # the file is unaligned, and gathering from it as it lies takes twice as long
        sizes = np.require(self._sizes[self._range], requirements="A")
        sums = np.empty(-(-len(self.documents) // _BLOCK), np.int64)
        for start in range(0, len(self.documents), _CHUNK):  # _CHUNK is a multiple of _BLOCK
            lengths = sizes.take(self.documents[start : start + _CHUNK] - self._range.start)
            edges = np.arange(0, len(lengths), _BLOCK)
            sums[start // _BLOCK : start // _BLOCK + len(edges)] = np.add.reduceat(lengths, edges, dtype=np.int64)
        return np.cumsum(sums, out=sums)


class HashOrder:
    """The keyed order: any position in constant time and memory, any number of epochs.

    Args:
        tokens: length of one epoch's stream, the documents in file order.

    Position i is in epoch i // N, N = (tokens - 1) // seq_length. The samples of epoch e begin at a keyed offset within
    the tokens that fill no sample, so that the unused rest is not the same in every epoch.
    """

    def __init__(self, tokens: int, *, seed: int, seq_length: int):
        self._length, self._seed = seq_length, seed
        self.per_epoch = samples_in(1, seq_length, tokens)
        self._slack = tokens - 1 - self.per_epoch * seq_length

    def starts(self, positions: Array) -> Array:
        """First token of each sample in the stream, int64 [len(positions)]."""
        positions = np.asarray(positions, np.int64)
        epochs = positions // self.per_epoch
        starts = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = _key(self._seed, epoch)
            samples = permute(positions[here] - epoch * self.per_epoch, self.per_epoch, key)
            starts[here] = samples * self._length + _splitmix(key) % (self._slack + 1)
        return starts


def permute(positions: Array, size: int, key: int) -> Array:
    """A keyed bijection of 0..size-1: a balanced Feistel network over the next power of 4, walked until it is inside.

    Args:
        positions: int64 [n], each in 0..size-1.

    Returns:
        int64 [n].
    """
    half = np.uint64(max(3, -(-max(size - 1, 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(_splitmix(key + n)) for n in range(1, _ROUNDS + 1)]
    result = np.asarray(positions, np.int64).astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: Array) -> Array:
    """The finaliser of splitmix64 on uint64, wrapping (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _splitmix(state: int) -> int:
    """One output of splitmix64."""
    x = (state + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _key(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"neox hash order/{seed}/{epoch}".encode()).digest()[:8], "little")
