# SPDX-License-Identifier: Apache-2.0
"""Old, derived and mistaken names of keys: what they mean today."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Alias:
    """A name that is accepted with a warning and stands for another key."""

    target: str  # a key, or a path into a dict-valued key such as optimizer.params.lr
    doc: str


ALIASES: dict[str, Alias] = {
    "gas": Alias("gradient_accumulation_steps", "Name in the Pythia repository."),
    "save_interval": Alias("checkpoint_factor", "Name before checkpoint_scale existed."),
    "batch_size": Alias("train_micro_batch_size_per_gpu", "GPT-NeoX derives it."),
    "clip_grad": Alias("gradient_clipping", "GPT-NeoX derives it."),
    "lr": Alias("optimizer.params.lr", "GPT-NeoX derives it."),
    "optimizer_type": Alias("optimizer.type", "GPT-NeoX derives it."),
    "zero_stage": Alias("zero_optimization.stage", "GPT-NeoX derives it."),
    "zero_reduce_scatter": Alias("zero_optimization.reduce_scatter", "GPT-NeoX derives it."),
    "zero_contiguous_gradients": Alias("zero_optimization.contiguous_gradients", "GPT-NeoX derives it."),
    "zero_reduce_bucket_size": Alias("zero_optimization.reduce_bucket_size", "GPT-NeoX derives it."),
    "zero_allgather_bucket_size": Alias("zero_optimization.allgather_bucket_size", "GPT-NeoX derives it."),
    "zero_allow_untested_optimizer": Alias(
        "deepspeed_extra_args.zero_allow_untested_optimizer", "Top level according to GPT-NeoX's README."
    ),
    "attention_type": Alias("attention_config", "Older still; multihead, groupedquery and multiquery say nothing new."),
    "attention_configs": Alias("attention_config", "Misspelling in the Pythia repository."),
    "mlp_type": Alias("activation", "`llama`: a gated MLP without biases; intermediate_size was its true width."),
    "label_data_paths": Alias("train_label_data_paths", "Name in GPT-NeoX's documentation."),
    "train_data_path": Alias("train_data_paths", "Name in GPT-NeoX's documentation."),
    "valid_data_path": Alias("valid_data_paths", "Name in GPT-NeoX's documentation."),
    "test_data_path": Alias("test_data_paths", "Name in GPT-NeoX's documentation."),
}

REMOVED: dict[str, str] = {
    "decay_lr_to": "no GPT-NeoX knows it; set min_lr to the learning rate at the end",
    "warmup_iters": "no GPT-NeoX knows it; set warmup to the warm-up's share of lr_decay_iters",
    "autotuning_config": "no GPT-NeoX knows it; set autotuning",
    "tokenizer_object": "it is no setting; set tokenizer",
    "tensorboard_writer": "it is no setting; set tensorboard_dir",
    "adlr_autoresume_object": "only NVIDIA's own cluster has it; remove it",
}


def translate(name: str, value: Any) -> Any:
    """The value an alias passes on, where its form has changed too."""
    if name in ("train_data_path", "valid_data_path", "test_data_path", "label_data_paths") and isinstance(value, str):
        return [value]
    if name == "attention_type" and isinstance(value, str):
        return None if value in ("multihead", "groupedquery", "multiquery") else [[[value], "all"]]
    return value


def llama_mlp(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `mlp_type: llama` said in today's keys: a gated MLP without biases.

    Its width was intermediate_size itself, and by default two thirds of 4 * hidden_size rounded up to 256.
    """
    gated = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
    activation = values.get("activation") or "gelu"
    known = gated.get(activation, activation) if isinstance(activation, str) else activation
    keys: dict[str, Any] = {"activation": known, "use_bias_in_mlp": False}
    hidden, width = values.get("hidden_size"), values.get("intermediate_size")
    if isinstance(width, int):
        keys["ffn_hidden_size"] = width
    elif isinstance(hidden, int):
        keys["ffn_hidden_size"] = -(-int(8 * hidden / 3) // 256) * 256
    return keys
