# SPDX-License-Identifier: Apache-2.0
"""Tensors that are described now and read later, one at a time.

A converter plans with shapes and dtypes alone, and streams: whatever the size of the model, no more than the tensor in
work (and what it is made of) is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from libneox.errors import DataError

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class LazyTensor:
    """Shape and dtype of a tensor, and how to get it. `load` may return a view of a mapped file: do not write to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when loaded."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> LazyTensor:
        """The tensor after `function`, which keeps the dtype and gives `shape` (by default the same)."""
        return LazyTensor(tuple(shape or self.shape), self.dtype, lambda: function(self.load()))

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The tensor in another dtype (rounded to nearest even, as torch does)."""
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows start..stop-1 of dimension 0."""
        return LazyTensor((stop - start, *self.shape[1:]), self.dtype, lambda: self.load()[start:stop])

    def transposed(self) -> LazyTensor:
        """A matrix, transposed."""
        return self.map(lambda tensor: tensor.t().contiguous(), self.shape[::-1])


def concatenate(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """One tensor after the other along `dim`."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return LazyTensor(tuple(shape), parts[0].dtype, lambda: torch.cat([part.load() for part in parts], dim))


def constant(shape: Sequence[int], dtype: torch.dtype, value: float) -> LazyTensor:
    """A tensor of one value."""
    return LazyTensor(tuple(shape), dtype, lambda: torch.full(tuple(shape), value, dtype=dtype))


class LazyTensors(Mapping[str, Tensor]):
    """Named lazy tensors. Indexing loads one; nothing is kept, so take each only once."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        spec = self._tensors[name]
        tensor = spec.load()
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise AssertionError(f"{name} was announced as {spec.shape} {spec.dtype} and loaded as {found}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def spec(self, name: str) -> LazyTensor:
        """The description of one tensor, without reading it."""
        return self._tensors[name]

    def specs(self) -> dict[str, LazyTensor]:
        """All descriptions by name."""
        return dict(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


def check_shapes(where: str, tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a checkpoint holds with what its configuration calls for, before anything is written.

    Raises:
        DataError: tensors are missing, left over, or of another shape; names the first of each kind.
    """
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"{len(missing)} missing, the first is {missing[0]}")
    if extra := [name for name in tensors if name not in shapes]:
        problems.append(f"{len(extra)} unexpected, the first is {extra[0]}")
    wrong = [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if wrong:
        name = wrong[0]
        problems.append(
            f"{len(wrong)} of another shape, the first is {name}: {tensors[name].shape}, not {shapes[name]}"
        )
    if problems:
        raise DataError(f"{where}: tensors do not fit the configuration: {'; '.join(problems)}")


def group_rows(tensor: Tensor, sizes: Sequence[int], groups: int) -> Tensor:
    """Rows that stand in blocks of `sizes` ([Q|K|V], [up|gate]), dealt out to `groups` equal groups.

    Each group then holds its share of every block, in the same order. This one rearrangement is GPT-NeoX's and
    BLOOM's per-head layout (groups = heads), Falcon's (groups = key/value heads), and what tensor-parallel ranks hold
    (groups = ranks).
    """
    if groups == 1:
        return tensor
    blocks = torch.split(tensor, list(sizes))
    dealt = [block.unflatten(0, (groups, block.shape[0] // groups)) for block in blocks]
    return torch.cat(dealt, 1).flatten(0, 1)


def ungroup_rows(tensor: Tensor, sizes: Sequence[int], groups: int) -> Tensor:
    """The inverse of `group_rows`."""
    if groups == 1:
        return tensor
    dealt = tensor.unflatten(0, (groups, sum(sizes) // groups)).split([size // groups for size in sizes], 1)
    return torch.cat([part.flatten(0, 1) for part in dealt])
