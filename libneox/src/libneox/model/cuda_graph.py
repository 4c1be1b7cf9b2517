# SPDX-License-Identifier: Apache-2.0
"""Work on a GPU recorded once and replayed: to launch kernels one by one can take longer than they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2  # libraries allocate and choose in the first runs, which a recording cannot


def record(
    work: Callable[[], Tensor], undo: Callable[[], object], device: torch.device, pool: Any = None
) -> Callable[[], Tensor]:
    """Record `work` on a device; calling the result does it again, on the same memory.

    Args:
        work: always does the same with the same tensors; does not look at any from the host.
        undo: takes back what `work` did, each time it ran to warm up or was recorded.
        pool: what `torch.cuda.graph_pool_handle` gave, for recordings whose results are used before another is
            replayed: they share the memory they work in.
    Returns:
        What replays it; gives the tensor that `work` gave, overwritten by the next replay.
    """
    with torch.cuda.device(device):
        side, drawn = torch.cuda.Stream(), torch.cuda.get_rng_state(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
                undo()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(drawn, device)  # the first replay draws the numbers that the work itself would
        graph = torch.cuda.CUDAGraph()
        # a thread that makes the next batches goes on meanwhile, and may pin memory
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            result = work()
        undo()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
