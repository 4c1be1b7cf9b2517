# SPDX-License-Identifier: Apache-2.0
"""Weights in the blocked layout that oneDNN's kernels read fastest: for a model that will only be run, on a CPU.

Decoding is bound by reading the weights once a token, and the plain layout reaches less than half of the memory
bandwidth there. A packed product of a row is also the same, bit for bit, whatever other rows are in the batch, if there
are at least `LEAST_ROWS` of them; so that a text does not depend on the batch it was made in.

What remains of a step is the time to launch its small operations, so the kernels take over what they can: the
activation behind a product, and the residual added to one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libneox import host_memory
from libneox.errors import UsageError
from libneox.model import KVCache, Transformer
from libneox.model.attention import attend
from libneox.model.transformer import MLP, Attention, Block, Context, Linear, activate

if TYPE_CHECKING:
    from libneox.run_directory import CheckpointRef

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_ROWS = 4  # fewer rows are not faster, and use other kernels
PACKED_FOR = 16  # rows the layout is chosen for; good from 4 to 512
FUSED = {  # activations that the kernels know, and their names for them
    "identity": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "sigmoid": ("sigmoid", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}


class PackedLinear(nn.Module):
    """A linear map whose weight [out, in] is packed once. No gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.in_features = weight.shape[1]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        return self.rows(at_least(rows, LEAST_ROWS))[:count].view(*x.shape[:-1], -1)

    def rows(self, x_RI: Tensor, activation: str = "identity") -> Tensor:
        """[R, in] -> [R, out] with one of `FUSED` behind it; R is at least `LEAST_ROWS`."""
        name, form = FUSED[activation]
        return torch.ops.mkldnn._linear_pointwise.default(x_RI, self.packed, self.bias, name, [], form)

    def rows_plus(self, x_RI: Tensor, other_RO: Tensor) -> Tensor:
        """The product and `other`, added before the sum is rounded."""
        return torch.ops.mkldnn._linear_pointwise.binary(x_RI, other_RO, self.packed, self.bias, "add")


def at_least(x_RD: Tensor, rows: int) -> Tensor:
    """[max(R, rows), D]: more rows, of any value, if there are too few."""
    count = x_RD.shape[0]
    if count >= rows:
        return x_RD
    return x_RD.expand(rows, -1) if count == 1 else F.pad(x_RD, (0, 0, 0, rows - count))


class PackedTransformer(Transformer):
    """A transformer with packed weights; made by `prepacked`. The same arithmetic in fewer operations, on rows [R, D]
    that stay padded to `LEAST_ROWS` from the first block to the last."""

    def run_blocks(self, x_BTD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """All blocks: [B, T, D] in and out."""
        shape = x_BTD.shape
        count = shape[0] * shape[1]
        x_RD = at_least(x_BTD.reshape(count, -1), LEAST_ROWS).contiguous()
        turn = None if context.rotary is None else _turn(*context.rotary, self.dtype if cache is None else cache.dtype)
        for block in self.layers:
            x_RD = _block(block, x_RD, context, turn, cache, (shape[0], shape[1]))  # type: ignore[arg-type]
        return x_RD[:count].view(shape)


Turn = tuple[Tensor, Tensor]  # what to multiply pairs, and swapped pairs, with: [(B,) T, 1, 2, R/2]


def _turn(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Turn:
    return torch.stack((cos, cos), dim=-2).to(dtype), torch.stack((-sin, sin), dim=-2).to(dtype)


def _rotate_(x_BTNH: Tensor, turn: Turn) -> None:
    """`libneox.model.positions.rotate` in place."""
    straight, swapped = turn
    half = straight.shape[-1]
    pairs = x_BTNH.narrow(-1, 0, 2 * half).view(*x_BTNH.shape[:-1], 2, half)
    other = pairs.flip(-2)
    pairs.mul_(straight).addcmul_(other, swapped)


def _block(
    block: Block, x_RD: Tensor, context: Context, turn: Turn | None, cache: KVCache | None, shape: tuple[int, int]
) -> Tensor:
    """`Block.forward` on rows."""
    normed_RD = block.attn_norm(x_RD)
    attended_RD = _attention(block.attn, normed_RD, x_RD, context, turn, cache, shape)
    if block.residual == "sequential":
        normed_RD = block.mlp_norm(attended_RD)
    elif block.residual == "parallel":
        normed_RD = block.mlp_norm(x_RD)
    return _mlp(block.mlp, normed_RD, attended_RD)


def _attention(
    attn: Attention,
    normed_RD: Tensor,
    x_RD: Tensor,
    context: Context,
    turn: Turn | None,
    cache: KVCache | None,
    shape: tuple[int, int],
) -> Tensor:
    """x and its attention, added."""
    # narrow, not split or [:], which are Python functions: at this size calling is most of the cost
    count = shape[0] * shape[1]
    qkv_RX = attn.qkv.rows(normed_RD).narrow(0, 0, count)
    if cache is not None:
        qkv_RX = qkv_RX.to(cache.dtype)
    qkv = qkv_RX.view(*shape, -1, attn.head_dim)
    heads = qkv.shape[2]
    kv_heads = heads // (attn.queries_per_kv + 2)
    qk, queries = qkv.narrow(2, 0, heads - kv_heads), heads - 2 * kv_heads
    if attn.qk_norm_kind != "none":
        qk = attn.normalise(qk.narrow(2, 0, queries), qk.narrow(2, queries, kv_heads))
    if turn is not None:
        _rotate_(qk, turn)
    q_BTNH, k_BTKH = qk.narrow(2, 0, queries), qk.narrow(2, queries, kv_heads)
    k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), qkv.narrow(2, heads - kv_heads, kv_heads).transpose(1, 2)
    if cache is not None:
        k_BKSH, v_BKSH = cache.update(attn.index, k_BKSH, v_BKSH)
    mixed_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, context.pattern, scale=attn.scale)
    mixed_RD = at_least(mixed_BTNH.reshape(count, -1).to(x_RD.dtype), x_RD.shape[0])
    return attn.out.rows_plus(mixed_RD, x_RD)


def _mlp(mlp: MLP, normed_RD: Tensor, x_RD: Tensor) -> Tensor:
    """x and the MLP of its norm, added."""
    if mlp.gated:
        up_RF, gate_RF = mlp.up.rows(normed_RD).chunk(2, dim=-1)
        inner_RF = activate(gate_RF, mlp.activation) * up_RF
    elif mlp.activation in FUSED:
        inner_RF = mlp.up.rows(normed_RD, mlp.activation)
    else:
        inner_RF = activate(mlp.up.rows(normed_RD), mlp.activation)
    return mlp.down.rows_plus(inner_RF, x_RD)


def can_prepack(model: Transformer) -> bool:
    """Whether this machine and torch have packed kernels for the model's device and dtype."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if any(type(block.attn.qkv) is not Linear for block in model.layers):  # somebody put other layers in its place
        return False
    return model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and has_bfloat16())


def is_slow(model: Transformer) -> bool:
    """Whether this CPU has no hardware for the model's dtype, so that it is faster in float32."""
    half = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and not has_bfloat16())
    return half and model.device.type == "cpu"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def load_packed(
    source: str | os.PathLike[str] | CheckpointRef, *, device: str, dtype: str = "auto", **options: Any
) -> Transformer:
    """`libneox.load_model` for a model that will only be run: packed where that is faster.

    Args:
        device: cpu, cuda or cuda:N.
        dtype: one of DTYPES; auto is the stored one, or float32 where the CPU has no hardware for that.
        options: further arguments of `load_model`.
    Raises:
        UsageError: no such device or dtype; and what `load_model` raises.
    """
    from libneox.checkpoint.load import load_model

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    check_device(device)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    model = load_model(source, dtype=wanted, device=device, **options)
    if dtype == "auto" and is_slow(model):
        model = model.float()
    return prepacked(model, consume=True)


def check_device(name: str) -> None:
    """Raise UsageError unless this is a device that is here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device {name}: there are {count} GPUs here" if count else f"device {name}: no GPU here")


def prepacked(model: Transformer, *, consume: bool = False) -> Transformer:
    """A model that computes the same with packed weights; `model` itself if there are no kernels for it.

    Everything but the linear maps is shared with `model`.

    Args:
        consume: take each weight out of `model` as it is packed, so that memory never holds two of all; `model` cannot
            be used afterwards.
    """
    if isinstance(model, PackedTransformer) or not can_prepack(model) or not model.is_whole:
        return model
    with torch.device("meta"):
        packed = PackedTransformer(model.config).eval()
    packed.attention, packed.slopes = model.attention, model.slopes
    with host_memory.in_huge_pages():
        for name, module in list(model.named_modules()):
            path, _, leaf = name.rpartition(".")
            if isinstance(module, Linear):
                setattr(packed.get_submodule(path), leaf, PackedLinear(module.weight, module.bias))
                if consume:
                    module.weight = None  # type: ignore[assignment]
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    setattr(packed.get_submodule(name), key, parameter)
        if model.config.tie_embeddings:
            packed.head = PackedLinear(model.embed.weight, None)
    return packed
