# SPDX-License-Identifier: Apache-2.0
"""The small files of a Hugging Face directory, and their tensors, from our model. Read by transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from libneox.checkpoint.hf.family import Family
from libneox.checkpoint.hf.rules import export_tensors
from libneox.checkpoint.lazy import LazyTensor, LazyTensors
from libneox.model_config import ModelConfig


def hf_config_of(
    config: ModelConfig,
    family: Family,
    *,
    dtype: torch.dtype = torch.float32,
    bos_id: int | None = None,
    eos_id: int | None,
    pad_id: int | None,
) -> dict[str, Any]:
    """config.json for a model, with the rotary keys of transformers 5 and those of older versions.

    `bos_id` is by default the id that ends a document: GPT-NeoX has one token for both.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [family.architecture],
        "model_type": family.arch,
        **family.write(config),
        "bos_token_id": eos_id if bos_id is None else bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,
    }


def generation_config_of(eos_id: int | None, pad_id: int | None, bos_id: int | None = None) -> dict[str, Any]:
    """generation_config.json: plain greedy decoding unless the caller says otherwise."""
    ids = {
        "bos_token_id": eos_id if bos_id is None else bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id if pad_id is not None else eos_id,
    }
    return {name: value for name, value in ids.items() if value is not None} | {"do_sample": False}


def tokenizer_config_of(
    tokenizer_json: bytes, *, bos_id: int | None = None, eos_id: int | None, pad_id: int | None, length: int
) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json.

    The class is named so that both generations of transformers take tokenizer.json as it stands; with GPT-NeoX's own
    class, or none, version 5 rebuilds it from vocabulary and merges, and ids change without a word.
    """
    tokenizer = json.loads(tokenizer_json)
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    names = {id: token["content"] for id, token in added.items()}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        names |= {id: text for text, id in vocabulary.items() if id in (bos_id, eos_id, pad_id)}
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(id): {key: value for key, value in token.items() if key != "id"} for id, token in sorted(added.items())
        },
    }
    if eos_id in names:
        found |= {"eos_token": names[eos_id], "bos_token": names.get(bos_id, names[eos_id])}
    if pad_id in names:
        found |= {"pad_token": names[pad_id]}
    return found


def hf_tensors(tensors: Mapping[str, LazyTensor], config: ModelConfig, family: Family) -> LazyTensors:
    """The tensors of the export by the names that stand on disk (`embed_out.weight`, never `lm_head`, for GPTNeoX)."""
    made_up = next(iter(tensors.values())).dtype  # of biases that only they have
    return LazyTensors(export_tensors(family.rules(config), tensors, made_up))


def trim_vocabulary(tensors: Mapping[str, LazyTensor], config: ModelConfig, rows: int) -> dict[str, LazyTensor]:
    """Tensors with only the first `rows` rows of embedding and head."""
    trimmed = dict(tensors)
    for name in ("embed.weight", "head.weight"):
        if name in trimmed:
            trimmed[name] = trimmed[name].rows(0, rows)
    return trimmed
