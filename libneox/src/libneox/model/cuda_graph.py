# SPDX-License-Identifier: Apache-2.0
"""Work on a GPU recorded once and replayed: to launch kernels one by one can take longer than they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 2  # libraries allocate and choose in the first runs, which a recording cannot


def record(work: Callable[[], Tensor], undo: Callable[[], object]) -> Callable[[], Tensor]:
    """Record `work` on the current device; calling the result does it again, on the same memory.

    Args:
        work: always does the same with the same tensors; does not look at any from the host.
        undo: takes back what `work` did, each time it ran to warm up or was recorded.
    Returns:
        What replays it; gives the tensor that `work` gave, overwritten by the next replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
            undo()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    undo()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
