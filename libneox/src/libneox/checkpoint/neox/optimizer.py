# SPDX-License-Identifier: Apache-2.0
"""Adam's moments and the float32 masters of a GPT-NeoX checkpoint, by logical name.

Two layouts exist. Without ZeRO and in float32, each mp_rank file holds a torch optimizer: states numbered over the
parameters of its stage, decayed ones first. With ZeRO-1 or bf16, the files [bf16_]zero_pp_rank_D_mp_rank_M hold, per
group of parameters, one flat float32 tensor and flat moments, cut over the data-parallel ranks D, with a map from
names to places.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from libneox.checkpoint.lazy import LazyTensor, LazyTensors, concatenate
from libneox.checkpoint.neox.merge import merge
from libneox.checkpoint.neox.names import BUFFERS
from libneox.checkpoint.neox.reader import LegacyCheckpoint
from libneox.checkpoint.neox.torchfile import Record, TorchFile
from libneox.errors import DataError

ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Key = tuple[int, str]
Pieces = dict[str, dict[Key, dict[int, LazyTensor]]]  # kind -> (list index, name) -> TP rank -> piece


@dataclasses.dataclass(frozen=True, slots=True)
class LegacyState:
    """What a run needs to go on: `tensors` are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, float32."""

    tensors: LazyTensors
    trainer: dict[str, Any]
    samples: int
    tokens: int


class _Unreadable(Exception):
    """The states are stored in a way that cannot be mapped to parameters."""


def read_state(checkpoint: LegacyCheckpoint) -> LegacyState | str:
    """The training state of a checkpoint, or a sentence why there is none to be had.

    Only Adam's is read. RNG states are not: the random numbers of the two programs differ anyway.

    Raises:
        DataError, UnsafeInput: a file is damaged or hostile.
    """
    files = checkpoint.files
    if not files.states:
        return "the checkpoint holds weights only"
    first = files.state()
    kind = checkpoint.neox.optimizer_type
    if kind not in ("adam", "adamw", "cpu_adam", "cpu_torch_adam"):
        return f"states of {kind} are not imported"
    zero = _zero_files(files.directory)
    try:
        pieces, steps, scaler = _read_zero(zero, checkpoint) if zero else _read_plain(checkpoint)
        tensors = _merged(pieces, checkpoint)
    except _Unreadable as problem:
        return str(problem)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:  # no other shape is known here
        return f"the optimizer files are of an unknown form ({type(problem).__name__}: {problem})"
    step = checkpoint.iteration or 0
    samples = int(first.get("global_samples") or 0)
    optimizer: dict[str, Any] = {"type": "adam", "step": max(steps, default=0)}
    if scaler:
        optimizer["loss_scaler"] = scaler
    skipped = int(first.get("skipped_steps") or 0)
    tokens = samples * checkpoint.config.seq_length
    trainer = {
        "step": step,
        "samples": samples,
        "tokens": tokens,
        "updates": step - skipped,
        "epochs": {},
        "rng_base": 0,
        "optimizer": optimizer,
    }
    return LegacyState(LazyTensors(tensors), trainer, samples, tokens)


def _merged(pieces: Pieces, checkpoint: LegacyCheckpoint) -> dict[str, LazyTensor]:
    ranks = checkpoint.files.tensor_parallel
    found = {}
    for kind in ("master", *MOMENTS):
        shards = {}
        for key, by_rank in pieces[kind].items():
            if set(by_rank) != set(range(ranks)):
                raise _Unreadable(f"the optimizer states of some tensor-parallel ranks are missing ({key[1]})")
            shards[key] = tuple(by_rank[rank] for rank in range(ranks))
        try:
            logical = merge(shards, checkpoint.config, average_row_bias=kind != "master")
        except DataError as error:
            raise _Unreadable(f"the optimizer states do not cover every parameter ({error})") from error
        for name, tensor in logical.items():
            if tensor.shape != checkpoint.tensors.spec(name).shape:
                raise _Unreadable(f"the optimizer state of {name} has another shape than the parameter")
            found[f"{kind}/{name}"] = tensor
    return found


# --- without ZeRO ---------------------------------------------------------------------------------------------------


def _read_plain(checkpoint: LegacyCheckpoint) -> tuple[Pieces, list[int], None]:
    """States of a torch optimizer. Its `step` counts on the last parameter of each group only, so the largest holds."""
    files = checkpoint.files
    pieces: Pieces = {kind: {} for kind in ("master", *MOMENTS)}
    steps: list[int] = []
    ranks = files.tensor_parallel
    left = {rank: _parameters(checkpoint, rank) for rank in range(ranks)}
    for number in range(len(files.states)):
        optimizer = files.state(number).get("optimizer")
        if not isinstance(optimizer, dict) or not optimizer.get("state"):
            raise _Unreadable("the optimizer has no states yet, or they are not in the checkpoint")
        rank = number % ranks  # files count pipeline stages first, tensor-parallel ranks within
        groups = [group["params"] for group in optimizer["param_groups"]]
        mine, left[rank] = _take_stage(left[rank], sum(map(len, groups)))
        for index, (key, weight) in zip(
            [i for group in groups for i in group], _in_groups(mine, len(groups)), strict=True
        ):
            state = optimizer["state"].get(index, {})
            for kind in MOMENTS:
                moment = state.get(kind)
                if not isinstance(moment, LazyTensor) or moment.shape != weight.shape:
                    raise _Unreadable(f"{kind} of parameter {index} does not fit {key[1]}")
                pieces[kind].setdefault(key, {})[rank] = moment
            pieces["master"].setdefault(key, {})[rank] = weight
            steps.append(_number(state.get("step")))
    if any(left.values()):
        raise _Unreadable("the optimizer states do not cover every parameter")
    return pieces, steps, None


def _parameters(checkpoint: LegacyCheckpoint, rank: int) -> list[tuple[Key, LazyTensor]]:
    """A rank's parameters in module order: files keep the order within a layer, layers go by their index."""
    keys = sorted(checkpoint.files.shards, key=lambda key: key[0])
    found, shared = [], set()
    for key in keys:
        if key[1].endswith(BUFFERS) or key[1] in shared:
            continue
        if key[1] == "attention.rpe.weight":
            shared.add(key[1])  # one module in every layer, one parameter
        found.append((key, checkpoint.files.shards[key][rank]))
    return found


def _take_stage(left: list[tuple[Key, LazyTensor]], count: int) -> tuple[list[Any], list[Any]]:
    """The next whole layers with `count` parameters together."""
    mine, rest = left[:count], left[count:]
    if len(mine) < count or (mine and rest and mine[-1][0][0] == rest[0][0][0]):
        raise _Unreadable("the optimizer's parameters do not match the layers (tied embeddings over stages?)")
    return mine, rest


def _in_groups(parameters: Sequence[tuple[Key, LazyTensor]], groups: int) -> list[tuple[Key, LazyTensor]]:
    """In the order of the optimizer: decayed ones first, then biases and norms; one group if nothing decays."""
    if groups == 1:
        return list(parameters)
    plain = [item for item in parameters if not _undecayed(item[0][1])]
    return plain + [item for item in parameters if _undecayed(item[0][1])]


def _undecayed(name: str) -> bool:
    return name.endswith(".bias") or "norm" in name


# --- ZeRO-1 and bf16 ------------------------------------------------------------------------------------------------


def _zero_files(step: Path) -> dict[int, dict[int, Path]]:
    """mp_rank -> data-parallel rank -> file."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(step.iterdir()):
        if match := ZERO_FILE.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    return found


def _read_zero(
    files: Mapping[int, Mapping[int, Path]], checkpoint: LegacyCheckpoint
) -> tuple[Pieces, list[int], dict[str, Any] | None]:
    pieces: Pieces = {kind: {} for kind in ("master", *MOMENTS)}
    steps: list[int] = []
    scaler = None
    for number, by_rank in files.items():
        if sorted(by_rank) != list(range(len(by_rank))):
            raise _Unreadable("optimizer files of some data-parallel ranks are missing")
        fragments: dict[str, dict[Key, list[LazyTensor]]] = {kind: {} for kind in pieces}
        for rank in sorted(by_rank):
            state = TorchFile(by_rank[rank]).read().get("optimizer_state_dict")
            if not isinstance(state, dict) or "param_slice_mappings" not in state:
                raise _Unreadable("optimizer files without a map of names (DeepSpeed before 0.8)")
            for kind, key, piece in _fragments(state, steps):
                fragments[kind].setdefault(key, []).append(piece)
            scaler = scaler or _scaler(state)
        tensor_rank = number % checkpoint.files.tensor_parallel
        for kind, by_key in fragments.items():
            for key, parts in by_key.items():
                shape = _shape_of(checkpoint, key, tensor_rank)
                flat = concatenate(parts)
                if flat.nbytes != LazyTensor(shape, flat.dtype, flat.load).nbytes:
                    raise _Unreadable(f"the optimizer state of {key[1]} is incomplete")
                whole = flat.map(lambda tensor, shape=shape: tensor.reshape(shape), shape)  # type: ignore[misc]
                pieces[kind].setdefault(key, {})[tensor_rank] = whole
    return pieces, steps, scaler


def _fragments(state: dict[str, Any], steps: list[int]) -> Iterator[tuple[str, Key, LazyTensor]]:
    """(kind, key, flat piece) of one data-parallel rank."""
    base = state["base_optimizer_state"]["state"]
    masters = state["single_partition_of_fp32_groups"]
    for group, names in enumerate(state["param_slice_mappings"]):
        flats = {"master": masters[group], **{kind: base[group].get(kind) for kind in MOMENTS}}
        if any(not isinstance(flat, LazyTensor) for flat in flats.values()):
            raise _Unreadable("the optimizer has no states yet, or they are not Adam's")
        steps.append(_number(base[group].get("step")))
        for name, address in names.items():
            place = address.state if isinstance(address, Record) else None
            if not isinstance(place, dict):
                raise _Unreadable("the map of names in the optimizer files is of an unknown form")
            start, stop = place["start"], place["start"] + place["numel"]
            if not 0 <= start <= stop <= min(flat.shape[0] for flat in flats.values()):
                raise DataError(f"the optimizer's map puts {name} outside of its partition; damaged")
            index, _, own = name.removeprefix("module.").removeprefix("sequential.").partition(".")
            for kind, flat in flats.items():
                yield kind, (int(index), own), flat.rows(start, stop)


def _shape_of(checkpoint: LegacyCheckpoint, key: Key, rank: int) -> tuple[int, ...]:
    shards = checkpoint.files.shards
    if key not in shards:
        raise _Unreadable(f"the optimizer files speak of {key[1]} in layer {key[0]}, the weights do not")
    return shards[key][rank].shape


def _scaler(state: dict[str, Any]) -> dict[str, Any] | None:
    """Dynamic loss scaling of fp16."""
    scaler = state.get("loss_scaler")
    found = scaler.state if isinstance(scaler, Record) and isinstance(scaler.state, dict) else {}
    if not state.get("dynamic_loss_scale") or "cur_scale" not in found:
        return None
    return {name: found[name] for name in SCALER_FIELDS if name in found}


def _number(value: Any) -> int:
    if isinstance(value, LazyTensor):
        value = value.load().item()
    return int(value) if isinstance(value, int | float) else 0
