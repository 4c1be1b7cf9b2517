# SPDX-License-Identifier: Apache-2.0
"""Keys that describe the model: its shape, its numerics, its initialisation."""

from dataclasses import dataclass
from typing import Any, Literal

from libneox.config.key import ignored, key, refused

NormName = Literal[
    "layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm", "te_rmsnorm", "te_layernorm"
]  # fmt: skip
ActivationName = Literal[
    "gelu", "relu", "softsign", "swish", "mish", "silu", "geglu", "reglu", "swiglu", "bilinear", "glu"
]
InitName = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init",
    "xavier_uniform", "xavier_normal", "orthogonal", "scaled_orthogonal",
]  # fmt: skip

_FUSED = "attention, norms and the MLP always use the fastest kernel that gives the same numbers"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The transformer: shape, norms, activations, positions, attention, initialisation."""

    num_layers: int | None = key(None, "Number of transformer blocks. Required.", minimum=1, maximum=100_000)
    hidden_size: int | None = key(None, "Width of the residual stream. Required.", minimum=1)
    num_attention_heads: int | None = key(None, "Number of query heads. Required; divides hidden_size.", minimum=1)
    num_kv_heads: int | None = key(
        None,
        "Number of key and value heads: fewer than num_attention_heads is grouped-query attention, 1 is multi-query.",
        minimum=1,
    )
    head_dim: int | None = key(None, "Width of one head; default hidden_size / num_attention_heads. New.", minimum=1)
    ffn_hidden_size: int | None = key(
        None, "True width of the MLP's hidden vector, gated or not. New; excludes intermediate_size.", minimum=1
    )
    intermediate_size: int | None = key(
        None,
        "MLP size as GPT-NeoX counts it (default 4 * hidden_size): a gated activation gets about a third of it. "
        "ffn_hidden_size says the true width.",
        minimum=1,
    )
    expansion_factor: float | None = key(None, "intermediate_size as a multiple of hidden_size.", above=0)
    mlp_multiple_of: int = key(1, "The MLP width is rounded up to a multiple of this.", minimum=1)
    seq_length: int | None = key(None, "Tokens of a training sample; default max_position_embeddings.", minimum=1)
    max_position_embeddings: int | None = key(
        None, "Longest sequence the model is made for; rows of a learned position table. Required.", minimum=1
    )
    vocab_size: int | None = key(
        None, "Ids the tokenizer can produce; normally read from the tokenizer. New.", minimum=1
    )
    padded_vocab_size: int | None = key(
        None,
        "Rows of the embedding. Fixed when a model is created and kept for ever; default: the vocabulary rounded up to "
        "a multiple of make_vocab_size_divisible_by * model_parallel_size.",
        minimum=1,
    )
    make_vocab_size_divisible_by: int = key(
        128, "Unit that the vocabulary is padded to, per tensor-parallel rank.", minimum=1
    )

    norm: NormName = key("layernorm", "Kind of every norm.")
    layernorm_epsilon: float = key(1e-5, "Epsilon of layernorm and non_parametric_layernorm.", above=0)
    rms_norm_epsilon: float = key(1e-8, "Epsilon of rmsnorm (Llama uses 1e-5 or 1e-6).", above=0)
    scalenorm_epsilon: float = key(1e-8, "Smallest vector length scalenorm divides by.", above=0)
    use_bias_in_norms: bool = key(True, "Whether layernorm has a bias.")
    layernorm_fusion: bool = ignored(False, "Apex layernorm kernel.", _FUSED)
    rmsnorm_fusion: bool = ignored(False, "Apex rmsnorm kernel.", _FUSED)

    activation: ActivationName = key(
        "gelu", "Activation of the MLP; geglu, reglu, swiglu, bilinear and glu are gated. See bias_gelu_fusion."
    )
    bias_gelu_fusion: bool = key(
        False, "gelu is the tanh approximation instead of the exact erf form, as in Pythia and GPT-NeoX-20B."
    )
    use_flashattn_swiglu: bool = ignored(False, "flash-attn's swiglu kernel.", _FUSED)
    use_bias_in_attn_linear: bool = key(True, "Whether the attention's linear layers have biases.")
    use_bias_in_qkv: bool | None = key(None, "Bias of the query, key and value projection alone. New.")
    use_bias_in_attn_out: bool | None = key(None, "Bias of the attention's output projection alone. New.")
    use_bias_in_mlp: bool = key(True, "Whether the MLP's linear layers have biases.")
    gpt_j_residual: bool = key(False, "Attention and MLP in parallel, both reading the block's input.")
    gpt_j_tied: bool = key(False, "With gpt_j_residual: attention and MLP share one norm.")
    no_weight_tying: bool = key(False, "Give the output layer its own matrix instead of the embedding's.")

    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = key("learned", "Position encoding.")
    rotary_pct: float = key(1.0, "Share of each head's dimensions that is rotated.", above=0, maximum=1)
    rotary_emb_base: float = key(10000, "Base (theta) of the rotary frequencies.", above=0)
    rope_scaling: dict[str, Any] | None = key(
        None,
        "Stretches rotary frequencies beyond the trained length. New.",
        sections={
            "type": "linear, ntk, yarn or llama3",
            "factor": "how many times longer",
            "original_max_position_embeddings": "length before stretching",
            "low_freq_factor": "llama3 only",
            "high_freq_factor": "llama3 only",
            "beta_fast": "yarn only",
            "beta_slow": "yarn only",
            "attention_factor": "yarn only",
        },
    )
    rotary_save_freqs_buffer: bool = ignored(
        False, "Keep inverse frequencies in checkpoints.", "checkpoints hold no derived values"
    )
    rope_fusion: bool = ignored(False, "Fused rotary kernel.", _FUSED)
    rpe_num_buckets: int = key(32, "Buckets of the T5 relative position bias.", minimum=2)
    rpe_max_distance: int = key(128, "Distance from which the T5 bias is constant.", minimum=2)
    opt_pos_emb_offset: int = key(0, "Offset into the learned position table; OPT uses 2.", minimum=0)

    attention_config: list[Any] | None = key(
        None, 'Kind of attention of each layer, for example [[["global"], 12]]; global and flash are the same to us.'
    )
    sparsity_config: dict[str, Any] | None = key(None, "Options of the block-sparse attention kinds.")
    sliding_window_width: int | None = key(None, "w: a token attends to itself and the w tokens before it.", minimum=0)
    use_qk_layernorm: bool = key(False, "Layer norm over all heads of queries and keys; the same as qk_norm: joint.")
    qk_norm: Literal["none", "joint", "head"] = key(
        "none", "Norm of queries and keys: joint (GPT-NeoX) or RMSNorm per head (Qwen3). New."
    )
    qk_norm_groups: int | None = key(
        None,
        "qk_norm joint: heads are normalised in so many groups. Fixed when a model is created; default "
        "model_parallel_size, as in GPT-NeoX. New.",
        minimum=1,
    )
    apply_query_key_layer_scaling: bool = key(False, "Divide attention scores by the layer's number, then undo it.")
    attention_softmax_in_fp32: bool = ignored(
        False, "Attention softmax in float32.", "the softmax always accumulates in float32"
    )
    attention_dropout: float = key(0.0, "Dropout of attention probabilities.", minimum=0, maximum=1)
    hidden_dropout: float = key(0.0, "Dropout after the embedding and each sublayer.", minimum=0, maximum=1)
    scaled_upper_triang_masked_softmax_fusion: bool = ignored(False, "Fused causal softmax kernel.", _FUSED)
    scaled_masked_softmax_fusion: bool = ignored(False, "Fused masked softmax kernel.", _FUSED)
    bias_dropout_fusion: bool = ignored(False, "Fused bias and dropout.", _FUSED)
    fused_kernels_build_path: str | None = ignored(None, "Where kernels are compiled.", "nothing is compiled")
    onnx_safe: bool = ignored(False, "Write gelu out in erf.", "gelu is the erf form anyway")

    init_method: InitName = key("normal", "Initialiser of embeddings and of matrices that read the residual stream.")
    output_layer_init_method: InitName = key(
        "scaled_normal", "Initialiser of matrices that write to the residual stream."
    )
    init_method_std: float = key(0.02, "Standard deviation of the normal initialisers.", above=0)
    use_cpu_initialization: bool = ignored(
        False, "Initialise on the CPU.", "a seed gives the same weights on every device and layout anyway"
    )

    num_unique_layers: int | None = refused(
        None, "Layers that share parameters.", "no version of GPT-NeoX shares parameters between layers"
    )
    param_sharing_style: str = refused(
        "grouped", "How layers share parameters.", "no version of GPT-NeoX shares parameters between layers"
    )
    soft_prompt_tuning: dict[str, Any] | None = key(
        None,
        "Train a soft prompt on a frozen model.",
        sections={
            "enabled": "true or false",
            "n_tokens": "length of the prompt",
            "num_tokens": "the same, as the documentation of GPT-NeoX called it",
            "init_string": "text whose embeddings start it",
            "init_range": "range of a random start",
        },
    )
    output_layer_parallelism: Literal["column"] = key("column", "How the output layer is split over ranks.")


@dataclass(frozen=True, kw_only=True)
class Mup:
    """Maximal update parametrisation: hyper-parameters that carry over from a narrow model to a wide one."""

    use_mup: bool = key(False, "Switch muP on.")
    mup_base_hidden_size: int | None = key(
        None, "hidden_size of the model whose hyper-parameters are used; required by use_mup. New.", minimum=1
    )
    mup_init_scale: float = key(1.0, "Multiplies every initialised matrix.", above=0)
    mup_embedding_mult: float = key(1.0, "Multiplies the token embedding's output.", above=0)
    mup_rp_embedding_mult: float = key(1.0, "Multiplies the position embedding's output.", above=0)
    mup_attn_temp: float = key(1.0, "Divides attention scores.", above=0)
    mup_output_temp: float = key(1.0, "Divides logits.", above=0)
    mup_width_scale: int = ignored(
        2, "Width ratio used to record base shapes.", "mup_base_hidden_size says all that is needed"
    )
    save_base_shapes: bool = refused(
        False, "Write a base shapes file and stop.", "there is no such file any more: set mup_base_hidden_size"
    )
    base_shapes_file: str | None = refused(
        None, "Base shapes file.", "there is no such file any more: set mup_base_hidden_size"
    )
    coord_check: bool = key(
        False,
        "Train four widths (the base, twice, four and eight times as wide) for three steps, write RUN/coord_check.png "
        "and .jsonl with the size of their activations, and stop.",
    )


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Mixture of experts."""

    moe_num_experts: int = key(1, "Experts of a mixture layer; 1 is a dense model.", minimum=1)
    moe_expert_interval: int = key(1, "Every how many layers one is a mixture.", minimum=1)
    moe_top_k: int = key(1, "Experts each token goes to.", minimum=1)
    moe_router_type: Literal["sinkhorn", "topk"] = key("sinkhorn", "How the router assigns tokens.")
    moe_jitter_eps: float | None = key(None, "Multiplicative noise of the router's input.", above=0)
    moe_lbl_in_fp32: bool = ignored(
        False, "Load balancing loss in float32.", "GPT-NeoX computes no load balancing loss"
    )


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """Mamba and RWKV layers, and gMLP."""

    mamba_selective_fp32_params: bool = key(True, "Keep A_log and D in float32.")
    mamba_use_bias_in_conv: bool = key(True, "Bias of the convolution.")
    mamba_use_bias_in_linears: bool = key(False, "Bias of the input and output projections.")
    mamba_selective_scan_fusion: bool = ignored(False, "Fused selective scan.", _FUSED)
    mamba_causal_conv_fusion: bool = ignored(False, "Fused convolution.", _FUSED)
    mamba_inner_func_fusion: bool = ignored(False, "Fused mixer.", _FUSED)
    dim_att: int | None = key(None, "Width of RWKV's time mixing; default hidden_size.", minimum=1)
    head_size: int | None = key(None, "Width of an RWKV head.", minimum=1)
    ffn_dim: int | None = key(None, "Width of RWKV's channel mixing.", minimum=1)
    gmlp_attn_dim: int = key(64, "Width of aMLP's attention.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TransformerEngine:
    """NVIDIA Transformer Engine modules and their FP8 recipe."""

    te_columnparallel: bool = key(False, "Transformer Engine's column-parallel linear layers.")
    te_rowparallel: bool = key(False, "Transformer Engine's row-parallel linear layers.")
    te_layernorm_mlp: bool = key(False, "Transformer Engine's fused norm and MLP.")
    te_mha: bool = key(False, "Transformer Engine's attention.")
    te_fp8_format: Literal["e4m3", "hybrid"] = key("hybrid", "FP8 number format.")
    te_fp8_wgrad: bool = key(True, "FP8 weight gradients.")
    te_fp8_amax_history_len: int = key(1, "Steps over which maxima are remembered.", minimum=1)
    te_fp8_amax_compute_algo: str = key("most_recent", "How a scale follows from the maxima.")
    te_fp8_margin: int = key(0, "Margin of the FP8 scale.")
    te_fp8_mha: bool = key(False, "FP8 attention.")
