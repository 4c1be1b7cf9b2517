# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of given continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from libneox.errors import DataError
from libneox.model import Transformer
from libneox.model.loss import IGNORE

if TYPE_CHECKING:
    from libneox.tokenizer import Tokenizer

LOGITS_AT_ONCE = 1 << 24  # elements of a [P, V] block: 64 MB in float32


@dataclasses.dataclass(kw_only=True)
class Score:
    """How likely a continuation is after its context."""

    logprob: float  # sum over its tokens, natural logarithm
    is_greedy: bool  # every token was the most likely one
    tokens: list[int]
    token_logprobs: list[float]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, split where the context's own ids end; an empty context becomes the end-of-document token.

    The two are encoded as one text, because a token may not end where the context does. Spaces at the end of the
    context are moved to the continuation, whose first token they belong to.
    """
    stripped = context.rstrip(" ")
    continuation = context[len(stripped) :] + continuation
    context_ids = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    own = whole[len(context_ids) :]
    if not context_ids:
        if tokenizer.eod_id is None:
            raise DataError("the context is empty, and the tokenizer has no end-of-document token to begin with")
        context_ids = [tokenizer.eod_id]
    return context_ids, own


@torch.inference_mode()
def score(model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Score continuations in one batch, padded on the right, where nothing that counts sees the padding.

    Args:
        pairs: ids of a context, at least one, and of its continuation.
    Raises:
        DataError: a pair is longer than the model's context.
    """
    if not pairs:
        return []
    longest = max(len(context) + len(own) for context, own in pairs)
    if longest - 1 > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise DataError(f"context and continuation have {longest:,} tokens, the model's context {limit:,}")
    ids_BT = torch.zeros(len(pairs), max(longest - 1, 1), dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for row, (context, own) in enumerate(pairs):
        text = torch.tensor([*context, *own])
        ids_BT[row, : len(text) - 1] = text[:-1]
        labels_BT[row, len(context) - 1 : len(text) - 1] = text[len(context) :]
    hidden_BTD = model.hidden(ids_BT.to(model.device))
    counted_BT = (labels_BT != IGNORE).to(model.device)
    logprobs_P, greedy_P = token_scores(model, hidden_BTD[counted_BT], labels_BT.to(model.device)[counted_BT])
    logprobs, greedy = logprobs_P.tolist(), greedy_P.tolist()
    scores, at = [], 0
    for _, own in pairs:
        part = slice(at, at := at + len(own))
        scores.append(
            Score(
                logprob=sum(logprobs[part]),
                is_greedy=all(greedy[part]),
                tokens=list(own),
                token_logprobs=logprobs[part],
            )
        )
    return scores


def token_scores(model: Transformer, hidden_PD: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (float32 [P]) of each target, and whether it is the most probable id (bool [P]).

    Ids that only pad the vocabulary share in the probabilities, as in training, but are never the most probable.
    """
    if not len(targets_P):
        return targets_P.float(), targets_P.bool()
    logprobs, greedy = [], []
    step = max(1, LOGITS_AT_ONCE // model.config.padded_vocab_size)
    for part_PD, part_P in zip(hidden_PD.split(step), targets_P.split(step), strict=True):
        logits_PV = model.logits(part_PD)
        chosen_P = logits_PV.gather(1, part_P[:, None]).squeeze(1)
        logprobs.append(chosen_P - logits_PV.logsumexp(dim=1))
        greedy.append(logits_PV[:, : model.config.vocab_size].argmax(dim=1) == part_P)
    return torch.cat(logprobs).float(), torch.cat(greedy)
