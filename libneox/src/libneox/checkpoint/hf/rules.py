# SPDX-License-Identifier: Apache-2.0
"""How one tensor of ours corresponds to tensors of a Hugging Face checkpoint: a few kinds of rule, each both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from libneox.checkpoint.lazy import LazyTensor, concatenate, constant, group_rows, ungroup_rows
from libneox.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """The same tensor under another name."""

    ours: str
    theirs: str

    def export(self, ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Their tensors."""
        return {self.theirs: ours[self.ours]}

    def load(self, theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our tensor; KeyError with their name if it is missing."""
        return {self.ours: theirs[self.theirs]}


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose:
    """A matrix stored [in, out] (GPT-2's Conv1D)."""

    ours: str
    theirs: str

    def export(self, ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Their tensors."""
        return {self.theirs: ours[self.ours].transposed()}

    def load(self, theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our tensor."""
        return {self.ours: theirs[self.theirs].transposed()}


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Blocks of rows of one tensor of ours are tensors of their own."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]

    def export(self, ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Their tensors."""
        found, start = {}, 0
        for name, size in zip(self.theirs, self.sizes, strict=True):
            found[name] = ours[self.ours].rows(start, start + size)
            start += size
        return found

    def load(self, theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our tensor."""
        return {self.ours: concatenate([theirs[name] for name in self.theirs])}


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Rows in blocks with us ([Q|K|V]), dealt out to groups with them ([q|k|v] per head)."""

    ours: str
    theirs: str
    sizes: tuple[int, ...]
    groups: int

    def export(self, ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Their tensors."""
        return {self.theirs: ours[self.ours].map(lambda tensor: group_rows(tensor, self.sizes, self.groups))}

    def load(self, theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our tensor."""
        tensor = theirs[self.theirs]
        if tensor.shape[0] != sum(self.sizes):  # a wrong size is reported with the others
            return {self.ours: tensor}
        return {self.ours: tensor.map(lambda value: ungroup_rows(value, self.sizes, self.groups))}


@dataclasses.dataclass(frozen=True, slots=True)
class Zeros:
    """A bias they have and we lack: written as zeros, and nothing but zeros is accepted."""

    theirs: str
    shape: tuple[int, ...]

    def export(self, ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Their tensors."""
        return {self.theirs: constant(self.shape, dtype, 0.0)}

    def load(self, theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Nothing; DataError if their values are not zero."""
        if self.theirs in theirs and bool(theirs[self.theirs].load().any()):
            raise DataError(
                f"{self.theirs} is not zero, and our model has no such bias; it cannot be converted exactly"
            )
        return {}


Rule = Copy | Transpose | Split | Group | Zeros


def their_names(rules: Iterable[Rule]) -> list[str]:
    """Every tensor name of theirs that the rules mention."""
    names: list[str] = []
    for rule in rules:
        names += rule.theirs if isinstance(rule, Split) else [rule.theirs]
    return names


def export_tensors(rules: Iterable[Rule], ours: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Their tensors by name, in the order of the rules. `dtype` is that of tensors made up."""
    return {name: tensor for rule in rules for name, tensor in rule.export(ours, dtype).items()}


def load_tensors(where: str, rules: Iterable[Rule], theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Our tensors by name.

    Raises:
        DataError: tensors of theirs are missing or cannot be represented.
    """
    found: dict[str, LazyTensor] = {}
    missing = []
    for rule in rules:
        try:
            found |= rule.load(theirs)
        except KeyError as error:
            missing.append(error.args[0])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if missing:
        raise DataError(f"{where}: {len(missing)} tensors missing, the first is {missing[0]}")
    return found
