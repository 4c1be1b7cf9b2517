# SPDX-License-Identifier: Apache-2.0
"""The one seam between the model and attention kernels.

`Pattern` says which keys a query sees and what is added to its scores: built once a forward pass, used by all layers.
`attend` runs it on a backend: `sdpa` (default), `flash` (the flash-attn package), `flex` (FlexAttention, which needs no
mask in memory), `reference` (a few lines of plain arithmetic that the tests compare the others with).
On a GPU `sdpa` takes documents packed into a sequence to torch's kernel for sequences of various lengths, which does
no work between them, instead of to a mask. All of them take the softmax in float32.

Suffixes: B batch, N query heads, K key/value heads, T query positions, S key positions, H head dimension, E bounds of
documents.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from libneox.errors import InputMissing, UsageError
from libneox.model import cpu_attention
from libneox.model.documents import document_numbers

Backend = Literal["sdpa", "flash", "flex", "reference"]
BACKENDS = ("sdpa", "flash", "flex", "reference")
VARLEN_HEAD_DIM = 256  # at most, and a multiple of 8
_varlen = True


def use_varlen(on: bool) -> None:
    """Choose for this process whether `sdpa` may take documents to the kernel for sequences of various lengths."""
    global _varlen
    _varlen = on


class Pattern(NamedTuple):
    """Which keys a query sees. Without `mask` it is plainly causal, the last query beside the last key."""

    backend: Backend | Literal["varlen"] = "sdpa"
    mask: Any = None  # bool or float Tensor [1 or B, 1 or N, T, S]; for flex (BlockMask, score_mod)
    window: int | None = None  # for flash and varlen, which need no mask
    slopes_N: Tensor | None = None  # for flash
    cu_seqlens_E: Tensor | None = None  # for varlen
    kernel: Callable[..., Tensor] | None = None  # for varlen


class Visibility(NamedTuple):
    """What a pattern is made of. `start`, the column of the first query, is a tensor [] in captured graphs."""

    queries: int
    keys: int
    start: int | Tensor = 0
    window: int | None = None
    pad_B: Tensor | None = None  # columns of padding on the left of each row
    cu_seqlens_E: Tensor | None = None  # documents in `batch` rows; a query sees its own document only
    slopes_N: Tensor | None = None  # ALiBi
    bias_SN: Tensor | None = None  # added to a score by distance (RPE)
    batch: int = 1
    head_dim: int = 1
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether nothing but causality masks, and kernels can do that without a mask."""
        aligned = isinstance(self.start, int) and (self.queries == 1 or self.start == 0)
        full = aligned and self.keys == (self.start + self.queries if isinstance(self.start, int) else -1)
        wide = self.window is None or self.window >= self.keys
        return full and wide and self.pad_B is None and self.cu_seqlens_E is None

    @property
    def biased(self) -> bool:
        """Whether something is added to the scores."""
        return self.slopes_N is not None or self.bias_SN is not None

    def documents_BS(self) -> Tensor | None:
        """Document number of every column, if there are documents."""
        if self.cu_seqlens_E is None:
            return None
        return document_numbers(self.cu_seqlens_E, self.batch, self.keys)


def make_pattern(backend: Backend, seen: Visibility, *, device: torch.device, dtype: torch.dtype) -> Pattern:
    """Build the cheapest form of `seen` that `backend` takes.

    Raises:
        UsageError: the backend has no such pattern.
    """
    if backend not in BACKENDS:
        raise UsageError(f"attention {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "flash":
        if isinstance(seen.start, Tensor):
            raise UsageError("flash attention takes no cache whose columns are not all filled; use sdpa")
        if seen.cu_seqlens_E is not None or seen.pad_B is not None or seen.bias_SN is not None:
            raise UsageError("flash attention has no document masks, padding or relative biases; use sdpa or flex")
        slopes = None if seen.slopes_N is None else seen.slopes_N.float()
        return Pattern(backend, None, seen.window, slopes)
    if seen.plain and not seen.biased:
        return Pattern("sdpa" if backend == "flex" else backend)
    if backend == "sdpa" and _takes_varlen(seen, device, dtype):
        return Pattern("varlen", None, seen.window, cu_seqlens_E=seen.cu_seqlens_E, kernel=_varlen_function())
    if backend == "flex":
        return Pattern(backend, _flex_pattern(seen, device))
    return Pattern(backend, _dense_mask(seen, device, dtype))


def _dense_mask(seen: Visibility, device: torch.device, dtype: torch.dtype) -> Tensor:
    """bool [1 or B, 1, T, S], or with biases `dtype` [1 or B, N, T, S] that holds -inf where nothing is seen."""
    query_T1 = torch.arange(seen.queries, device=device).unsqueeze(1) + seen.start
    key_S = torch.arange(seen.keys, device=device)
    distance_TS = query_T1 - key_S
    visible = distance_TS >= 0
    if seen.window is not None:
        visible = visible & (distance_TS < seen.window)
    visible = visible[None, None]
    documents = seen.documents_BS()
    if documents is not None:
        asking = documents[:, -seen.queries :]
        visible = visible & (asking[:, None, :, None] == documents[:, None, None, :])
    if seen.pad_B is not None:
        visible = visible & (key_S >= seen.pad_B[:, None, None, None])
        visible = visible | (distance_TS == 0)  # a padding query sees itself: no row of the softmax may be empty
    if not seen.biased:
        return visible
    bias_NTS = torch.zeros((), device=device)
    if seen.slopes_N is not None:
        bias_NTS = -seen.slopes_N[:, None, None] * distance_TS
    if seen.bias_SN is not None:
        bias_NTS = bias_NTS + seen.bias_SN[distance_TS.clamp(min=0)].permute(2, 0, 1)
    return bias_NTS[None].masked_fill(~visible, float("-inf")).to(dtype)


def _flex_pattern(seen: Visibility, device: torch.device) -> tuple[Any, Callable[..., Tensor] | None]:
    """The same as a FlexAttention block mask and score modification."""
    from torch.nn.attention.flex_attention import create_block_mask

    start, slopes, bias, documents = seen.start, seen.slopes_N, seen.bias_SN, seen.documents_BS()

    def visible(b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = t + start - s
        keep = distance >= 0
        if seen.window is not None:
            keep = keep & (distance < seen.window)
        if documents is not None:
            keep = keep & (documents[b, t + start] == documents[b, s])
        if seen.pad_B is not None:
            keep = (keep & (s >= seen.pad_B[b])) | (distance == 0)
        return keep

    def add_bias(score: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = t + start - s
        if slopes is not None:
            score = score - slopes[n] * distance
        if bias is not None:
            score = score + bias[distance.clamp(min=0), n]
        return score

    rows = next((len(x) for x in (documents, seen.pad_B) if x is not None), None)
    block_mask = create_block_mask(visible, rows, None, seen.queries, seen.keys, device=str(device))
    return block_mask, add_bias if seen.biased else None


def attend(
    q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, pattern: Pattern, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention of T queries over S keys; query head n reads key/value head n // (N/K).

    Args:
        q_BTNH: one dtype with k and v, which may have fewer heads.
        scale: multiplies q.k.
        dropout: of the probabilities.
    Returns:
        [B, T, N, H].
    """
    if pattern.backend == "flash":
        return _flash(q_BTNH, k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2), pattern, scale, dropout)
    if pattern.backend == "varlen":
        return _attend_varlen(q_BTNH, k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2), pattern, scale)
    if pattern.backend == "sdpa" and pattern.mask is None and cpu_attention.takes(q_BTNH, k_BKSH, dropout):
        return cpu_attention.attention(q_BTNH, k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2), scale)
    q_BNTH = q_BTNH.transpose(1, 2)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if pattern.backend == "flex":
        block_mask, score_mod = pattern.mask
        if dropout:
            raise UsageError("FlexAttention has no attention dropout; set attention_dropout to 0 or use sdpa")
        flex = _compiled_flex()
        out = flex(q_BNTH, k_BKSH, v_BKSH, score_mod, block_mask, scale=scale, enable_gqa=grouped)
    elif pattern.backend == "reference":
        out = _reference(q_BNTH, k_BKSH, v_BKSH, pattern.mask, scale, dropout)
    else:
        causal = pattern.mask is None and q_BNTH.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, pattern.mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _reference(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
    queries, keys, group = q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = k_BKSH.repeat_interleave(group, dim=1), v_BKSH.repeat_interleave(group, dim=1)
    scores = (q_BNTH.float() @ k_BNSH.float().mT) * scale
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return F.dropout(scores.softmax(-1), dropout).to(v_BNSH.dtype) @ v_BNSH


def _flash(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, pattern: Pattern, scale: float, dropout: float) -> Tensor:
    window = (-1, -1) if pattern.window is None else (pattern.window - 1, 0)
    return _flash_function()(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=window,
        alibi_slopes=pattern.slopes_N,
    )


def _takes_varlen(seen: Visibility, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's kernel for sequences of various lengths computes this."""
    if not _varlen or seen.cu_seqlens_E is None or seen.biased or seen.dropout or device.type != "cuda":
        return False
    if dtype not in (torch.float16, torch.bfloat16) or seen.head_dim > VARLEN_HEAD_DIM or seen.head_dim % 8:
        return False
    return _varlen_function() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_varlen(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, pattern: Pattern, scale: float) -> Tensor:
    length, bounds = q_BTNH.shape[1], pattern.cu_seqlens_E
    assert pattern.kernel is not None, "make_pattern has asked"
    window = (-1 if pattern.window is None else pattern.window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    out = pattern.kernel(q, k, v, bounds, bounds, length, length, scale=scale, window_size=window)
    return out.view(q_BTNH.shape)


@functools.cache
def _varlen_function() -> Callable[..., Tensor] | None:
    """torch's, if this one has a window (it is how causality is asked for) and a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None
    # fewer key/value heads are the kernel's own business; later versions want to be told that they are meant
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


@functools.cache
def _flash_function() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise InputMissing("flash attention was asked for and is not installed; pip install flash-attn") from error
    return flash_attn_func


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
