# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the documents of an evaluation: who they are, and gathering their results.

Messages are JSON in byte tensors over gloo; no pickled object crosses a socket. What is gathered are metrics and
samples, small beside the work.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from libneox.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class Ranks:
    """The processes of this evaluation; one of them unless a launcher says otherwise."""

    def __init__(self) -> None:
        try:
            self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise UsageError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}") from error
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"RANK={self.rank} of WORLD_SIZE={self.world_size}; is the launcher set up?")
        if self.world_size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", rank=self.rank, world_size=self.world_size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The same tensor of every rank, stacked on a new first dimension, on the CPU."""
        import torch
        import torch.distributed as dist

        tensor = tensor.detach().cpu()
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in order of rank, on every rank. Tuples stay tuples."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(_packed(value)).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor(len(data))).tolist()
        parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(data)] = data
        dist.all_gather(parts, mine)
        texts = [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        return [_unpacked(json.loads(text)) for text in texts]

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def _packed(value: Any) -> Any:
    """JSON that remembers tuples and keys that are no strings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_packed(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_packed(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(item)] for key, item in value.items()]}
    if callable(getattr(value, "item", None)):  # a numpy or torch number
        return _packed(value.item())
    raise UsageError(
        f"a task's samples hold a {type(value).__name__}, which cannot be sent between processes; run it on one"
    )


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_unpacked(item) for item in value["tuple"])
        return {_unpacked(key): _unpacked(item) for key, item in value["dict"]}
    return value
