# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: up to about which batch size larger batches still save steps.

B_simple = tr(S) / |G|^2, S being the covariance of one sample's gradient and G its mean (McCandlish et al. 2018, arXiv
1812.06162, appendix A.1). With g_b the gradient of a batch of b samples, E|g_b|^2 = |G|^2 + tr(S) / b, so two batch
sizes give both: b is the global batch and the larger one the n batches of n steps, whose gradients are averaged.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)        tr(S) = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

The weights move a little within those n steps; that shows as noise, so the figure is an upper bound while the learning
rate is high.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from libneox.parallel.group import Group
from neox_train.observers import Observer
from neox_train.steps import Engine

DECAY = 0.99  # of the averages over estimates, as in GPT-NeoX


class NoiseScale(Observer):
    """`noise_scale` in metrics.jsonl, in samples, every `batches` steps; null where |G|^2 is not estimated positive.

    Every tensor's sum over the steps is held by one rank, so all of them together keep one float32 copy of the model.
    The averages begin anew when a run is started again; a step whose gradient is not finite begins its n steps anew.
    """

    within = True

    def __init__(self, group: Group, batch: int, batches: int, *, on_host: bool = False):
        """`batch` is the global batch in samples."""
        self._group, self._batch, self._batches, self._on_host = group, batch, batches, on_host
        self._sums: dict[str, Tensor] = {}
        self._count, self._small = 0, 0.0
        self._square = self._noise = 0.0  # running averages; their common bias falls out of the ratio

    def before_update(self, engine: Engine) -> dict[str, Any]:
        """Add the gradient of this step."""
        small = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, name in enumerate(engine.names()):
            gradient = engine.gradient(name)
            if index % self._group.world_size != self._group.rank:
                continue
            small += gradient.norm().double() ** 2
            kept = gradient.detach().to("cpu" if self._on_host else gradient.device, torch.float32, copy=True)
            self._sums[name] = kept if self._count == 0 else self._sums[name].add_(kept)
        (square,) = self._group.sum([small.item()], engine.device)
        if square - square != 0:
            self._count, self._small = 0, 0.0
            return {}
        self._count, self._small = self._count + 1, self._small + square
        return {} if self._count < self._batches else {"noise_scale": self._estimate(engine)}

    def _estimate(self, engine: Engine) -> float | None:
        n, b = self._batches, self._batch
        own = sum((total.norm().item() / n) ** 2 for total in self._sums.values())
        (large,) = self._group.sum([own], engine.device)
        small = self._small / n
        self._count, self._small = 0, 0.0
        self._square = DECAY * self._square + (1 - DECAY) * (n * large - small) / (n - 1)
        self._noise = DECAY * self._noise + (1 - DECAY) * (small - large) / (1 / b - 1 / (n * b))
        return self._noise / self._square if self._square > 0 else None
