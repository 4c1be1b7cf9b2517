# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy that owns the head and never holds all logits.

The head's product, the softmax and both gradients are worked off a few positions at a time, in a fixed order: the
result is deterministic, and memory for logits is bounded by `CHUNK_BYTES` whatever batch, length and vocabulary are.

Suffixes: M positions (B x T flattened), C positions of a chunk, D hidden size, V padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
IGNORE = -100


class Vocabulary:
    """Which tokens the rows of a head stand for: here all of them, in order. Of another one, rows may be elsewhere."""

    def find(self, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each label, and 1.0 where it is among the rows at hand, 0.0 where not (the row is any then)."""
        return labels_M, torch.ones_like(labels_M, dtype=torch.float32)

    def reduce(self, logits_CV: Tensor, rows_C1: Tensor, held_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the whole vocabulary and the label's logit, each float32 [C, 1]."""
        return logits_CV.logsumexp(-1, keepdim=True), logits_CV.gather(-1, rows_C1)


ALL = Vocabulary()


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
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
        z_loss: adds z_loss * mean(logsumexp^2) (PaLM, arXiv 2204.02311).
        vocabulary: what the rows of `weight_VD` are.
    Returns:
        float32 scalar; 0 if no position counts.
    """
    weights_BT = (labels_BT != IGNORE).float()
    if mask_BT is not None:
        weights_BT = weights_BT * mask_BT
    total = weights_BT.sum()
    weights_BT = weights_BT / torch.where(total > 0, total, torch.ones_like(total))
    labels = labels_BT.clamp(min=0).reshape(-1)
    return _WeightedLoss.apply(hidden_BTD.flatten(0, -2), weight_VD, labels, weights_BT.reshape(-1), z_loss, vocabulary)


def token_losses(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, *, vocabulary: Vocabulary = ALL) -> Tensor:
    """Cross-entropy of every position, for losses that combine them in other ways than a weighted mean.

    The logits of a chunk are computed again in the backward pass. Same arguments as `linear_cross_entropy`.

    Returns:
        float32 [B, T]; 0 where the label is -100. Minus it is the log probability of the label.
    """
    labels = labels_BT.clamp(min=0).reshape(-1)
    losses = _TokenLosses.apply(hidden_BTD.flatten(0, -2), weight_VD, labels, vocabulary)
    return torch.where(labels_BT == IGNORE, 0.0, losses.view(labels_BT.shape))


def chunk_rows(positions: int, vocabulary: int) -> int:
    """Positions worked off at a time: their float32 logits fill about CHUNK_BYTES. Equal sizes but for the last one."""
    most = max(1, CHUNK_BYTES // (4 * vocabulary))
    chunks = -(-positions // most)
    return -(-positions // max(chunks, 1))


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
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        rows_M, held_M = vocabulary.find(labels_M)
        size = chunk_rows(len(labels_M), len(weight_VD))
        for begin in range(0, len(labels_M), max(size, 1)):
            part = slice(begin, begin + size)
            rows_C, held_C, weights_C = rows_M[part, None], held_M[part, None], weights_M[part, None]
            logits_CV = (hidden_MD[part] @ weight_VD.T).float()
            lse_C, target_C = vocabulary.reduce(logits_CV, rows_C, held_C)
            loss += (weights_C * (lse_C - target_C + z_loss * lse_C.square())).sum()
            if not (need_hidden or need_weight):
                continue
            d_CV = logits_CV.sub_(lse_C).exp_()  # probabilities, where the logits were
            d_CV.mul_(weights_C * (1 + 2 * z_loss * lse_C))
            d_CV.scatter_add_(-1, rows_C, -weights_C * held_C)
            d_CV = d_CV.to(hidden_MD.dtype)
            if d_hidden is not None:
                torch.mm(d_CV, weight_VD, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_CV, hidden_MD[part])
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype))
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
        size = chunk_rows(len(labels_M), len(weight_VD))
        for begin in range(0, len(labels_M), max(size, 1)):
            part = slice(begin, begin + size)
            logits_CV = (hidden_MD[part] @ weight_VD.T).float()
            lse_C, target_C = vocabulary.reduce(logits_CV, rows_M[part, None], held_M[part, None])
            lse_M[part] = lse_C.squeeze(-1)
            losses_M[part] = (lse_C - target_C).squeeze(-1)
        ctx.save_for_backward(hidden_MD, weight_VD, rows_M, held_M, lse_M)
        return losses_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_MD, weight_VD, rows_M, held_M, lse_M = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_MD) if need_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        size = chunk_rows(len(lse_M), len(weight_VD))
        for begin in range(0, len(lse_M), max(size, 1)):
            part = slice(begin, begin + size)
            d_CV = (hidden_MD[part] @ weight_VD.T).float().sub_(lse_M[part, None]).exp_()
            d_CV.scatter_add_(-1, rows_M[part, None], -held_M[part, None])
            d_CV = d_CV.mul_(grads[0][part, None]).to(hidden_MD.dtype)
            if d_hidden is not None:
                torch.mm(d_CV, weight_VD, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_CV, hidden_MD[part])
        return d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype), None, None


def _add_product(sum_VD: Tensor, d_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += d.T @ hidden, summed in float32 whatever the factors are."""
    if d_CV.dtype == torch.float32:
        sum_VD.addmm_(d_CV.T, hidden_CD)
    else:
        sum_VD += d_CV.T @ hidden_CD


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * factor.to(gradient.dtype)
