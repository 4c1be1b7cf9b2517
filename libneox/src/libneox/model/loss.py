# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy that owns the head and never holds all logits.

The head's product, the softmax and both gradients are worked off a chunk of positions at a time, in a fixed order: the
result is deterministic, and memory for logits is bounded by `CHUNK_BYTES` whatever batch, length and vocabulary are.
A product wants many positions at once; the softmax, which reads its float32 logits again and again, as few as a cache
holds: it takes the chunk in blocks of `BLOCK_BYTES`.

Suffixes: M positions (B x T flattened), C positions of a chunk or block, D hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from libneox.model.products import product

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}  # of logits in the weights' dtype
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of logits in float32
_chunk_bytes: dict[str, int] = {}
SUM_ROWS = 2048  # rows of the head's gradient added at a time
HALF_SUM = 2048.0  # of the positions' weights in float16: with less small gradients vanish, with more sums overflow
IGNORE = -100


class Vocabulary:
    """Which tokens the rows of a head stand for: here all of them, in order. Of another one, rows may be elsewhere."""

    def find(self, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each label, and 1.0 where it is among the rows at hand, 0.0 where not (the row is any then)."""
        return labels_M, torch.ones_like(labels_M, dtype=torch.float32)

    def reduce(self, lse_C1: Tensor, target_C1: Tensor, held_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the whole vocabulary and the label's logit, from those of the rows at hand; float32 [C, 1].

        May overwrite its arguments, and may be a collective.
        """
        return lse_C1, target_C1


ALL = Vocabulary()


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    divisor: Tensor | None = None,
    z_loss: float = 0.0,
    vocabulary: Vocabulary = ALL,
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T)`, weighted as in GPT-NeoX: sum(ce * mask) / sum(mask).

    Gradients are computed together with the loss (when anything needs them), so the backward pass only scales them.

    Args:
        hidden_BTD: what the head is applied to, any float dtype; products are taken in it, softmax in float32.
        weight_VD: the head, or the tied embedding.
        labels_BT: int64; -100 is left out of the mean.
        mask_BT: weight of each position, float or bool; all ones if None.
        divisor: float32 scalar that sum(ce * mask) is divided by instead of sum(mask).
        z_loss: adds z_loss * mean(logsumexp^2) (PaLM, arXiv 2204.02311).
        vocabulary: what the rows of `weight_VD` are.
    Returns:
        float32 scalar; 0 if no position counts.
    """
    weights_BT = (labels_BT != IGNORE).float()
    if mask_BT is not None:
        weights_BT = weights_BT * mask_BT
    total = weights_BT.sum() if divisor is None else divisor
    total = torch.where(total > 0, total, torch.ones_like(total))
    hidden_MD, labels_M = hidden_BTD.flatten(0, -2), labels_BT.clamp(min=0).reshape(-1)
    if hidden_BTD.dtype != torch.float16:
        weights_M = (weights_BT / total).reshape(-1)
        return _WeightedLoss.apply(hidden_MD, weight_VD, labels_M, weights_M, z_loss, vocabulary)
    # float16 holds nothing small, and its loss scale comes with the backward pass: most of the division waits for that
    share = (HALF_SUM / total).clamp(max=1.0)
    weights_M = (weights_BT * share).reshape(-1)
    return _WeightedLoss.apply(hidden_MD, weight_VD, labels_M, weights_M, z_loss, vocabulary) / (total * share)


def token_losses(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, *, vocabulary: Vocabulary = ALL) -> Tensor:
    """Cross-entropy of every position, for losses that combine them in other ways than a weighted mean.

    The logits of a chunk are computed again in the backward pass. Same arguments as `linear_cross_entropy`.

    Returns:
        float32 [B, T]; 0 where the label is -100. Minus it is the log probability of the label.
    """
    labels = labels_BT.clamp(min=0).reshape(-1)
    losses = _TokenLosses.apply(hidden_BTD.flatten(0, -2), weight_VD, labels, vocabulary)
    return torch.where(labels_BT == IGNORE, 0.0, losses.view(labels_BT.shape))


def limit_chunks(device_type: str, megabytes: int | None) -> None:
    """Set for this process how much a chunk of logits takes; None: the default, 0: no limit."""
    _chunk_bytes.pop(device_type, None)
    if megabytes is not None:
        _chunk_bytes[device_type] = megabytes << 20 if megabytes else 1 << 62


def equal_parts(positions: int, most: int) -> Iterator[slice]:
    """Cut positions into parts of `most` or fewer, all of one size but for the last."""
    count = -(-positions // max(most, 1))
    size = -(-positions // max(count, 1))
    for begin in range(0, positions, max(size, 1)):
        yield slice(begin, min(begin + size, positions))


def _chunks(hidden_MD: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    most = _limit(CHUNK_BYTES | _chunk_bytes, hidden_MD) // (weight_VD.dtype.itemsize * len(weight_VD))
    return equal_parts(len(hidden_MD), most)


def _blocks(logits_CV: Tensor, vocabulary: Vocabulary) -> Iterator[slice]:
    if vocabulary is not ALL:  # a collective for each block would be too many
        return equal_parts(len(logits_CV), len(logits_CV))
    return equal_parts(len(logits_CV), _limit(BLOCK_BYTES, logits_CV) // (4 * logits_CV.shape[1]))


def _limit(table: dict[str, int], like: Tensor) -> int:
    return table.get(like.device.type, table["cuda"])


class _WeightedLoss(torch.autograd.Function):
    """sum over positions of weight * (ce + z * lse^2), with its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        weights_M: Tensor,
        z_loss: float,
        vocabulary: Vocabulary,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_MD) if need_hidden else None
        d_weight = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        rows_M, held_M = vocabulary.find(labels_M)
        for part in _chunks(hidden_MD, weight_VD):
            rows_C, held_C, weights_C = rows_M[part, None], held_M[part, None], weights_M[part, None]
            logits_CV = product(hidden_MD[part], weight_VD)
            for block in _blocks(logits_CV, vocabulary):
                here = logits_CV[block]
                exp_CV, max_C, lse_C, target_C = _softmax(here, rows_C[block], held_C[block], vocabulary)
                loss += (weights_C[block] * (lse_C - target_C + z_loss * lse_C.square())).sum()
                if need_hidden or need_weight:
                    slope_C = weights_C[block] * (1 + 2 * z_loss * lse_C)
                    exp_CV.mul_(slope_C * (max_C - lse_C).exp())
                    exp_CV.scatter_add_(-1, rows_C[block], -weights_C[block] * held_C[block])
                    _put_back(here, exp_CV)
            if d_hidden is not None:
                torch.mm(logits_CV, weight_VD, out=d_hidden[part])
            if need_weight:
                d_weight = _add_product(d_weight, logits_CV, hidden_MD[part])
        if need_weight:
            d_weight = torch.zeros_like(weight_VD) if d_weight is None else d_weight.to(weight_VD.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return _scaled(d_hidden, grads[0]), _scaled(d_weight, grads[0]), None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each position; the backward pass recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, vocabulary: Vocabulary) -> Tensor:
        losses_M = torch.empty(len(labels_M), dtype=torch.float32, device=hidden_MD.device)
        lse_M = torch.empty_like(losses_M)
        rows_M, held_M = vocabulary.find(labels_M)
        for part in _chunks(hidden_MD, weight_VD):
            rows_C, held_C = rows_M[part, None], held_M[part, None]
            logits_CV = product(hidden_MD[part], weight_VD)
            for block in _blocks(logits_CV, vocabulary):
                _, _, lse_C, target_C = _softmax(logits_CV[block], rows_C[block], held_C[block], vocabulary)
                lse_M[part][block] = lse_C.squeeze(-1)
                losses_M[part][block] = (lse_C - target_C).squeeze(-1)
        ctx.save_for_backward(hidden_MD, weight_VD, rows_M, held_M, lse_M)
        return losses_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_MD, weight_VD, rows_M, held_M, lse_M = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_MD) if need_hidden else None
        d_weight = None
        for part in _chunks(hidden_MD, weight_VD):
            lse_C, grads_C, rows_C, held_C = (x[part, None] for x in (lse_M, grads[0], rows_M, held_M))
            logits_CV = product(hidden_MD[part], weight_VD)
            for block in _blocks(logits_CV, ALL):
                d_CV = logits_CV[block].float().sub_(lse_C[block]).exp_()
                d_CV.scatter_add_(-1, rows_C[block], -held_C[block])
                _put_back(logits_CV[block], d_CV.mul_(grads_C[block]))
            if d_hidden is not None:
                torch.mm(logits_CV, weight_VD, out=d_hidden[part])
            if need_weight:
                d_weight = _add_product(d_weight, logits_CV, hidden_MD[part])
        return d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype), None, None


def _softmax(
    logits_CV: Tensor, rows_C1: Tensor, held_C1: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(logits - max), max, log-sum-exp and the label's logit, all float32. float32 logits are overwritten."""
    values_CV = logits_CV.float()
    target_C1 = values_CV.gather(-1, rows_C1)
    max_C1 = values_CV.amax(-1, keepdim=True)
    exp_CV = values_CV.sub_(max_C1).exp_()
    lse_C1 = max_C1 + exp_CV.sum(-1, keepdim=True).log()
    return exp_CV, max_C1, *vocabulary.reduce(lse_C1, target_C1, held_C1)


def _put_back(logits_CV: Tensor, d_CV: Tensor) -> None:
    """The gradient where the logits were; float32 ones are there already."""
    if logits_CV.dtype != d_CV.dtype:
        logits_CV.copy_(d_CV)


def _add_product(sum_VD: Tensor | None, d_CV: Tensor, hidden_CD: Tensor) -> Tensor:
    """sum + d.T @ hidden, summed in float32 whatever the factors are; a single product stays in their dtype."""
    if sum_VD is None:
        return d_CV.T @ hidden_CD
    if d_CV.dtype == torch.float32:
        return sum_VD.addmm_(d_CV.T, hidden_CD)
    sum_VD = sum_VD.float()
    added_VD = d_CV.T @ hidden_CD
    for some, more in zip(sum_VD.split(SUM_ROWS), added_VD.split(SUM_ROWS), strict=True):
        some += more  # mixed dtypes go through a copy, which is best kept in the cache
    return sum_VD


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    if gradient is None or (factor.device.type == "cpu" and float(factor) == 1.0):
        return gradient
    if gradient.dtype == torch.float16:  # which may not hold the factor
        return (gradient.float() * factor).to(gradient.dtype)
    return gradient * factor.to(gradient.dtype)
