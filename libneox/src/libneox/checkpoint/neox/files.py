# SPDX-License-Identifier: Apache-2.0
"""Open the files of a GPT-NeoX checkpoint: what each holds, whatever the layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libneox.checkpoint.lazy import LazyTensor
from libneox.checkpoint.neox.torchfile import TorchFile
from libneox.errors import DataError
from libneox.legacy import LAYER_FILE, RANK_FILE

SEQUENTIAL_KEY = re.compile(r"(?:module\.)?sequential\.(\d+)\.(.+)")

Shards = Mapping[tuple[int, str], tuple[LazyTensor, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class LegacyFiles:
    """A checkpoint of the original, opened. `shards` holds the pieces of (list index, name), one per TP rank."""

    directory: Path
    layout: str  # sequential or pipeline
    tensor_parallel: int
    shards: Shards
    states: tuple[Path, ...]  # mp_rank files, in order; the slim release of the 20B has none
    num_layers: int

    def state(self, rank: int = 0) -> dict[str, Any]:
        """The bookkeeping of one mp_rank file (iteration, schedule, optimizer...); empty if there is none."""
        if not self.states:
            return {}
        state = TorchFile(self.states[rank]).read()
        if not isinstance(state, dict):
            raise DataError(f"{self.states[rank]}: not a dictionary of training state")
        return state


def _listing(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def open_files(step: Path) -> LegacyFiles:
    """Open a step directory; reads the pickles, no tensor data.

    Raises:
        DataError: pieces are missing or ranks disagree.
        UnsafeInput: a file asks for code.
    """
    layers = {path: match for path in _listing(step) if (match := LAYER_FILE.fullmatch(path.name))}
    states = tuple(path for path in _listing(step) if RANK_FILE.fullmatch(path.name))
    pieces: dict[tuple[int, str], dict[int, LazyTensor]] = {}
    if layers:
        for path, match in layers.items():
            for name, tensor in _tensors(path, TorchFile(path).read()).items():
                pieces.setdefault((int(match[1]), name), {})[int(match[2])] = tensor
    else:
        for rank, path in enumerate(states):
            state = TorchFile(path).read()
            module = state.get("module") if isinstance(state, dict) else None
            if not isinstance(module, dict):
                raise DataError(f"{path}: no weights in it, and no layer_* files beside it")
            for name, tensor in _tensors(path, module).items():
                if not (match := SEQUENTIAL_KEY.fullmatch(name)):
                    raise DataError(f"{path}: unknown tensor {name}")
                pieces.setdefault((int(match[1]), match[2]), {})[rank] = tensor
    ranks = 1 + max((rank for by_rank in pieces.values() for rank in by_rank), default=0)
    blocks = {index for index, name in pieces if name.startswith("attention.")}
    if blocks != set(range(2, 2 + len(blocks))):
        lost = sorted(set(range(2, max(blocks, default=2) + 1)) - blocks)
        raise DataError(f"{step}: the files of layers {lost} are missing")
    return LegacyFiles(
        directory=step,
        layout="pipeline" if layers else "sequential",
        tensor_parallel=ranks,
        shards={key: _all_ranks(step, key, by_rank, ranks) for key, by_rank in pieces.items()},
        states=states,
        num_layers=len(blocks),
    )


def _tensors(path: Path, module: Any) -> dict[str, LazyTensor]:
    if not isinstance(module, dict):
        raise DataError(f"{path}: not a dictionary of tensors")
    return {name: tensor for name, tensor in module.items() if isinstance(tensor, LazyTensor)}


def _all_ranks(
    step: Path, key: tuple[int, str], by_rank: Mapping[int, LazyTensor], ranks: int
) -> tuple[LazyTensor, ...]:
    if missing := [rank for rank in range(ranks) if rank not in by_rank]:
        raise DataError(f"{step}: layer {key[0]}, {key[1]}: the pieces of tensor-parallel ranks {missing} are missing")
    return tuple(by_rank[rank] for rank in range(ranks))
