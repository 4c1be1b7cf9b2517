# SPDX-License-Identifier: Apache-2.0
"""Raw weights as Meta and Mistral publish them: params.json and consolidated.*.pth or .safetensors.

Tensors are cut over model-parallel files like ours would be over ranks. Rotary pairs are neighbours there, (0, 1),
(2, 3), ...; ours are the halves of a head, so the rows of queries and keys are rearranged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libneox.checkpoint.hf.reader import read_json, safetensors_of
from libneox.checkpoint.lazy import LazyTensor, check_shapes, concatenate
from libneox.errors import DataError, InputMissing
from libneox.model_config import ModelConfig, RopeScaling

LLAMA3_VOCABULARY = 100_000  # Llama 3 has 128,256 entries, its predecessors and Mistral 32,000 or 32,768


def open_meta(directory: Path, *, seq_length: int | None = None) -> tuple[dict[str, LazyTensor], ModelConfig]:
    """Logical tensors and configuration of a directory of raw weights.

    Args:
        seq_length: the context length; the files do not say it, by default it follows from the generation of the model.
    Raises:
        InputMissing: no params.json or no weights.
        DataError: damaged, or not of the Llama kind.
        UnsafeInput: a .pth file asks for code.
    """
    params = read_json(directory / "params.json")
    files = _files(directory)
    try:
        config = _config(directory / "params.json", params, files, seq_length)
        tensors = _tensors(files, config)
    except KeyError as error:
        raise DataError(f"{directory}: no {error.args[0]} in one of the {len(files)} files; not complete") from error
    except IndexError as error:
        raise DataError(f"{directory}: a matrix is stored with fewer than two dimensions") from error
    check_shapes(str(directory), tensors, config.parameter_shapes())
    if unknown := sorted(name for name in files[0] if not _known(name, config.num_layers)):
        raise DataError(f"{directory}: {len(unknown)} tensors of unknown meaning, the first is {unknown[0]}")
    return {name: tensors[name] for name in config.parameter_shapes()}, config


def interleaved_to_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (head, pair, 2) to (head, 2, pair): neighbours of a rotary pair move into the two halves of a head."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _files(directory: Path) -> list[dict[str, LazyTensor]]:
    from libneox.checkpoint.neox.torchfile import TorchFile

    paths = sorted(directory.glob("consolidated*.safetensors")) or sorted(directory.glob("consolidated*.pth"))
    if not paths:
        raise InputMissing(f"{directory}: no consolidated.*.pth or .safetensors in it")
    found = []
    for path in paths:
        value = safetensors_of(path) if path.suffix == ".safetensors" else TorchFile(path).read()
        if not isinstance(value, dict):
            raise DataError(f"{path}: not a dictionary of tensors")
        found.append({name: tensor for name, tensor in value.items() if isinstance(tensor, LazyTensor)})
    return found


def _config(
    where: Path, params: Mapping[str, Any], files: Sequence[Mapping[str, LazyTensor]], seq_length: int | None
) -> ModelConfig:
    """What params.json and the shapes describe; KeyError with the name of a tensor that a file lacks."""

    def number(name: str, default: Any = None, *, whole: bool = True) -> Any:
        value = params.get(name) or default
        if type(value) not in ((int,) if whole else (int, float)) or not value > 0:
            raise DataError(f"{where}: {name} is {value!r}, not a positive {'integer' if whole else 'number'}")
        return value

    if "moe" in params or "num_experts" in params:
        raise DataError(f"{where}: a mixture of experts, which from-meta does not read")
    dim, layers, heads = (number(name) for name in ("dim", "n_layers", "n_heads"))
    eps = number("norm_eps", whole=False)
    if layers > len(files[0]):  # before a table of all tensors is made for a number out of the blue
        raise DataError(f"{where}: {layers} layers, and {len(files[0])} tensors in the files")
    vocabulary = sum(file["output.weight"].shape[0] for file in files)
    scaling = None
    length = seq_length or _length(params, vocabulary, eps)
    if params.get("use_scaled_rope"):
        factor = float(number("rope_scaling_factor", 8.0, whole=False))
        scaling = RopeScaling(type="llama3", factor=factor, original_max_position_embeddings=8192)
    return ModelConfig(
        num_layers=layers,
        hidden_size=dim,
        num_heads=heads,
        num_kv_heads=number("n_kv_heads", heads),
        head_dim=number("head_dim", dim // heads),
        ffn_size=sum(file["layers.0.feed_forward.w1.weight"].shape[0] for file in files),
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        seq_length=length,
        max_position_embeddings=length,
        norm="rmsnorm",
        norm_eps=eps,
        activation="swiglu",
        qkv_bias=False,
        attn_out_bias=False,
        mlp_bias=False,
        rotary_base=float(number("rope_theta", 10000.0, whole=False)),
        rope_scaling=scaling,
        sliding_window=number("sliding_window") if params.get("sliding_window") else None,
    )


def _length(params: Mapping[str, Any], vocabulary: int, eps: float) -> int:
    if isinstance(given := params.get("max_seq_len"), int):
        return given
    if "hidden_dim" in params:  # Mistral
        return 32_768
    if vocabulary > LLAMA3_VOCABULARY:
        return 131_072 if params.get("use_scaled_rope") else 8192
    return 2048 if eps < 5e-6 else 4096  # Llama 1 has 1e-6, Llama 2 1e-5


def _tensors(files: Sequence[Mapping[str, LazyTensor]], config: ModelConfig) -> dict[str, LazyTensor]:
    """Logical tensors; KeyError with the name of one that a file lacks."""

    def join(name: str, dim: int) -> LazyTensor:
        return concatenate([file[name] for file in files], dim)

    def rotated(name: str, heads: int) -> LazyTensor:
        return join(name, 0).map(lambda tensor: interleaved_to_halves(tensor, heads))

    # Llama 2 cuts the embedding by columns, Llama 3 by rows
    embedding_dim = 0 if files[0]["tok_embeddings.weight"].shape[-1] == config.hidden_size else 1
    found = {
        "embed.weight": join("tok_embeddings.weight", embedding_dim),
        "final_norm.weight": files[0]["norm.weight"],
        "head.weight": join("output.weight", 0),
    }
    for i in range(config.num_layers):
        at = f"layers.{i}."
        found |= {
            at + "attn_norm.weight": files[0][at + "attention_norm.weight"],
            at + "attn.qkv.weight": concatenate(
                [
                    rotated(at + "attention.wq.weight", config.num_heads),
                    rotated(at + "attention.wk.weight", config.num_kv_heads),
                    join(at + "attention.wv.weight", 0),
                ]
            ),
            at + "attn.out.weight": join(at + "attention.wo.weight", 1),
            at + "mlp_norm.weight": files[0][at + "ffn_norm.weight"],
            at + "mlp.up.weight": concatenate(
                [join(at + "feed_forward.w3.weight", 0), join(at + "feed_forward.w1.weight", 0)]
            ),
            at + "mlp.down.weight": join(at + "feed_forward.w2.weight", 1),
        }
    return found


def _known(name: str, layers: int) -> bool:
    if name in ("tok_embeddings.weight", "norm.weight", "output.weight", "rope.freqs"):
        return True
    found = re.fullmatch(r"layers\.(\d{1,9})\.(.+?)(\.weight)?", name)
    return found is not None and int(found[1]) < layers and found[2] in _IN_A_LAYER


_IN_A_LAYER = {
    *(f"attention.{part}" for part in ("wq", "wk", "wv", "wo", "inner_attention.rope.freqs")),
    *(f"feed_forward.{part}" for part in ("w1", "w2", "w3")),
    "attention_norm",
    "ffn_norm",
}
