# SPDX-License-Identifier: Apache-2.0
"""How fast decoding could be: it has to read every weight once a step, and memory is only so fast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from libneox.model_config import ModelConfig

PROBE_BYTES = 512 << 20  # well beyond any cache
REPEATS = 3


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the parameters that one step reads whole: all but embedding tables that only a row is taken from."""
    looked_up = {"pos_embed.weight"} | (set() if config.tie_embeddings else {"embed.weight"})
    shapes = (shape for name, shape in config.parameter_shapes().items() if name not in looked_up)
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that can be read: the best of a sum, a maximum and (CPU) a packed matrix-vector product.

    Takes half a GB and some tenths of a second. Uses torch's current number of threads.
    """
    values = torch.ones(PROBE_BYTES // 4, device=device)
    probes: list[Callable[[], object]] = [values.sum, values.max]
    if device.type == "cpu":
        from libneox.generation.prepack import PackedLinear

        matrix = PackedLinear(values.view(-1, 4096), None)
        row = torch.ones(1, 4096)
        probes.append(lambda: matrix(row))
    with torch.inference_mode():
        return PROBE_BYTES / min(_seconds(probe, device) for probe in probes)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = math.inf
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
