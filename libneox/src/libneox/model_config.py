# SPDX-License-Identifier: Apache-2.0
"""What a model is, resolved: the numbers the transformer is built from. No torch.

`libneox.config` derives this from NeoX keys; converters derive it from Hugging Face configs. Nothing downstream
looks at NeoX keys to learn about the architecture.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Norm = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]
PosEmb = Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"]
Residual = Literal["sequential", "parallel", "parallel_tied"]
GATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu", "bilinear": "identity", "glu": "sigmoid"}
PLAIN = ("gelu", "gelu_tanh", "relu", "softsign", "swish", "mish", "silu")


@dataclasses.dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs of one training token in the two conventions of the field; always say which."""

    palm: int  # 6 N + 12 L h s, N = all parameters, attention counted in full (Chowdhery et al. 2022, appendix B)
    causal: int  # 6 N_matmul + 6 L h s: weights that are multiplied, and the half of attention that is computed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length; names and formulas as in transformers 5."""

    type: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense decoder-only transformer.

    Widths are true widths: `ffn_size` is the length of the vector between the two MLP matrices, whatever the
    legacy `intermediate_size` said; `sliding_window` is the number of keys a query sees, itself included
    (GPT-NeoX's `sliding_window_width` w keeps w+1 keys; Hugging Face's `sliding_window` is this number).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int  # ids the tokenizer can produce
    padded_vocab_size: int  # rows of the embedding
    seq_length: int
    max_position_embeddings: int

    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # layernorm only
    activation: str = "gelu"  # one of PLAIN or GATED; gelu is the erf form, gelu_tanh that of bias_gelu_fusion
    residual: Residual = "sequential"
    tie_embeddings: bool = False
    qkv_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True

    pos_emb: PosEmb = "rotary"
    rotary_pct: float = 1.0
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    learned_position_offset: int = 0  # OPT adds 2

    sliding_window: int | None = None
    qk_norm: Literal["none", "joint", "head"] = "none"  # joint: GPT-NeoX, LayerNorm over (heads, head_dim) together;
    #                                                     head: RMSNorm over head_dim, as in Qwen3
    qk_norm_groups: int = 1  # joint: heads are normalised in this many groups (GPT-NeoX: its tensor-parallel size)
    apply_query_key_layer_scaling: bool = False
    attention_softmax_in_fp32: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    init_method: str = "normal"
    output_layer_init_method: str = "scaled_normal"
    init_method_std: float = 0.02

    use_mup: bool = False
    mup_base_hidden_size: int | None = None
    mup_embedding_mult: float = 1.0
    mup_rp_embedding_mult: float = 1.0
    mup_init_scale: float = 1.0
    mup_output_mult: float = 1.0
    mup_attn_mult: float = 1.0

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate into its hidden layer."""
        return self.activation in GATED

    @property
    def rotary_dims(self) -> int:
        """Leading dimensions of each head that are rotated (GPT-NeoX: int(head_dim * rotary_pct))."""
        return int(self.head_dim * self.rotary_pct) if self.pos_emb == "rotary" else 0

    @property
    def mup_width_mult(self) -> float:
        """How much wider than its muP base model this one is; 1 without muP."""
        return self.hidden_size / self.mup_base_hidden_size if self.use_mup and self.mup_base_hidden_size else 1.0

    @property
    def output_scale(self) -> float:
        """Factor on the final hidden states before the head (muP); 1 without muP."""
        return self.mup_output_mult / self.mup_width_mult if self.use_mup else 1.0

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the fused query, key and value projection, in this order."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every logical parameter by name, in model order: what a checkpoint holds and `num_parameters` sums.

        Linear weights are [out, in] as in torch. `attn.qkv` rows are all queries, then all keys, then all values;
        a gated `mlp.up` holds the up projection's rows, then the gate's (GPT-NeoX order).
        """
        d, q, kv, f = self.hidden_size, self.qkv_sizes[0], self.qkv_sizes[1], self.ffn_size
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.padded_vocab_size, d)}
        if self.pos_emb == "learned":
            shapes["pos_embed.weight"] = (self.max_position_embeddings + self.learned_position_offset, d)
        if self.pos_emb == "rpe":
            shapes["rpe.weight"] = (self.rpe_num_buckets, self.num_heads)
        for i in range(self.num_layers):
            at = f"layers.{i}."
            shapes |= self._norm_shapes(at + "attn_norm")
            shapes |= _linear(at + "attn.qkv", q + 2 * kv, d, self.qkv_bias)
            if self.qk_norm == "joint":
                for name in ("weight", "bias"):
                    shapes[f"{at}attn.qk_norm.{name}"] = (self.num_heads, self.head_dim)
            elif self.qk_norm == "head":
                shapes[at + "attn.q_norm.weight"] = shapes[at + "attn.k_norm.weight"] = (self.head_dim,)
            shapes |= _linear(at + "attn.out", d, q, self.attn_out_bias)
            if self.residual != "parallel_tied":
                shapes |= self._norm_shapes(at + "mlp_norm")
            shapes |= _linear(at + "mlp.up", 2 * f if self.gated else f, d, self.mlp_bias)
            shapes |= _linear(at + "mlp.down", d, f, self.mlp_bias)
        shapes |= self._norm_shapes("final_norm")
        if not self.tie_embeddings:
            shapes["head.weight"] = (self.padded_vocab_size, d)
        return shapes

    def num_parameters(self) -> int:
        """Logical parameters: each counted once, whatever the layout over ranks."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def num_parameters_non_embedding(self) -> int:
        """Parameters without token embedding, learned positions and output layer."""
        outside = ("embed.weight", "pos_embed.weight", "head.weight")
        return sum(math.prod(shape) for name, shape in self.parameter_shapes().items() if name not in outside)

    def num_parameters_matmul(self) -> int:
        """Weights that multiply activations: matrices of the blocks and the output layer, tied or not."""
        shapes = self.parameter_shapes()
        blocks = sum(math.prod(s) for name, s in shapes.items() if name.startswith("layers.") and _is_linear(name))
        return blocks + self.padded_vocab_size * self.hidden_size

    def flops_per_token(self, seq_length: int | None = None) -> FlopsPerToken:
        """Floating-point operations of one training token, forward and backward, without recomputation.

        Args:
            seq_length: tokens attended over; default that of the model.
        """
        seen = seq_length or self.seq_length
        attention = self.num_layers * self.num_heads * self.head_dim
        window = min(seen, self.sliding_window or seen)
        # a query at position i < window sees i+1 keys, the others see `window` keys: mean over the sequence
        mean_keys = window - window * (window - 1) / (2 * seen) if window < seen else seen / 2
        return FlopsPerToken(
            palm=6 * self.num_parameters() + 12 * attention * seen,
            causal=round(6 * self.num_parameters_matmul() + 12 * attention * mean_keys),
        )

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        if self.norm == "non_parametric_layernorm":
            return {}
        shapes: dict[str, tuple[int, ...]] = {
            name + ".weight": (1,) if self.norm == "scalenorm" else (self.hidden_size,)
        }
        if self.norm == "layernorm" and self.norm_bias:
            shapes[name + ".bias"] = (self.hidden_size,)
        return shapes


def _is_linear(name: str) -> bool:
    return name.endswith((".qkv.weight", ".out.weight", ".up.weight", ".down.weight"))


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": (rows, columns)} | ({name + ".bias": (rows,)} if bias else {})
