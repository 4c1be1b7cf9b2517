# SPDX-License-Identifier: Apache-2.0
"""Load a model for use: `libneox.load_model(CKPT_OR_HF_DIR)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from libneox import run_directory
from libneox.checkpoint.store import open_tensors
from libneox.errors import DataError
from libneox.model import Transformer
from libneox.model_config import ModelConfig

if TYPE_CHECKING:
    from libneox.parallel.shard import Shard


def load_model(
    source: str | os.PathLike[str] | run_directory.CheckpointRef,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vocab_size: int | None = None,
    warn: run_directory.Warn | None = None,
    shard: Shard | None = None,
) -> Transformer:
    """Load a checkpoint as a module in eval mode: ids [B, T] int64 -> logits [B, T, V] float32.

    Args:
        source: RUN, RUN/latest, RUN/step_N, a Hugging Face model directory, or a GPT-NeoX checkpoint with its
            configs beside it (the slim release of the 20B too), read in place; or what `resolve_checkpoint` has
            found, whose hashes are not compared again.
        dtype: of the parameters; the stored one if None.
        vocab_size: ids of the tokenizer, which a GPT-NeoX checkpoint does not know; all rows of its embedding if None.
        warn: told what is worth knowing: steps passed over, copies of a tensor that differ; None: stderr.
        shard: keep this rank's part only; all ranks of the group then run the model together.
    Returns:
        The module; `.config` is its ModelConfig. V is the padded vocabulary.
    Raises:
        InputMissing: no checkpoint there.
        IntegrityError: a file of it does not match its hash.
        DataError: a tensor is missing, left over or of another shape than the configuration says.
        UnsafeInput: a file asks for code to be run.
    """
    warn = warn or run_directory.print_warning
    ref = source
    if not isinstance(ref, run_directory.CheckpointRef):
        ref = run_directory.resolve_checkpoint(ref, warn=warn)
    if ref.kind == "legacy":
        from libneox.checkpoint.neox import open_neox

        legacy = open_neox(ref.path, vocab_size=vocab_size)
        for note in legacy.notes:
            warn(f"{ref.path}: {note}")
        return build_model(legacy.config, legacy.tensors, source=ref.path, dtype=dtype, device=device, shard=shard)
    if ref.kind == "hf":
        from libneox.checkpoint import hf

        opened = hf.open_hf(ref.path)
        return build_model(opened.config, opened, source=ref.path, dtype=dtype, device=device, shard=shard)
    with open_tensors(ref.path) as tensors:
        config = read_model_config(ref.path)
        return build_model(config, tensors, source=ref.path, dtype=dtype, device=device, shard=shard)


def read_model_config(step_dir: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of a step directory, from its config.yml."""
    from libneox.config import load_config

    return load_config([Path(step_dir) / run_directory.CONFIG]).model_config()


def build_model(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    shard: Shard | None = None,
) -> Transformer:
    """A model in eval mode with the values of `tensors`, read one at a time.

    Raises:
        DataError: naming the first tensor that is missing, left over or misshapen.
    """
    check_names(config, tensors, source)
    with torch.device("meta"):
        model = Transformer(config)
    mine = _cut(model, shard) if shard is not None else None
    for name, shape in config.parameter_shapes().items():
        value = tensors[name]
        if tuple(value.shape) != shape:
            raise DataError(f"{source}: {name} is {tuple(value.shape)}, its config says {shape}")
        if mine is not None:
            value = mine(name, value).clone()
        put_parameter(model, name, value.to(device=device, dtype=dtype or value.dtype))
    return model.to(device).eval()


def _cut(model: Transformer, shard: Shard) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Make a model without memory one rank's part; returns what takes that part of a tensor."""
    from libneox.parallel.shard import Pieces
    from libneox.parallel.tensor import shard_model

    shard_model(model, model.config, shard, device="meta")
    return Pieces(model.config, shard).mine


def check_names(config: ModelConfig, tensors: Mapping[str, torch.Tensor], source: str | os.PathLike[str]) -> None:
    """Raise DataError unless `tensors` holds exactly the parameters of `config`."""
    wanted = set(config.parameter_shapes())
    if missing := sorted(wanted - set(tensors)):
        raise DataError(f"{source}: {len(missing)} tensors missing, first {missing[0]}; the checkpoint is incomplete")
    if extra := sorted(set(tensors) - wanted):
        raise DataError(f"{source}: {len(extra)} tensors its config has no place for, first {extra[0]}")


def put_parameter(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace one parameter of a module that was built without memory."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
