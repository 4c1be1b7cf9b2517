# SPDX-License-Identifier: Apache-2.0
"""What to say of a loss or a gradient that is not a number: where it was, and whose fault it may be."""

from __future__ import annotations

import math

import torch

from libneox.parallel.group import Group
from neox_train.steps import Engine


def loss(group: Group, engine: Engine, step: int, samples: range, mean: float, own: float) -> str:
    """Whose loss it was, on which samples, and whether a weight was wrong before; a collective.

    Args:
        mean, own: the loss of all ranks and of this one.
    """
    reports = group.gather([own, first_bad(engine)])
    ranks = [rank for rank, (value, _) in enumerate(reports) if not math.isfinite(value)]
    bad = next((f"{name} of rank {rank} is not finite" for rank, (_, name) in enumerate(reports) if name), "")
    return (
        f"step {step}: the loss is {mean} (rank {', '.join(map(str, ranks))}, samples {samples[0]} to {samples[-1]}; "
        f"{bad or 'all weights are finite'}); nothing of this step is saved, lower the learning rate"
    )


def gradient(engine: Engine, step: int, samples: range, mean_loss: float) -> str:
    """In which tensor it was, on which samples; the engine has the gradient."""
    names = engine.names()
    bad = next((name for name in names if not bool(torch.isfinite(engine.gradient(name)).all())), "")
    where = f"the first is that of {bad}" if bad else "computed again it is: suspect the memory"
    return (
        f"step {step}: the gradient is not finite (loss {mean_loss:.4f}, samples {samples[0]} to {samples[-1]}; "
        f"{where}); nothing of this step is saved, lower the learning rate"
    )


def first_bad(engine: Engine) -> str:
    """The first of this rank's weights, in the model's order, that is not finite; an empty text if all are."""
    for name, parameter in engine.objective.model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return name
    return ""
