# SPDX-License-Identifier: Apache-2.0
"""A forward pass on a fixed input, stored with a checkpoint and done again after loading.

Hashes show that a checkpoint is what was written; this shows that what was loaded computes what was saved: at another
layout, with another engine or version, after a conversion. The input is the ids 0, 1, 2, ... of one sample; the figures
are the losses of eight parts of it, which can be had at any layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from libneox.errors import IntegrityError
from neox_train.objective import MicroBatch
from neox_train.steps import Engine

PARTS = 8
CLOSE = {"torch.float32": 1e-4, "torch.bfloat16": 2e-2, "torch.float16": 5e-3}  # relative; layouts round differently


def forward_figures(engine: Engine, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """What trainer.json holds of it, as `forward_check`; a collective."""
    vocabulary = engine.objective.model.config.vocab_size
    tokens = (torch.arange(length + 1, device=engine.device) % vocabulary)[None]
    parts = min(PARTS, length)
    part = torch.arange(length, device=engine.device) * parts // length
    losses = []
    engine.train(False)
    for index in range(parts):
        mask = (part == index).float()[None]
        losses.append(engine.evaluate([MicroBatch(tokens[:, :-1], tokens[:, 1:], mask)]).item())
    engine.train(True)
    return {"length": length, "dtype": str(dtype), "losses": losses}


def check_forward(engine: Engine, stored: dict[str, Any], dtype: torch.dtype, where: object) -> None:
    """Do the pass again and compare.

    Args:
        stored: what `forward_figures` gave.
        where: the checkpoint, for the message.
    Raises:
        IntegrityError: the model that was loaded computes something else.
    """
    found = forward_figures(engine, stored["length"], dtype)["losses"]
    close = max(CLOSE[stored["dtype"]], CLOSE[str(dtype)])
    for index, (now, then) in enumerate(zip(found, stored["losses"], strict=True)):
        if not math.isclose(now, then, rel_tol=close, abs_tol=close):
            raise IntegrityError(
                f"{where}: part {index + 1} of the fixed input has a loss of {now:.6g} in the model as loaded, it had "
                f"{then:.6g} when it was saved; if the model was changed on purpose, set "
                "checkpoint_validation_with_forward_pass: false"
            )
