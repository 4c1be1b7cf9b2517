# SPDX-License-Identifier: Apache-2.0
"""Numbers that a device has yet to compute, read without making it wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Number = Tensor | float
Read = Callable[[], list[float]]


def later(numbers: Sequence[Number], device: torch.device) -> Read:
    """Have numbers sent to the host as soon as they are there.

    Args:
        numbers: scalars; those that are tensors may still be in the queue of `device`.
    Returns:
        What waits for them and gives them; it does not wait for anything queued after this call.
    """
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if device.type != "cuda" or not tensors:
        return lambda: [float(number) for number in numbers]
    host = torch.empty(len(tensors), dtype=torch.float64, pin_memory=True)
    host.copy_(torch.stack([tensor.double() for tensor in tensors]), non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def read() -> list[float]:
        there.synchronize()
        come = iter(host.tolist())
        return [next(come) if isinstance(number, Tensor) else float(number) for number in numbers]

    return read
