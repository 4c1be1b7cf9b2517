# SPDX-License-Identifier: Apache-2.0
"""The dense transformer: the GPT-NeoX, Pythia, GPT-2, Llama and Mistral shapes from one description.

Parameters are named and shaped as `ModelConfig.parameter_shapes()` lists them; `libneox.model.init` gives them values.
Nothing here knows of ranks, devices or precision policies. Head counts are taken from the tensors, so the same
forward runs on a shard whose `attn.qkv` and `mlp.up` have fewer rows and `attn.out` and `mlp.down` fewer columns.

Suffixes: B batch, T positions of this call, S positions seen (cache included), D hidden size, N query heads,
K key/value heads, H head dimension, F MLP width, V padded vocabulary, E bounds of documents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libneox.errors import UsageError
from libneox.model.attention import Backend, Pattern, Visibility, attend, make_pattern
from libneox.model.cache import KVCache
from libneox.model.positions import alibi_slopes, rotary_table, rotate, rpe_buckets, sinusoids, slopes_on
from libneox.model.products import linear
from libneox.model_config import GATED, PLAIN, ModelConfig

Rotary = tuple[Tensor, Tensor]


class Context(NamedTuple):
    """What all blocks share in one forward pass."""

    pattern: Pattern
    rotary: Rotary | None = None  # cos and sin, [T, 1, R/2] or [B, T, 1, R/2]


class Linear(nn.Linear):
    """nn.Linear that leaves its memory as it is: every parameter gets its value from init or a checkpoint."""

    def reset_parameters(self) -> None:
        """Do nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its memory as it is."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Norm(nn.Module):
    """layernorm, rmsnorm, scalenorm or non_parametric_layernorm over the last dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.eps, width = config.norm, config.norm_eps, config.hidden_size
        with_weight = self.kind != "non_parametric_layernorm"
        with_bias = self.kind == "layernorm" and config.norm_bias
        size = 1 if self.kind == "scalenorm" else width
        self.weight = nn.Parameter(torch.empty(size)) if with_weight else None
        self.bias = nn.Parameter(torch.empty(width)) if with_bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise each position; same shape and dtype."""
        if self.kind == "rmsnorm":
            return F.rms_norm(x_BTD, x_BTD.shape[-1:], self.weight, self.eps)
        if self.kind == "scalenorm":
            length = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
            return x_BTD / length.clamp(min=self.eps).to(x_BTD.dtype) * self.weight
        return F.layer_norm(x_BTD, x_BTD.shape[-1:], self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm over each head's H dimensions (`qk_norm: head`)."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(head_dim))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """Normalise each head."""
        return F.rms_norm(x_BTNH, x_BTNH.shape[-1:], self.weight, self.eps)


class JointNorm(nn.Module):
    """LayerNorm over groups of heads together (`qk_norm: joint`): GPT-NeoX normalises the heads of a rank as one."""

    def __init__(self, heads: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.eps, self.group_heads = eps, heads // groups
        self.weight = nn.Parameter(torch.empty(heads, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, head_dim))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """Normalise each group of heads."""
        normed = F.layer_norm(grouped := x_BTNH.unflatten(2, (-1, self.group_heads)), grouped.shape[-2:], eps=self.eps)
        return normed.flatten(2, 3) * self.weight + self.bias


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.head_dim, self.dropout = index, config.head_dim, config.attention_dropout
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        # muP: 1/H instead of 1/sqrt(H) (arXiv 2203.03466)
        self.scale = config.mup_attn_mult / self.head_dim if config.use_mup else self.head_dim**-0.5
        # Queries are shrunk by the layer's number before the product and scores grown after it, against fp16 overflow.
        self.shrink = max(1, index) if config.apply_query_key_layer_scaling else 1
        self.qkv = Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.qk_norm_kind = config.qk_norm
        if config.qk_norm == "joint":
            self.qk_norm = JointNorm(config.num_heads, config.head_dim, config.qk_norm_groups, config.norm_eps)
        elif config.qk_norm == "head":
            self.q_norm, self.k_norm = (HeadNorm(config.head_dim, config.norm_eps) for _ in range(2))
        self.out = Linear(config.qkv_sizes[0], config.hidden_size, bias=config.attn_out_bias)

    def forward(self, x_BTD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q_BTNH, k_BTKH, v_BTKH = self.projected(x_BTD, context)
        k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if cache is not None:
            k_BKSH, v_BKSH = cache.update(self.index, k_BKSH, v_BKSH)
            q_BTNH = q_BTNH.to(cache.dtype)
        if self.shrink != 1:
            q_BTNH = q_BTNH / self.shrink
        dropout = self.dropout if self.training else 0.0
        scale = self.scale * self.shrink
        mixed_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, context.pattern, scale=scale, dropout=dropout)
        return self.out(mixed_BTNH.flatten(2).to(x_BTD.dtype))

    def projected(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, N, H] and keys [B, T, K, H] as they meet, normalised and rotated, and values [B, T, K, H]."""
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))  # heads: N queries, K keys, K values
        kv_heads = qkv.shape[2] // (self.queries_per_kv + 2)
        qk, v_BTKH = qkv.split([qkv.shape[2] - kv_heads, kv_heads], dim=2)
        if self.qk_norm_kind != "none":
            qk = self.normalise(*qk.split([qk.shape[2] - kv_heads, kv_heads], dim=2))
        if context.rotary is not None:
            qk = rotate(qk, *context.rotary)
        q_BTNH, k_BTKH = qk.split([qk.shape[2] - kv_heads, kv_heads], dim=2)
        return q_BTNH, k_BTKH, v_BTKH

    def normalise(self, q_BTNH: Tensor, k_BTKH: Tensor) -> Tensor:
        """Apply the QK-norm: queries and keys, one behind the other."""
        if self.qk_norm_kind == "joint":  # one set of weights for both
            return torch.cat((self.qk_norm(q_BTNH), self.qk_norm(k_BTKH)), dim=2)
        return torch.cat((self.q_norm(q_BTNH), self.k_norm(k_BTKH)), dim=2)


class MLP(nn.Module):
    """Plain: down(act(up x)). Gated: down(act(gate x) * up x), with the rows of `gate` behind those of `up`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated, self.activation = config.gated, GATED.get(config.activation, config.activation)
        self.up = Linear(config.hidden_size, config.ffn_size * (2 if config.gated else 1), bias=config.mlp_bias)
        self.down = Linear(config.ffn_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gated:
            up_BTF, gate_BTF = self.up(x_BTD).chunk(2, dim=-1)
            return self.down(activate(gate_BTF, self.activation) * up_BTF)
        return self.down(activate(self.up(x_BTD), self.activation))


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation by GPT-NeoX's name."""
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "identity":
        return x
    plain = {"gelu": F.gelu, "silu": F.silu, "swish": F.silu, "relu": F.relu, "softsign": F.softsign}
    return (plain | {"mish": F.mish, "sigmoid": torch.sigmoid})[name](x)


class Block(nn.Module):
    """One layer. Its residual stream is [B, T, D] in and out."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.residual, self.dropout = config.residual, config.hidden_dropout
        self.attn_norm = Norm(config)
        self.attn = Attention(config, index)
        if config.residual != "parallel_tied":
            self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """Sequential: attention, then the MLP on its result. Parallel: both on x, through two norms or (tied) one."""
        normed = self.attn_norm(x_BTD)
        attended = self._drop(self.attn(normed, context, cache))
        if self.residual == "sequential":
            x_BTD = x_BTD + attended
            return x_BTD + self._drop(self.mlp(self.mlp_norm(x_BTD)))
        normed = normed if self.residual == "parallel_tied" else self.mlp_norm(x_BTD)
        return x_BTD + attended + self._drop(self.mlp(normed))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


class Transformer(nn.Module):
    """A decoder-only language model.

    Memory of the parameters is not initialised; call `init_weights` or load a checkpoint.

    Attributes:
        config: what it was built from.
        attention: backend of `libneox.model.attention`, may be changed at any time.
        slopes: ALiBi slopes of the query heads held here (all of them, unless sharded).
        kv_heads: key/value heads held here, likewise.
        is_first, is_last: whether the embedding, and the final norm with the head, are here (`libneox.model.part`).
    """

    is_first = is_last = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_config(config)
        self.config = config
        self.attention: Backend = "sdpa"
        self.slopes = alibi_slopes(config.num_heads) if config.pos_emb == "alibi" else ()
        self.kv_heads = config.num_kv_heads
        self.embed = Embedding(config.padded_vocab_size, config.hidden_size)
        if config.pos_emb == "learned":
            rows = config.max_position_embeddings + config.learned_position_offset
            self.pos_embed = Embedding(rows, config.hidden_size)
        if config.pos_emb == "rpe":
            self.rpe = Embedding(config.rpe_num_buckets, config.num_heads)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_norm = Norm(config)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the embedding if tied: what the loss multiplies hidden states with."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def is_whole(self) -> bool:
        """Whether all heads are here; other processes hold the rest otherwise."""
        return self.kv_heads == self.config.num_kv_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.embed.weight.device

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cu_seqlens_E: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score every next token: float32 logits [B, T, V]. Arguments as of `hidden`."""
        hidden_BTD = self.hidden(ids_BT, positions_BT=positions_BT, cu_seqlens_E=cu_seqlens_E, cache=cache)
        return self.logits(hidden_BTD)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cu_seqlens_E: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run everything but the head.

        Args:
            ids_BT: int64 token ids.
            positions_BT: int64; default: 0..T-1, or with a cache the positions that follow, left padding discounted.
            cu_seqlens_E: int32; a position sees its own document only (`libneox.model.documents`); not with a cache.
            cache: keys and values of what came before; T columns are added to it.
        Returns:
            [B, T, D], normalised and scaled: logits are its product with `head_weight`.
        """
        if cache is not None:
            cache.room_for(ids_BT.shape[1])
        context = self.context(
            ids_BT.shape[1],
            batch=ids_BT.shape[0],
            positions_BT=positions_BT,
            cu_seqlens_E=cu_seqlens_E,
            cache=cache,
        )
        x_BTD = self.embedded(ids_BT, positions_BT=positions_BT, cache=cache)
        x_BTD = self.run_blocks(x_BTD, context, cache)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        return self.normed(x_BTD)

    def run_blocks(self, x_BTD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """All blocks: [B, T, D] in and out."""
        for block in self.layers:
            x_BTD = block(x_BTD, context, cache)
        return x_BTD

    def embedded(self, ids_BT: Tensor, *, positions_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Embed tokens and, where the model adds them, positions: [B, T, D], the first block's input."""
        positions = None
        if self.config.pos_emb in ("learned", "sinusoidal"):
            positions = self._positions(ids_BT.shape[1], positions_BT, cache)
        table = self.pos_embed if self.config.pos_emb == "learned" else None
        return embed_ids(self.config, self.embed, table, ids_BT, positions, training=self.training)

    def context(
        self,
        length: int,
        *,
        batch: int = 1,
        positions_BT: Tensor | None = None,
        cu_seqlens_E: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Context:
        """Rotary angles and attention pattern of one forward pass over `length` positions.

        Args:
            batch: rows that `cu_seqlens_E` is of.
        """
        config, start, keys = self.config, 0, length
        if cache is not None:
            start = cache.start if cache.whole else cache.length
            keys = cache.capacity if cache.whole else cache.length + length
        seen = Visibility(
            queries=length,
            keys=keys,
            start=start,
            window=config.sliding_window,
            pad_B=None if cache is None else cache.pad_B,
            cu_seqlens_E=cu_seqlens_E,
            slopes_N=slopes_on(self.slopes, self.device) if self.slopes else None,
            bias_SN=self._relative_bias(keys) if config.pos_emb == "rpe" else None,
            batch=batch,
            head_dim=config.head_dim,
            dropout=config.attention_dropout if self.training else 0.0,
        )
        dtype = self.dtype if cache is None else cache.dtype
        pattern = make_pattern(self.attention, seen, device=self.device, dtype=dtype)
        return Context(pattern, self._rotary(length, positions_BT, cache))

    def normed(self, x_BTD: Tensor) -> Tensor:
        """The last block's output, normalised and (muP) scaled for the head."""
        hidden_BTD, scale = self.final_norm(x_BTD), self.config.output_scale
        return hidden_BTD if scale == 1.0 else hidden_BTD * scale

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Apply the head: float32 [B, T, V]."""
        if self.head is None:
            return F.linear(hidden_BTD, self.embed.weight).float()
        return self.head(hidden_BTD).float()

    def _positions(self, length: int, positions_BT: Tensor | None, cache: KVCache | None) -> Tensor:
        """[T], or [B, T] where rows differ."""
        if positions_BT is not None:
            return positions_BT
        columns = torch.arange(length, device=self.device)
        if cache is None:
            return columns
        columns = columns + (cache.start if cache.whole else cache.length)
        return columns if cache.pad_B is None else (columns - cache.pad_B[:, None]).clamp(min=0)

    def _rotary(self, length: int, positions_BT: Tensor | None, cache: KVCache | None) -> Rotary | None:
        if not self.config.rotary_dims:
            return None
        if cache is not None and positions_BT is None:
            cos, sin = cache.rotary  # type: ignore[misc]
            if cache.pad_B is None and not cache.whole:
                at = slice(cache.length, cache.length + length)
                return cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)
            positions = self._positions(length, None, cache)
            return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        cos, sin = rotary_table(self.config, self._positions(length, positions_BT, cache), self.dtype)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _relative_bias(self, keys: int) -> Tensor:
        distances = torch.arange(keys, device=self.device)
        buckets = rpe_buckets(distances, self.config.rpe_num_buckets, self.config.rpe_max_distance)
        return self.rpe(buckets) * math.sqrt(self.config.head_dim)


def embed_ids(
    config: ModelConfig,
    embed: nn.Module,
    pos_embed: nn.Module | None,
    ids_BT: Tensor,
    positions: Tensor | None,
    *,
    training: bool,
) -> Tensor:
    """[B, T, D] of tokens and, for learned and sinusoidal encodings, of `positions` [T] or [B, T]."""
    x_BTD = embed(ids_BT)
    if pos_embed is not None and positions is not None:
        x_BTD = x_BTD + pos_embed(positions + config.learned_position_offset) * config.mup_rp_embedding_mult
    elif config.pos_emb == "sinusoidal" and positions is not None:
        x_BTD = x_BTD + sinusoids(positions, config.hidden_size, x_BTD.dtype)
    if config.mup_embedding_mult != 1.0:
        x_BTD = x_BTD * config.mup_embedding_mult
    return F.dropout(x_BTD, config.hidden_dropout) if training and config.hidden_dropout else x_BTD


def check_config(config: ModelConfig) -> None:
    """Raise UsageError, naming every fault, unless the numbers of `config` fit each other."""
    faults = []
    if config.num_heads % config.num_kv_heads:
        faults.append(f"{config.num_kv_heads} key/value heads do not divide {config.num_heads} heads")
    if config.rotary_dims % 2:
        faults.append(f"an odd number of rotated dimensions ({config.rotary_dims}); change rotary_pct")
    if config.activation not in (*PLAIN, *GATED):
        faults.append(f"activation {config.activation!r} is unknown; use one of {', '.join((*PLAIN, *GATED))}")
    if config.qk_norm == "joint" and config.num_kv_heads != config.num_heads:
        faults.append("a joint QK-norm has one weight for queries and keys and needs as many key/value heads as heads")
    if config.num_heads % config.qk_norm_groups:
        faults.append(f"{config.qk_norm_groups} QK-norm groups do not divide {config.num_heads} heads")
    if config.pos_emb == "sinusoidal" and config.hidden_size % 2:
        faults.append("sinusoidal positions need an even hidden_size")
    if config.sliding_window is not None and config.sliding_window < 1:
        faults.append("a sliding window shorter than 1 sees nothing")
    if faults:
        raise UsageError("model: " + "; ".join(faults))
