# SPDX-License-Identifier: Apache-2.0
"""From NeoX keys to the resolved model: widths, heads, vocabulary, attention kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from libneox.config.problems import Problems, suggestion
from libneox.model_config import GATED, ModelConfig, Residual, RopeScaling

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig

DENSE = ("global", "flash")
SPARSE = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")
OTHER = ("gmlp", "amlp", "mamba", "rwkv")
KINDS = (*DENSE, *SPARSE, *OTHER)
NORM_NAMES = {"te_rmsnorm": "rmsnorm", "te_layernorm": "layernorm"}


class _Unresolved(Exception):
    """A problem has been noted and there is no value."""


def attention_kinds(config: NeoxConfig) -> tuple[str, ...]:
    """Kind of attention of each layer.

    Raises:
        UsageError: `attention_config` is malformed or does not give num_layers kinds.
    """
    problems = Problems()
    kinds = _kinds(config, problems)
    problems.raise_if_any()
    return kinds


def check_architecture(config: NeoxConfig, problems: Problems) -> None:
    """Add to `problems` whatever keeps the model from being built; the vocabulary may still be unknown."""
    _resolve(config, config.model.vocab_size or 1, problems)


def model_config(config: NeoxConfig, vocab_size: int | None) -> ModelConfig:
    """See `NeoxConfig.model_config`."""
    from libneox.config.support import check_describable

    problems = Problems()
    vocab_size = vocab_size or config.model.vocab_size or config.model.padded_vocab_size
    if vocab_size is None:
        problems.add(None, "vocab_size", "is unknown; name a tokenizer, or --set vocab_size=N")
    resolved = _resolve(config, vocab_size or 1, problems)
    if resolved is not None:
        check_describable(config, problems)
    problems.raise_if_any()
    assert resolved is not None
    return resolved


def legacy_widths(base: int, multiple: int, gated: bool) -> tuple[int, int]:
    """(rows of the first MLP matrix, columns of the second) as GPT-NeoX computes them.

    A gated MLP takes 2/3 of `base` for both halves of the first matrix together, so each is about a third.
    They fit together if the first is twice (plain: equal to) the second.
    """
    if not gated:
        return _round_up(base, 2 * multiple), _round_up(base, multiple)
    both = int(base * 2 / 3)
    return _round_up(both, 2 * multiple), _round_up(both // 2, multiple)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _resolve(config: NeoxConfig, vocab_size: int, problems: Problems) -> ModelConfig | None:
    resolve = _Resolve(config, problems)
    before = len(problems)
    fields = resolve.shape() | resolve.attention() | resolve.vocabulary(vocab_size)
    return None if len(problems) > before else ModelConfig(**fields, **resolve.numerics())


class _Resolve:
    """The steps from keys to ModelConfig's fields; each notes what is wrong and goes on."""

    def __init__(self, config: NeoxConfig, problems: Problems):
        self.config, self.model, self.problems = config, config.model, problems

    def bad(self, key: str, message: str) -> None:
        place = self.config.places.get(key) or self.config.places.get(key.partition(".")[0])
        self.problems.add(place, key, message)

    def shape(self) -> dict[str, Any]:
        model = self.model
        for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            if getattr(model, name) is None:
                self.bad(name, "is required")
        length = self.config.seq_length
        if length is not None and model.max_position_embeddings is not None and length > model.max_position_embeddings:
            self.bad("seq_length", f"is {length}, more than max_position_embeddings {model.max_position_embeddings}")
        stages = self.config.pipeline_stages
        if model.num_layers is not None and stages > model.num_layers:
            self.bad("pipe_parallel_size", f"{stages} stages need {stages} layers; num_layers is {model.num_layers}")
        _kinds(self.config, self.problems)
        ffn_size, tensor = self._ffn_size(), self.config.tensor_parallel
        if ffn_size % tensor:
            key = "ffn_hidden_size" if model.ffn_hidden_size is not None else "model_parallel_size"
            self.bad(key, f"an MLP of width {ffn_size} cannot be split over model_parallel_size {tensor}")
        if self.config.parallel.sequence_parallel and length is not None and length % tensor:
            self.bad("sequence_parallel", f"{length} positions cannot be split over model_parallel_size {tensor}")
        return {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "seq_length": length,
            "max_position_embeddings": model.max_position_embeddings,
            "ffn_size": ffn_size,
        }

    def _ffn_size(self) -> int:
        model = self.model
        ways = ("ffn_hidden_size", "intermediate_size", "expansion_factor")
        given = [name for name in ways if getattr(model, name) is not None]
        if len(given) > 1:
            self.bad(given[1], f"contradicts {given[0]}; keep one of them")
        multiple, gated = model.mlp_multiple_of, model.activation in GATED
        if model.ffn_hidden_size is not None:
            if model.ffn_hidden_size % multiple:
                self.bad("ffn_hidden_size", f"{model.ffn_hidden_size} is no multiple of mlp_multiple_of {multiple}")
            return model.ffn_hidden_size
        hidden = model.hidden_size or 1
        base = model.intermediate_size or (int((model.expansion_factor or 4) * hidden))
        first, second = legacy_widths(base, multiple, gated)
        if first != (2 * second if gated else second):
            key = given[0] if given else "hidden_size"
            self.bad(
                key,
                f"an MLP of {base} with mlp_multiple_of {multiple} has a first matrix of {first} rows and a second of "
                f"{second} columns in GPT-NeoX's arithmetic, which do not fit; set ffn_hidden_size to the true width",
            )
        return second

    def attention(self) -> dict[str, Any]:
        model = self.model
        heads, hidden = model.num_attention_heads or 1, model.hidden_size or 1
        kv_heads = model.num_kv_heads or heads
        if model.head_dim is None and hidden % heads:
            self.bad("num_attention_heads", f"{heads} does not divide hidden_size {hidden}; change one or set head_dim")
        if heads % kv_heads:
            self.bad("num_kv_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        tensor = self.config.tensor_parallel
        for key, count in (("num_attention_heads", heads), ("num_kv_heads", kv_heads)):
            if count % tensor and getattr(model, key) is not None:
                self.bad(key, f"{count} heads cannot be split over model_parallel_size {tensor}")
        head_dim = model.head_dim or hidden // heads
        if model.pos_emb == "rotary" and (
            int(head_dim * model.rotary_pct) % 2 or int(head_dim * model.rotary_pct) == 0
        ):
            dims = int(head_dim * model.rotary_pct)
            self.bad("rotary_pct", f"rotates {dims} of {head_dim} dimensions; the number must be even and not 0")
        return {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "qk_norm": self._qk_norm(),
            "qk_norm_groups": self._qk_norm_groups(heads),
            "rope_scaling": self._rope_scaling(),
            "sliding_window": None if model.sliding_window_width is None else model.sliding_window_width + 1,
        }

    def _qk_norm(self) -> str:
        model = self.model
        if model.use_qk_layernorm and model.qk_norm == "head":
            self.bad("use_qk_layernorm", "is the joint norm and contradicts qk_norm: head; keep one of them")
        kind = "joint" if model.use_qk_layernorm else model.qk_norm
        heads, kv_heads = model.num_attention_heads or 1, model.num_kv_heads or model.num_attention_heads or 1
        if kind == "joint" and heads != kv_heads:
            self.bad(
                "num_kv_heads", "a joint norm of queries and keys needs as many keys as queries; use qk_norm: head"
            )
        return kind

    def _qk_norm_groups(self, heads: int) -> int:
        if self.model.qk_norm != "joint" and not self.model.use_qk_layernorm:
            return 1
        groups, tensor = self.model.qk_norm_groups or self.config.tensor_parallel, self.config.tensor_parallel
        if heads % groups:
            self.bad("qk_norm_groups", f"{groups} groups do not divide num_attention_heads {heads}")
        if groups % tensor:
            self.bad("model_parallel_size", f"{tensor} ranks cannot hold whole QK-norm groups; there are {groups}")
        return groups

    def _rope_scaling(self) -> RopeScaling | None:
        section = self.model.rope_scaling
        if section is None:
            return None
        names = {"linear", "ntk", "yarn", "llama3"}
        kind = section.get("type", section.get("rope_type"))
        if not isinstance(kind, str) or kind not in names:
            self.bad("rope_scaling.type", f"expected one of linear, ntk, yarn, llama3, found {kind!r}")
            return None
        for name, value in section.items():
            if name != "type" and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                self.bad(f"rope_scaling.{name}", f"expected a number above 0, found {value!r}")
                return None
        if "factor" not in section:
            self.bad("rope_scaling", "needs factor")
            return None
        if kind in ("llama3", "yarn") and "original_max_position_embeddings" not in section:
            self.bad("rope_scaling", f"{kind} needs original_max_position_embeddings")
            return None
        known = set(RopeScaling.__slots__)
        return RopeScaling(**{name: value for name, value in section.items() if name in known})

    def vocabulary(self, vocab_size: int) -> dict[str, int]:
        tensor = self.config.tensor_parallel
        padded = self.model.padded_vocab_size
        if padded is None:
            padded = _round_up(vocab_size, self.model.make_vocab_size_divisible_by * tensor)
        elif padded < vocab_size:
            self.bad(
                "padded_vocab_size",
                f"{padded} rows are too few for a vocabulary of {vocab_size}; --set padded_vocab_size=null derives it",
            )
        if padded % tensor:
            self.bad("padded_vocab_size", f"{padded} rows cannot be split over model_parallel_size {tensor}")
        return {"vocab_size": vocab_size, "padded_vocab_size": padded}

    def numerics(self) -> dict[str, Any]:
        model, mup = self.model, self.config.mup
        norm = NORM_NAMES.get(model.norm, model.norm)
        eps = {"rmsnorm": model.rms_norm_epsilon, "scalenorm": model.scalenorm_epsilon}.get(
            norm, model.layernorm_epsilon
        )
        residual: Residual = "sequential"
        if model.gpt_j_residual:
            residual = "parallel_tied" if model.gpt_j_tied else "parallel"
        bias = model.use_bias_in_attn_linear
        return {
            "norm": norm,
            "norm_eps": eps,
            "norm_bias": model.use_bias_in_norms,
            "activation": "gelu_tanh" if model.bias_gelu_fusion and model.activation == "gelu" else model.activation,
            "residual": residual,
            "tie_embeddings": not model.no_weight_tying,
            "qkv_bias": bias if model.use_bias_in_qkv is None else model.use_bias_in_qkv,
            "attn_out_bias": bias if model.use_bias_in_attn_out is None else model.use_bias_in_attn_out,
            "mlp_bias": model.use_bias_in_mlp,
            "pos_emb": model.pos_emb,
            "rotary_pct": model.rotary_pct,
            "rotary_base": model.rotary_emb_base,
            "rpe_num_buckets": model.rpe_num_buckets,
            "rpe_max_distance": model.rpe_max_distance,
            "learned_position_offset": model.opt_pos_emb_offset,
            "apply_query_key_layer_scaling": model.apply_query_key_layer_scaling,
            "hidden_dropout": model.hidden_dropout,
            "attention_dropout": model.attention_dropout,
            "init_method": model.init_method,
            "output_layer_init_method": model.output_layer_init_method,
            "init_method_std": model.init_method_std,
            "use_mup": mup.use_mup,
            "mup_base_hidden_size": mup.mup_base_hidden_size,
            "mup_embedding_mult": mup.mup_embedding_mult,
            "mup_rp_embedding_mult": mup.mup_rp_embedding_mult,
            "mup_init_scale": mup.mup_init_scale,
            "mup_output_mult": 1 / mup.mup_output_temp,
            "mup_attn_mult": 1 / mup.mup_attn_temp,
        }


def _kinds(config: NeoxConfig, problems: Problems) -> tuple[str, ...]:
    layers = config.model.num_layers or 0
    given = config.model.attention_config
    if given is None:
        return ("global",) * layers
    place = config.places.get("attention_config")
    if all(isinstance(item, str) for item in given):
        kinds = list(given)
    else:
        try:
            kinds = [kind for item in given for kind in _repeat(item, layers)]
        except _Unresolved:
            problems.add(place, "attention_config", f'{given!r} is not of the form [[["global"], {layers or 12}]]')
            return ()
    for kind in dict.fromkeys(kinds):
        if kind not in KINDS:
            problems.add(place, "attention_config", f"{kind!r} is no kind of attention{suggestion(str(kind), KINDS)}")
    if layers and len(kinds) != layers:
        problems.add(place, "attention_config", f"gives {len(kinds)} layers but num_layers is {layers}")
    return tuple(kinds)


def _repeat(item: Any, layers: int) -> list[str]:
    if not (isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], list | tuple) and item[0]):
        raise _Unresolved
    kinds, count = item
    if not all(isinstance(kind, str) for kind in kinds):
        raise _Unresolved
    if count == "all":
        return [kinds[i % len(kinds)] for i in range(layers)]
    if isinstance(count, bool) or not isinstance(count, int):
        raise _Unresolved
    return list(kinds) * count
