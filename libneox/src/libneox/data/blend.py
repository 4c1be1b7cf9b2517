# SPDX-License-Identifier: Apache-2.0
"""Which dataset serves position s of a mixture, and with which of its own samples.

GPT-NeoX's rule (megatron/data/helpers.cpp, build_blending_indices): at position s the dataset that lags most behind its
share, the first i with the largest w[i] * max(s, 1) - served[i] in IEEE doubles, serves its next sample. A position
depends on all earlier ones, so the rule cannot be evaluated at once; but two runs of it that start differently soon
agree. Hence a stretch is cut into lanes that run side by side from guessed states, and lanes whose guess proves wrong
are run again from the right one until every lane starts where the one before it ends. The result is exact whatever the
guesses were worth.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from libneox.errors import UsageError

Array = np.ndarray[Any, Any]
_SHORTEST, _LONGEST = 1 << 13, 1 << 18  # positions worked out at a time; stretches double in between
_LANES = 512  # lanes of the longest stretch


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1.

    Raises:
        UsageError: a weight is negative, infinite or no number, or all are 0.
    """
    for weight in weights:
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise UsageError(f"data weights: {weight} is no weight; weights are finite numbers of at least 0")
    total = 0.0
    for weight in weights:
        total += float(weight)
    if not 0 < total < math.inf:
        raise UsageError("data weights: their sum must be above 0 and finite")
    return [float(weight) / total for weight in weights]


def samples_of_each(weights: Sequence[float], samples: int) -> list[int]:
    """Samples wanted of each dataset: its share and half a percent more, as GPT-NeoX reckons.

    Args:
        weights: normalised ones.
    """
    return [math.ceil(samples * weight * 1.005) for weight in weights]


def weights_by_documents(documents: Sequence[int], alpha: float) -> list[float]:
    """Weights from document counts n, with p = n / sum of n: p**alpha, normalised, times (1 - p), normalised.

    GPT-NeoX's formula (megatron/data/data_utils.py). The factor (1 - p) is no part of what its documentation says; it
    is kept because runs depend on it.
    """
    if len(documents) == 1:
        return [1.0]
    total = sum(documents)
    shares = [count / total for count in documents]
    powers = [share**alpha for share in shares]
    whole = sum(powers)
    return normalized([power / whole * (1 - share) for power, share in zip(powers, shares, strict=True)])


class Blend:
    """The mixture's order, worked out as far as it is asked for.

    Args:
        weights: one for each dataset; normalised here.

    Memory: 1 byte a position (2 with more than 256 datasets), and 8 bytes a dataset for every lane.
    """

    def __init__(self, weights: Sequence[float]):
        self._weights = np.array(normalized(weights), np.float64)
        self._stretches: list[_Stretch] = []
        self._bounds = [0]  # first position of each stretch, and the end of the last
        self._state = np.zeros(len(self._weights), np.int64)

    def lookup(self, positions: Array) -> tuple[Array, Array]:
        """Dataset of each position, and the number of the sample within it: int64 [n] each."""
        positions = np.asarray(positions, np.int64)
        if len(self._weights) == 1:
            return np.zeros(len(positions), np.int64), positions
        if len(positions):
            self._extend(int(positions.max()) + 1)
        datasets, samples = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for at, position in enumerate(positions.tolist()):
            number = bisect.bisect_right(self._bounds, position) - 1
            stretch = self._stretches[number]
            lane, step = divmod(position - self._bounds[number], stretch.chosen.shape[1])
            chosen = int(stretch.chosen[lane, step])
            datasets[at] = chosen
            earlier = np.count_nonzero(stretch.chosen[lane, :step] == chosen)
            samples[at] = int(stretch.served[lane, chosen]) + int(earlier)
        return datasets, samples

    def indices(self, size: int) -> tuple[Array, Array]:
        """The first `size` positions at once: dataset of each, and sample within it; int64 [size] each."""
        self._extend(size)
        chosen = [stretch.chosen.reshape(-1) for stretch in self._stretches]
        datasets = np.concatenate([np.empty(0, np.uint8), *chosen])[:size].astype(np.int64)
        samples = np.empty(size, np.int64)
        for dataset in range(len(self._weights)):
            here = np.flatnonzero(datasets == dataset)
            samples[here] = np.arange(len(here))
        return datasets, samples

    def _extend(self, size: int) -> None:
        while (end := self._bounds[-1]) < size:
            length = min(max(end, _SHORTEST), _LONGEST)
            stretch, self._state = _stretch(self._weights, self._state, end, length)
            self._stretches.append(stretch)
            self._bounds.append(end + length)


@dataclass(frozen=True)
class _Stretch:
    """Consecutive positions, cut into lanes.

    Attributes:
        chosen: dataset of each position, uint8 or uint16 [lanes, positions of a lane].
        served: samples served of each dataset before each lane, int64 [lanes, k].
    """

    chosen: Array
    served: Array


def _stretch(weights: Array, state: Array, first: int, length: int) -> tuple[_Stretch, Array]:
    """Positions first : first + length (a power of 2), and the state behind them.

    Args:
        state: samples served of each dataset before `first`, int64 [k].
    """
    lanes = min(_LANES, length >> 6)
    steps = length // lanes
    begins = first + steps * np.arange(lanes, dtype=np.int64)
    starts = np.stack([_guess(weights, state, int(begin)) for begin in begins])
    starts[0] = state
    ends = np.empty_like(starts)
    chosen = np.empty((lanes, steps), np.uint8 if len(weights) <= 256 else np.uint16)
    wrong = np.arange(lanes)
    while len(wrong):
        chosen[wrong], ends[wrong] = _run(weights, starts[wrong], begins[wrong], steps)
        wrong = np.flatnonzero((starts[1:] != ends[:-1]).any(axis=1)) + 1
        starts[wrong] = ends[wrong - 1]
    return _Stretch(chosen, starts), ends[-1]


def _guess(weights: Array, state: Array, position: int) -> Array:
    """A likely state before `position`: shares rounded so that they sum to it, and nothing unserved."""
    due = np.maximum(weights * position, state)
    guess = np.floor(due).astype(np.int64)
    missing = position - int(guess.sum())
    order = np.argsort(guess - weights * position, kind="stable")
    if missing > 0:
        guess[order[:missing]] += 1
    elif missing < 0:
        guess[order[missing:]] -= 1
    return guess


def _run(weights: Array, starts: Array, begins: Array, steps: int) -> tuple[Array, Array]:
    """Run lanes side by side for some positions from their states [lanes, k]; the choices and the states behind."""
    served = starts.astype(np.float64)  # exact: far below 2**53
    chosen = np.empty((len(starts), steps), np.int64)
    rows = np.arange(len(starts))
    lag = np.empty_like(served)
    for step in range(steps):
        factor = np.maximum(begins + step, 1).astype(np.float64)
        np.multiply(weights, factor[:, None], out=lag)  # two roundings, as in the original: no fused multiply-add
        np.subtract(lag, served, out=lag)
        chosen[:, step] = best = lag.argmax(axis=1)
        served[rows, best] += 1.0
    return chosen, served.astype(np.int64)
