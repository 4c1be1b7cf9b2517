# SPDX-License-Identifier: Apache-2.0
"""Load a model for use: `libneox.load_model(CKPT_OR_HF_DIR)`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from libneox import run_directory
from libneox.checkpoint.store import open_tensors
from libneox.errors import DataError
from libneox.model import Transformer
from libneox.model_config import ModelConfig


def load_model(
    source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """Load a checkpoint as a module in eval mode: ids [B, T] int64 -> logits [B, T, V] float32.

    Args:
        source: RUN, RUN/latest, RUN/step_N, a Hugging Face model directory, or a GPT-NeoX checkpoint with its
            configs beside it (the slim release of the 20B too), read in place.
        dtype: of the parameters; the stored one if None.
    Returns:
        The module; `.config` is its ModelConfig. V is the padded vocabulary.
    Raises:
        InputMissing: no checkpoint there.
        IntegrityError: a file of it does not match its hash.
        DataError: a tensor is missing, left over or of another shape than the configuration says.
        UnsafeInput: a file asks for code to be run.
    """
    if is_legacy(source):
        from libneox.checkpoint.neox import open_neox

        legacy = open_neox(Path(source))
        return build_model(legacy.config, legacy.tensors, source=source, dtype=dtype, device=device)
    ref = run_directory.resolve_checkpoint(source)
    if ref.kind == "hf":
        from libneox.checkpoint import hf

        opened = hf.open_hf(ref.path)
        return build_model(opened.config, opened, source=ref.path, dtype=dtype, device=device)
    with open_tensors(ref.path) as tensors:
        return build_model(read_model_config(ref.path), tensors, source=ref.path, dtype=dtype, device=device)


def is_legacy(source: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a checkpoint of GPT-NeoX, by the names of its files."""
    folder = Path(source)
    # DeepSpeed leaves global_stepN in Hugging Face directories as well: what names itself otherwise comes first.
    if any((folder / name).exists() for name in (run_directory.MANIFEST, "config.json")) or any(folder.glob("step_*")):
        return False
    names = ("mp_rank_*_model_states.pt", "layer_*-model_*-model_states.pt", "global_step*")
    return any(any(folder.glob(name)) for name in names)


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
) -> Transformer:
    """A model in eval mode with the values of `tensors`, read one at a time.

    Raises:
        DataError: naming the first tensor that is missing, left over or misshapen.
    """
    check_names(config, tensors, source)
    with torch.device("meta"):
        model = Transformer(config)
    for name, parameter in list(model.named_parameters()):
        value = tensors[name]
        if value.shape != parameter.shape:
            raise DataError(f"{source}: {name} is {tuple(value.shape)}, its config says {tuple(parameter.shape)}")
        put_parameter(model, name, value.to(device=device, dtype=dtype or value.dtype))
    return model.to(device).eval()


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
