# SPDX-License-Identifier: Apache-2.0
"""Stream tensors into the files of a Hugging Face directory or of a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.errors import UsageError
from libneox.progress import Progress

if TYPE_CHECKING:
    import torch

    from libneox.checkpoint.hf.family import Family
    from libneox.checkpoint.lazy import LazyTensor, LazyTensors
    from libneox.config import NeoxConfig
    from libneox.model_config import ModelConfig
    from libneox.tokenizer import Tokenizer

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")  # tokenizers that mark a text's start with another token than its end
DTYPE_NAMES = ("float32", "float16", "bfloat16")


def parse_bytes(text: str) -> int:
    """`5GB` as 5,000,000,000."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def dtype_name(name: str | None) -> str | None:
    """The full name of a dtype; None for None."""
    aliases = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    full = aliases.get(name, name) if name else name
    if full is not None and full not in DTYPE_NAMES:
        raise UsageError(f"--dtype {name}: expected one of {', '.join(DTYPE_NAMES)}")
    return full


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name; None for None."""
    import torch

    full = dtype_name(name)
    return None if full is None else getattr(torch, full)


def cast_all(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """All tensors in `dtype`; as they are for None. Masks and numbers, which some directories store, stay."""
    if dtype is None:
        return dict(tensors)
    return {name: tensor.cast(dtype) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def write_tensor_files(directory: Path, tensors: LazyTensors, *, shard_bytes: int, progress: Progress) -> None:
    """Write model.safetensors, or numbered files and their index; in the order of `tensors`, one at a time."""
    from libneox.checkpoint.store import TensorSpec, TensorWriter, plan_files

    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.specs().items()]
    plan = plan_files("model", specs, shard_bytes=shard_bytes)
    single = len(plan) == 1
    weight_map = {}
    for file in plan:
        name = "model.safetensors" if single else file.name
        with TensorWriter(directory / name, file.specs) as writer:
            for spec in file.specs:
                writer.append(spec.name, tensors[spec.name])
                progress.update(spec.nbytes, spec.name)
                weight_map[spec.name] = name
    if not single:
        total = {"total_size": tensors.nbytes}
        _write_json(directory / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def write_hf(
    directory: Path,
    tensors: LazyTensors,
    config: ModelConfig,
    family: Family,
    tokenizer: Tokenizer | None,
    *,
    shard_bytes: int,
    progress: Progress,
) -> None:
    """Fill a directory that AutoModelForCausalLM and AutoTokenizer load, in transformers 4 and 5."""
    from libneox.checkpoint.hf import generation_config_of, hf_config_of, tokenizer_config_of

    write_tensor_files(directory, tensors, shard_bytes=shard_bytes, progress=progress)
    eos, pad = (tokenizer.eod_id, tokenizer.pad_id) if tokenizer else (None, None)
    bos = next((id for name in BOS_NAMES if tokenizer and (id := tokenizer.token_id(name)) is not None), None)
    dtype = next(iter(tensors.specs().values())).dtype
    _write_json(
        directory / "config.json", hf_config_of(config, family, dtype=dtype, bos_id=bos, eos_id=eos, pad_id=pad)
    )
    _write_json(directory / "generation_config.json", generation_config_of(eos, pad, bos))
    if tokenizer is not None and tokenizer.kind == "tokenizer.json":
        _write_bytes(directory / "tokenizer.json", tokenizer.data)
        length = config.max_position_embeddings
        described = tokenizer_config_of(tokenizer.data, bos_id=bos, eos_id=eos, pad_id=pad, length=length)
        _write_json(directory / "tokenizer_config.json", described)


def native_config(source_neox: NeoxConfig | None, config: ModelConfig) -> NeoxConfig:
    """The configuration stored with a converted checkpoint: the source's training keys, and what the model now is."""
    from libneox.checkpoint.hf.neox_keys import neox_keys_of
    from libneox.config import load_config

    if source_neox is None:
        keys = neox_keys_of(config)
    else:
        # layout and places belong to the run that was, not to the next one
        dropped = ("model_parallel_size", "pipe_parallel_size", "save", "load", "iteration")
        keys = {name: value for name, value in source_neox.to_dict().items() if name not in dropped}
        keys |= {"vocab_size": config.vocab_size, "padded_vocab_size": config.padded_vocab_size}
        if config.norm == "layernorm":
            keys["use_bias_in_norms"] = config.norm_bias
        if config.qk_norm == "joint":
            keys["qk_norm_groups"] = config.qk_norm_groups
    neox = load_config([keys])
    found = neox.model_config()
    if found != config:
        wrong = [f.name for f in dataclasses.fields(config) if getattr(found, f.name) != getattr(config, f.name)]
        raise AssertionError(f"the stored configuration would read back differently: {', '.join(wrong)}")
    return neox


def write_native(
    run: Path,
    tensors: LazyTensors,
    neox: NeoxConfig,
    tokenizer: Tokenizer | None,
    *,
    step: int,
    shard_bytes: int,
    progress: Progress,
    trainer: Mapping[str, Any] | None = None,
    optimizer: LazyTensors | None = None,
    samples: int = 0,
    tokens: int = 0,
) -> Path:
    """Write RUN/step_N and RUN/latest."""
    from libneox.checkpoint.store import TensorSpec, write_checkpoint

    def specs(group: LazyTensors) -> list[TensorSpec]:
        return [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in group.specs().items()]

    return write_checkpoint(
        run / f"step_{step}",
        _Counted(tensors, progress),
        specs=specs(tensors),
        config_yaml=neox.to_yaml(),
        tokenizer=tokenizer.data if tokenizer else None,
        tokenizer_kind=tokenizer.kind if tokenizer else "tokenizer.json",
        trainer=trainer,
        optimizer_tensors=_Counted(optimizer, progress) if optimizer else None,
        optimizer_specs=specs(optimizer) if optimizer else None,
        step=step,
        samples=samples,
        tokens=tokens,
        config_sha256=neox.hash,
        shard_bytes=shard_bytes,
    )


class _Counted(Mapping[str, "torch.Tensor"]):
    """Lazy tensors that count their bytes as they are read."""

    def __init__(self, tensors: LazyTensors, progress: Progress):
        self._tensors, self._progress = tensors, progress

    def __getitem__(self, name: str) -> torch.Tensor:
        self._progress.update(self._tensors.spec(name).nbytes, name)
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, json.dumps(value, indent=2).encode() + b"\n")


def _write_bytes(path: Path, data: bytes) -> None:
    import os

    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
