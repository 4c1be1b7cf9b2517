# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the documents of an evaluation: who they are, and gathering their results.

Any launcher that `libneox.parallel.launch` knows may have started them. Messages are JSON in byte tensors over gloo; no
pickled object crosses a socket. What is gathered are metrics and samples, small beside the work.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from libneox.errors import PeerLost, UsageError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE_S = 7 * 86400.0  # for a process whose documents are longer than ours; one that ended is noticed at once


class Ranks:
    """The processes of this evaluation; one of them unless a launcher says otherwise.

    Raises:
        UsageError: the launcher's variables contradict each other.
        PeerLost: the others do not come.
    """

    def __init__(self) -> None:
        from libneox.parallel.launch import discover

        launch = discover(os.environ)
        self.rank, self.world_size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self._group: Any = None
        if self.world_size > 1:
            from libneox.parallel.group import Group

            self._group = Group(launch, timeout_s=PATIENCE_S)
            self._group.start_collectives("gloo")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The same tensor of every rank, stacked on a new first dimension, on the CPU."""
        import torch
        import torch.distributed as dist

        tensor = tensor.detach().cpu()
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _all_there():
            dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in order of rank, on every rank. Tuples stay tuples."""
        import torch

        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(_packed(value)).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor(len(data))).tolist()
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(data)] = data
        texts = [part[:size].numpy().tobytes() for part, size in zip(self.all_gather(mine), sizes, strict=True)]
        return [_unpacked(json.loads(text)) for text in texts]

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            import torch.distributed as dist

            with _all_there():
                dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: connection closed by peer
        raise PeerLost("another process of this evaluation ended; see its own error") from error


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
