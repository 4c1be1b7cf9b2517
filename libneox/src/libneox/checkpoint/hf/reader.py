# SPDX-License-Identifier: Apache-2.0
"""Open a Hugging Face model directory as logical tensors. config.json is plain JSON here, and no code of it runs."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from libneox.checkpoint.hf.families import FAMILIES
from libneox.checkpoint.hf.family import Family
from libneox.checkpoint.hf.rules import load_tensors, their_names
from libneox.checkpoint.lazy import LazyTensor, LazyTensors, check_shapes
from libneox.errors import DataError, InputMissing, UnsafeInput, UsageError
from libneox.model_config import ModelConfig

MAX_HEADER_BYTES = 32 << 20  # 100,000 tensors need about 12 MB
MAX_JSON_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"


class HfModel(LazyTensors):
    """The tensors of a Hugging Face directory under our logical names, loaded when indexed.

    Attributes:
        config: what the model is.
        family: how it was read.
        raw: its config.json.
        directory: where.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        config: ModelConfig,
        family: Family,
        raw: dict[str, Any],
        directory: Path,
    ):
        super().__init__(tensors)
        self.config, self.family, self.raw, self.directory = config, family, raw, directory


def open_hf(directory: str | Path) -> HfModel:
    """Open a model directory: config.json and safetensors, or files of torch.save (read without executing them).

    Raises:
        InputMissing: no config.json, no weights, or a shard the index names is not there.
        DataError: damaged files, tensors missing or left over, or a configuration we cannot represent exactly.
        UnsafeInput: a file name that leads out of the directory, or a pickle that asks for code.
        UsageError: a family we do not know.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    family = family_of(raw, directory)
    config = config_from_hf(raw, directory)
    stored = _prefixed(stored_tensors(directory), family)
    if config.num_layers > len(stored):  # before a table of all tensors is made for a number out of the blue
        raise DataError(
            f"{directory}: config.json says {config.num_layers} layers, the files hold {len(stored)} tensors"
        )
    rules = family.rules(config)
    _check_names(directory, stored, their_names(rules), config, family)
    tensors = load_tensors(str(directory), rules, stored)
    check_shapes(str(directory), tensors, config.parameter_shapes())
    return HfModel({name: tensors[name] for name in config.parameter_shapes()}, config, family, raw, directory)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size.

    Raises:
        InputMissing: no such file.
        DataError: not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes; that is no configuration")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputMissing(f"{path}: no such file; a Hugging Face model directory has one") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def family_of(raw: Mapping[str, Any], directory: Path) -> Family:
    """The family that `model_type` names; whatever `auto_map` says is not looked at."""
    for family in FAMILIES:
        if family.arch == raw.get("model_type"):
            return family
    known = ", ".join(family.arch for family in FAMILIES)
    raise UsageError(
        f"{directory / 'config.json'}: model_type {raw.get('model_type')!r} is not supported (known: {known})"
    )


def config_from_hf(raw: Mapping[str, Any], directory: Path = Path()) -> ModelConfig:
    """What a config.json describes.

    Raises:
        DataError: a key is missing, of the wrong type, or means something we cannot represent.
    """
    family = family_of(raw, directory)
    where = directory / "config.json"
    fields: dict[str, Any] = {"rotary_pct": 1.0}
    try:
        fields |= family.read({**family.defaults, **{k: v for k, v in raw.items() if v is not None or k in _NULLABLE}})
        config = ModelConfig(**fields)
        sizes = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.ffn_size)
        if any(type(size) is not int or size <= 0 for size in (*sizes, config.padded_vocab_size, config.head_dim)):
            raise DataError(f"sizes must be positive integers, not {sizes}")
        if config.num_heads % config.num_kv_heads:
            raise DataError(f"{config.num_heads} heads cannot share {config.num_kv_heads} key and value heads")
        if not 0 <= config.rotary_dims <= config.head_dim:
            raise DataError(f"{config.rotary_pct} is no share of a head to rotate; it must be between 0 and 1")
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except KeyError as error:
        raise DataError(f"{where}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}") from error
    return config


_NULLABLE = ("sliding_window", "head_dim", "num_key_value_heads", "pretraining_tp")


def _check_names(
    directory: Path, stored: Mapping[str, LazyTensor], wanted: Iterable[str], config: ModelConfig, family: Family
) -> None:
    extra = set(stored) - set(wanted)
    if config.tie_embeddings:
        extra -= {"lm_head.weight", "embed_out.weight"}  # some files store the tied head once more
    extra = {name for name in extra if not any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    if extra:
        first = min(extra)
        raise DataError(f"{directory}: {len(extra)} tensors its config.json does not call for, the first is {first}")


def stored_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Every tensor of a model directory by its stored name; see `open_hf` for what raises."""
    found: dict[str, LazyTensor] = {}
    paths, listed = _weight_files(directory)
    for path in paths:
        tensors = safetensors_of(path) if path.suffix == ".safetensors" else _torch_tensors(path)
        if twice := set(found) & set(tensors):
            raise DataError(f"{path}: holds {min(twice)}, which is in another file too")
        found |= tensors
    if absent := [name for name in listed if name not in found]:
        raise DataError(f"{directory}: the index of its files lists {absent[0]}, which none of them holds")
    return found


def _prefixed(found: dict[str, LazyTensor], family: Family) -> dict[str, LazyTensor]:
    if family.prefix and not any(name.startswith(family.prefix) for name in found):
        found = {name if name.startswith("lm_head.") else family.prefix + name: t for name, t in found.items()}
    return found


def _weight_files(directory: Path) -> tuple[list[Path], Iterable[str]]:
    """The files of the weights, and the tensors that the index of several files lists."""
    for single, index in (("model.safetensors", INDEX), ("pytorch_model.bin", PICKLE_INDEX)):
        if (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise DataError(f"{directory / index}: no weight_map in it")
            names = sorted(set(weight_map.values()))
            for name in names:
                if "/" in name or "\\" in name or name in ("", ".", ".."):
                    raise UnsafeInput(f"{directory / index}: names {name!r}, which leads out of the directory")
                if not (directory / name).is_file():
                    raise InputMissing(f"{directory / name}: no such file, but {index} lists it; copy it again")
            return [directory / name for name in names], weight_map
        if (directory / single).is_file():
            return [directory / single], ()
    raise InputMissing(f"{directory}: no model.safetensors, {INDEX} or pytorch_model.bin in it")


def safetensors_of(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file; DataError if it is none."""
    from libneox.checkpoint.store import Tensors

    check_header(path)
    return Tensors([path]).lazy()


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is absurd, before anything is allocated for it."""
    with path.open("rb") as file:
        start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 < size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise DataError(f"{path}: not a safetensors file, or truncated (header of {size:,} bytes)")


def _torch_tensors(path: Path) -> dict[str, LazyTensor]:
    from libneox.checkpoint.neox.torchfile import TorchFile

    value = TorchFile(path).read()
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a dictionary of tensors")
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, LazyTensor)}


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The family chosen for an export, and a sentence that says why."""

    family: Family
    why: str


def choose_family(config: ModelConfig, arch: str = "auto") -> Choice:
    """The family to export to.

    Args:
        arch: a family's name, or `auto` for the first that represents the model exactly.
    Raises:
        UsageError: none does, or not the one asked for; with the reasons.
    """
    if arch != "auto":
        for family in FAMILIES:
            if family.arch == arch:
                if reasons := family.reasons(config):
                    raise UsageError(f"{family.architecture} cannot represent this model: {'; '.join(reasons)}")
                return Choice(family, f"{family.architecture}, as asked; it represents the model exactly")
        raise UsageError(f"--arch {arch}: unknown (known: auto, {', '.join(family.arch for family in FAMILIES)})")
    rejected = []
    for family in FAMILIES:
        reasons = family.reasons(config)
        if not reasons:
            others = f"; not {'; not '.join(rejected)}" if rejected else ""
            return Choice(family, f"{family.architecture}, the first that represents the model exactly{others}")
        rejected.append(f"{family.architecture}: {reasons[0]}")
    raise UsageError(f"no Hugging Face class represents this model exactly: {'; '.join(rejected)}")
