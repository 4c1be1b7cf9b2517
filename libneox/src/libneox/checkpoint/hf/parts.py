# SPDX-License-Identifier: Apache-2.0
"""What families share: rotary keys, sizes, activations, and pieces of tensor maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from libneox.checkpoint.hf.family import ACTIVATIONS, ACTIVATIONS_READ, GATED_READ, Json
from libneox.checkpoint.hf.rules import Copy, Rule, Split, Zeros
from libneox.errors import DataError
from libneox.model_config import ModelConfig, RopeScaling

# --- rotary positions: transformers 5 reads rope_parameters, older ones the keys beside it ---------------------------


def write_rope(config: ModelConfig) -> Json:
    """Rotary keys for transformers 5 and 4. The family adds its own old names for the share that is rotated."""
    scaling: Json | None = None
    if config.rope_scaling:
        fields = dataclasses.asdict(config.rope_scaling)
        kind = fields.pop("type")
        wanted = _ROPE_FIELDS[kind]
        scaling = {"rope_type": kind} | {name: fields[name] for name in wanted if fields[name] is not None}
    parameters = {"rope_theta": float(config.rotary_base), **(scaling or {"rope_type": "default"})}
    if config.rotary_dims != config.head_dim:
        parameters["partial_rotary_factor"] = config.rotary_pct
    return {"rope_parameters": parameters, "rope_theta": float(config.rotary_base), "rope_scaling": scaling}


_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}


def read_rope(raw: Json, *, partial: float = 1.0, old_share: str = "partial_rotary_factor") -> Json:
    """Rotary fields of ModelConfig from either generation of keys.

    Args:
        partial: the share that is rotated if config.json does not say.
        old_share: the name of that share before transformers 5.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise DataError("rope_parameters is not an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0)))
    share = parameters.get("partial_rotary_factor", raw.get(old_share, partial))
    return {
        "rotary_base": float(theta),
        "rotary_pct": float(share),
        "rope_scaling": None if kind in (None, "default") else _read_scaling(str(kind), parameters),
    }


def _read_scaling(kind: str, parameters: Json) -> RopeScaling:
    if kind not in _ROPE_FIELDS:
        raise DataError(f"rope_type {kind!r} has no counterpart here (known: {', '.join(_ROPE_FIELDS)})")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind]}
    if unknown := sorted(set(parameters) - known - {"max_position_embeddings", "original_max_position_embeddings"}):
        raise DataError(f"rope_parameters of type {kind}: {', '.join(unknown)} has no counterpart here")
    values = {name: parameters[name] for name in _ROPE_FIELDS[kind] if parameters.get(name) is not None}
    return RopeScaling(type=kind, **values)  # type: ignore[arg-type]


# --- pieces of tensor maps that families share -----------------------------------------------------------------------


def linear(config: ModelConfig, ours: str, theirs: str, *, always_bias: bool = False) -> list[Rule]:
    """A matrix and its bias; a bias that only they have is zero."""
    rules: list[Rule] = [Copy(f"{ours}.weight", f"{theirs}.weight")]
    shapes = config.parameter_shapes()
    if f"{ours}.bias" in shapes:
        rules.append(Copy(f"{ours}.bias", f"{theirs}.bias"))
    elif always_bias:
        rules.append(Zeros(f"{theirs}.bias", shapes[f"{ours}.weight"][:1]))
    return rules


def norm(config: ModelConfig, ours: str, theirs: str, *, source: str | None = None) -> list[Rule]:
    """A norm; a layernorm without bias gets a zero one. `source` is the norm of ours it is a copy of."""
    ours = source or ours
    rules: list[Rule] = [Copy(f"{ours}.weight", f"{theirs}.weight")]
    if config.norm == "layernorm":
        has = config.norm_bias
        rules.append(Copy(f"{ours}.bias", f"{theirs}.bias") if has else Zeros(f"{theirs}.bias", (config.hidden_size,)))
    return rules


def split_qkv(
    config: ModelConfig, ours: str, theirs: Sequence[str], *, bias: bool, zero_bias: bool = False
) -> list[Rule]:
    """A fused query, key and value projection of ours as three of theirs."""
    names = tuple(theirs)
    rules: list[Rule] = [Split(f"{ours}.weight", tuple(f"{name}.weight" for name in names), config.qkv_sizes)]
    if bias:
        rules.append(Split(f"{ours}.bias", tuple(f"{name}.bias" for name in names), config.qkv_sizes))
    elif zero_bias:
        rules += [Zeros(f"{name}.bias", (size,)) for name, size in zip(names, config.qkv_sizes, strict=True)]
    return rules


def gated_mlp(config: ModelConfig, at: str, theirs: str) -> list[Rule]:
    """Our [up; gate] matrix as Llama's up_proj and gate_proj, and down_proj."""
    sizes = (config.ffn_size, config.ffn_size)
    rules: list[Rule] = []
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        rules.append(Split(f"{at}mlp.up.{kind}", (f"{theirs}.up_proj.{kind}", f"{theirs}.gate_proj.{kind}"), sizes))
        rules.append(Copy(f"{at}mlp.down.{kind}", f"{theirs}.down_proj.{kind}"))
    return rules


def ends(
    config: ModelConfig, embed: str, final: str, head: str, *, head_bias: bool = False
) -> tuple[list[Rule], list[Rule]]:
    """Rules before and after the blocks: embedding; final norm and head (none if it is the embedding)."""
    last = norm(config, "final_norm", final)
    if not config.tie_embeddings:
        last.append(Copy("head.weight", f"{head}.weight"))
    if head_bias:
        last.append(Zeros(f"{head}.bias", (config.padded_vocab_size,)))
    return [Copy("embed.weight", f"{embed}.weight")], last


def write_sizes(config: ModelConfig) -> Json:
    """The sizes, by the names most families use."""
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_sizes(raw: Json) -> Json:
    """The inverse of `write_sizes`, as arguments of ModelConfig."""
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    return {
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
        "ffn_size": raw["intermediate_size"],
        "vocab_size": raw["vocab_size"],
        "padded_vocab_size": raw["vocab_size"],
        "seq_length": raw["max_position_embeddings"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "tie_embeddings": raw["tie_word_embeddings"],
        "init_method_std": raw.get("initializer_range", 0.02),
        "attention_dropout": float(raw.get("attention_dropout") or 0.0),
    }


def write_activation(config: ModelConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    """transformers' name of a plain activation. `tanh` is one of its three names of the tanh form of gelu."""
    return tanh if config.activation == "gelu_tanh" else ACTIVATIONS[config.activation]


def read_activation(raw: Json, key: str = "hidden_act", *, gated: bool = False) -> str:
    """Our name of the activation; DataError if we lack it."""
    table = GATED_READ if gated else ACTIVATIONS_READ
    if raw[key] not in table:
        raise DataError(f"{key} {raw[key]!r} has no counterpart here (known: {', '.join(table)})")
    return table[raw[key]]


def refuse(raw: Json, **expected: object) -> None:
    """Refuse keys whose value changes the function in a way our model does not know."""
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise DataError(f"{key} is {raw[key]!r}, which has no counterpart here (only {value!r})")
