# SPDX-License-Identifier: Apache-2.0
"""Adam with moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861) by bitsandbytes, and its checkpoints.

A moment is a code of 8 bits for each element, times the largest magnitude of each block of 256 elements; parameters
under 4096 elements keep float32. A checkpoint holds the moments in float32 under Adam's names, so that Adam's own
checkpoint can be gone on from, and the blocks' magnitudes beside them, which lead back to the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neox_train.states import States

BLOCK = 256
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
_SCALE = "_absmax"


def build_eight_bit(groups: list[dict[str, Any]], params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes over the groups."""
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(
        groups, lr=params["lr"], betas=tuple(params["betas"]), eps=float(params["eps"]), weight_decay=decay
    )
    return optimizer


class EightBitStates(States):
    """The moments as float32 tensors, and from those."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)
        self._found: dict[nn.Parameter, dict[str, Tensor]] = {}

    def of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """Both moments, and the magnitudes of their blocks where they are coded."""
        state, tensors = self.optimizer.state.get(parameter, {}), {}
        for name, number in _MOMENTS.items():
            if f"state{number}" not in state:
                continue
            moment = state[f"state{number}"]
            if moment.dtype == torch.uint8:
                scale = state[f"absmax{number}"]
                tensors[name + _SCALE] = scale
                moment = decoded(moment, state[f"qmap{number}"], scale)
            tensors[name] = moment
        return tensors

    def set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Keep one until `set_step`: the codes need both the moment and its magnitudes."""
        self._found.setdefault(parameter, {})[key] = value

    def set_step(self, step: int, device: torch.device) -> None:
        """Code what was kept."""
        places = [
            (parameter, group, at, index)
            for at, group in enumerate(self.optimizer.param_groups)
            for index, parameter in enumerate(group["params"])
        ]
        for parameter, group, at, index in places:
            self.optimizer.init_state(group, parameter, at, index)  # type: ignore[attr-defined]
            state, found = self.optimizer.state[parameter], self._found.pop(parameter, {})
            state["step"] = step
            for name, number in _MOMENTS.items():
                if name not in found:
                    continue
                moment = found[name]
                if state[f"state{number}"].dtype == torch.uint8:
                    scale = found.get(name + _SCALE)
                    scale = largest(moment) if scale is None else scale
                    state[f"absmax{number}"].copy_(scale)
                    moment = coded(moment, state[f"qmap{number}"], state[f"absmax{number}"])
                state[f"state{number}"].copy_(moment)


def _blocks(values: Tensor) -> Tensor:
    """A tensor as rows of BLOCK elements, the last one filled up with zeros."""
    flat = values.reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def largest(values: Tensor) -> Tensor:
    """Largest magnitude of each block, [blocks]."""
    return _blocks(values).abs().amax(1)


def decoded(codes: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes -> float32 of the same shape: table[code] * scale of the block."""
    values = _blocks(table[codes.long()]) * scale[:, None]
    return values.reshape(-1)[: codes.numel()].view(codes.shape)


def coded(values: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """float32 -> uint8 of the same shape: the nearest of the table (which rises) to value / scale of the block."""
    shares = _blocks(values) / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.reshape(-1)[: values.numel()].view(values.shape)
