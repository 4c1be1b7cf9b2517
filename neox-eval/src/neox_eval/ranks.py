# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the documents of an evaluation, or one model: who they are, and gathering their results.

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

    from libneox.parallel.shard import Shard

PATIENCE_S = 7 * 86400.0  # for a process whose documents are longer than ours; one that ended is noticed at once


class Ranks:
    """The processes of this evaluation; one of them unless a launcher says otherwise.

    With `tensor_parallel` N, neighbours in groups of N hold one model and go through the same documents in step.

    Attributes:
        rank, world_size: which share of the documents, of how many.
        is_first: this one of all processes writes results.
        tensor_parallel: N.
        leads: this one of those that hold a model together keeps its answers.
    Raises:
        UsageError: the launcher's variables contradict each other, or N does not divide the processes.
        PeerLost: the others do not come.
    """

    def __init__(self, tensor_parallel: int = 1) -> None:
        from libneox.parallel.launch import discover

        launch = discover(os.environ)
        if launch.world_size % tensor_parallel:
            raise UsageError(
                f"--tensor-parallel: {launch.world_size} processes cannot be cut into groups of {tensor_parallel}; "
                f"start a multiple, as with torchrun --nproc-per-node {tensor_parallel} -m neox_eval"
            )
        self.local_rank, self._all, self.tensor_parallel = launch.local_rank, launch.world_size, tensor_parallel
        self.rank, self.world_size = launch.rank // tensor_parallel, launch.world_size // tensor_parallel
        self.is_first, self.leads = launch.rank == 0, launch.rank % tensor_parallel == 0
        self._group: Any = None
        self._apart: Any = None  # processes that go through other documents; None: all do
        self._shard: Shard | None = None
        if self._all > 1:
            from libneox.parallel.group import Group

            self._group = Group(launch, timeout_s=PATIENCE_S)
            self._group.start_collectives("gloo")
            if tensor_parallel > 1:
                self._apart = self._connected("data", "gloo")

    def shard(self, device: str) -> Shard | None:
        """This process's part of a model on `device`; None if it holds all of one."""
        if self.tensor_parallel > 1 and self._shard is None:
            from libneox.parallel.shard import Shard

            group = self._connected("tensor", "nccl" if device.startswith("cuda") else "gloo")
            self._shard = Shard(self._group.rank % self.tensor_parallel, self.tensor_parallel, group)
        return self._shard

    def _connected(self, axis: str, backend: str) -> Any:
        """This process's group along an axis; every process makes all of them."""
        import torch.distributed as dist

        from libneox.parallel.mesh import Mesh

        mesh = Mesh(self._group.rank, data_size=self.world_size, tensor_size=self.tensor_parallel)
        groups = [(ranks, dist.new_group(ranks, backend=backend)) for ranks in mesh.members(axis)]
        return next(group for ranks, group in groups if mesh.rank in ranks)

    def told(self, value: Any) -> Any:
        """What the process that leads this one gave."""
        everybody = self._exchanged(value if self.leads else None, None, self._all)
        return everybody[self.rank * self.tensor_parallel]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The same tensor of every rank, stacked on a new first dimension, on the CPU."""
        return _gathered(tensor, self._apart, self.world_size)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in order of rank, on every rank. Tuples stay tuples."""
        return self._exchanged(value, self._apart, self.world_size)

    def first(self, value: Any) -> Any:
        """What the first of all processes gave."""
        return self._exchanged(value, None, self._all)[0]

    def _exchanged(self, value: Any, group: Any, size: int) -> list[Any]:
        import torch

        if size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(_packed(value)).encode()), dtype=torch.uint8)
        sizes = _gathered(torch.tensor(len(data)), group, size).tolist()
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(data)] = data
        texts = [part[:size].numpy().tobytes() for part, size in zip(_gathered(mine, group, size), sizes, strict=True)]
        return [_unpacked(json.loads(text)) for text in texts]

    def barrier(self) -> None:
        """Wait for all."""
        if self._all > 1:
            import torch.distributed as dist

            with _all_there():
                dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()


def _gathered(tensor: Tensor, group: Any, size: int) -> Tensor:
    import torch
    import torch.distributed as dist

    tensor = tensor.detach().cpu()
    if size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    with _all_there():
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


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
