# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the number of optimiser steps done.

Formulas of GPT-NeoX's AnnealingLR with two corrections: past its horizon a schedule stays where it ended (cosine
climbed again), and a warm-up shorter than one step does not overshoot the peak.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig

Style = Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Warm-up, then a decay from `lr` towards `min_lr` until step `horizon`."""

    style: Style
    lr: float  # peak
    min_lr: float
    warmup: float  # steps, not necessarily whole
    horizon: int  # steps
    wsd_decay_fraction: float = 0.1  # wsd: share of the horizon that the final decay takes
    wsd_decay_style: Literal["linear", "cosine", "sqrt"] = "linear"

    def lr_at(self, done: int) -> float:
        """Learning rate of the step after `done` finished optimiser steps (skipped steps do not count).

        The first two steps of a warm-up of W steps use lr / W both, as in GPT-NeoX.
        """
        if self.warmup > 0 and done <= self.warmup:
            return max(min(self.lr * max(1, done) / self.warmup, self.lr), self.min_lr)
        return max(self._decayed(min(done, self.horizon)), self.min_lr)

    def _decayed(self, k: float) -> float:
        span = self.horizon - self.warmup
        past = min(1.0, (k - self.warmup) / span) if span > 0 else 1.0  # share of the decay that is over
        if self.style == "linear":
            return self.lr * (1 - past)
        if self.style == "cosine":
            return self.min_lr + (self.lr - self.min_lr) / 2 * (1 + math.cos(math.pi * past))
        if self.style == "exponential":
            return self.lr * math.exp(-0.693 * past)
        if self.style == "inverse_sqrt":
            knee = max(1.0, self.warmup)
            return self.lr * math.sqrt(knee / max(knee, k))
        if self.style == "wsd":
            return self._stable_then_decayed(k)
        return self.lr

    def _stable_then_decayed(self, k: float) -> float:
        """lr until the last `wsd_decay_fraction` of the horizon, then down to min_lr (Hu et al. 2024, MiniCPM)."""
        length = self.horizon * self.wsd_decay_fraction
        past = min(1.0, max(0.0, (k - (self.horizon - length)) / length)) if length > 0 else 1.0
        if self.wsd_decay_style == "cosine":
            left = (1 + math.cos(math.pi * past)) / 2
        elif self.wsd_decay_style == "sqrt":
            left = 1 - math.sqrt(past)
        else:
            left = 1 - past
        return self.min_lr + (self.lr - self.min_lr) * left

    def describe(self) -> str:
        """One line for people: `cosine from 0.0006 to 6e-05 over 143,000 steps, 1,430 of them warm-up`."""
        if self.style == "constant":
            shape = f"constant {self.lr:g}"
        else:
            shape = f"{self.style} from {self.lr:g} to {self.lr_at(self.horizon):g}"
        return f"{shape} over {self.horizon:,} steps, {self.warmup:,.0f} of them warm-up"


def schedule_of(config: NeoxConfig, train_iters: int | None = None) -> Schedule:
    """The schedule of a configuration; the horizon is lr_decay_iters, else lr_decay_fraction, else the run's length.

    Raises:
        UsageError: the length of the run is needed and unknown.
    """
    keys = config.schedule
    steps = train_iters if train_iters is not None else config.train.train_iters
    if keys.lr_decay_iters is not None:
        horizon = keys.lr_decay_iters
    elif steps is None:
        raise UsageError("train_iters: is unknown and the learning rate needs a horizon; set it or lr_decay_iters")
    elif keys.lr_decay_fraction is not None:
        horizon = math.floor(steps * keys.lr_decay_fraction)
    else:
        horizon = steps
    return Schedule(
        style=keys.lr_decay_style,
        lr=config.lr,
        min_lr=keys.min_lr,
        warmup=keys.warmup * horizon,
        horizon=horizon,
        wsd_decay_fraction=keys.wsd_decay_fraction,
        wsd_decay_style=keys.wsd_decay_style,
    )
