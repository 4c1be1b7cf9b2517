# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of continuations: many short questions to one model, with no work done twice.

Three things make this cheap. The head, which for small models is a third of all work, runs only where a continuation
is predicted. A context asked about several times (the choices of a question) is read once, into a cache that its
continuations share. What remains is batched by length, longest first, up to a number of tokens.

Suffixes: R rows (contexts or sequences), T positions, D hidden size, V vocabulary, P predicted positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from libneox.errors import DataError, OutOfMemory
from libneox.generation.scoring import token_scores

if TYPE_CHECKING:
    from libneox.model import Transformer


class Score(NamedTuple):
    """Natural logarithm of a continuation's probability, and whether greedy decoding would have produced it."""

    logprob: float
    greedy: bool


class Question(NamedTuple):
    """A continuation behind a context, as the model sees them."""

    index: int  # in the caller's list
    context: tuple[int, ...]  # at least one id
    continuation: tuple[int, ...]  # at least one id


class Batch(NamedTuple):
    """Contexts read together, each with the questions that share it."""

    groups: list[list[Question]]
    shared: bool  # read the contexts into a cache first, and their continuations behind it


class Limits(NamedTuple):
    """How much goes through the model at once."""

    tokens: int  # of a batch, padding included
    rows: int  # sequences of a batch


def score(
    model: Transformer, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], *, max_length: int, limits: Limits
) -> Iterator[list[tuple[int, Score]]]:
    """Score continuations given contexts, a batch at a time, in the order that is cheapest.

    Args:
        pairs: (context, continuation) ids, neither empty. A context too long for the model loses ids on its left.
        max_length: most ids the model reads at once.
    Yields:
        (index of the pair, its score) for every pair of a batch. Results do not depend on the batches.
    Raises:
        DataError: a continuation alone is longer than `max_length`.
        OutOfMemory: not even one sequence fits on the device; or a batch, if other processes hold parts of the model.
    """
    questions = [fit(index, *pair, max_length) for index, pair in enumerate(pairs)]
    batches = list(plan(questions, limits))
    while batches:
        batch = batches.pop(0)
        try:
            scores = run(model, batch)
        except torch.OutOfMemoryError as error:
            if not model.is_whole:  # the others are in the middle of this batch
                raise OutOfMemory("a batch does not fit the device; lower --batch-size") from error
            batches[:0] = halve(batch, error)
            scores = None
        if scores is None:
            torch.cuda.empty_cache()  # not while the error holds the tensors of the batch
        else:
            yield scores


def fit(index: int, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Question:
    """Cut a context on its left so that all the model has to read is at most `max_length` ids."""
    if len(continuation) > max_length:
        raise DataError(
            f"a continuation of {len(continuation)} tokens does not fit the model's {max_length}; "
            "score long texts with a rolling task (output_type: loglikelihood_rolling)"
        )
    room = max_length + 1 - len(continuation)  # the last id is only predicted, never read
    return Question(index, tuple(context[-room:]), tuple(continuation))


def plan(questions: Iterable[Question], limits: Limits) -> Iterator[Batch]:
    """Group questions by context and make batches of similar length, longest first."""
    by_context: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        by_context.setdefault(question.context, []).append(question)
    alone = [group for group in by_context.values() if len(group) == 1]
    several = [
        group[at : at + limits.rows]  # more choices than rows: the context is read again for the next
        for group in by_context.values()
        if len(group) > 1
        for at in range(0, len(group), limits.rows)
    ]
    for groups, shared in ((alone, False), (several, True)):
        groups.sort(key=_length, reverse=True)
        batch: list[list[Question]] = []
        for group in groups:
            if batch and _too_much([*batch, group], limits):
                yield Batch(batch, shared)
                batch = []
            batch.append(group)
        if batch:
            yield Batch(batch, shared)


def _length(group: list[Question]) -> tuple[int, int]:
    return len(group[0].context), max(len(question.continuation) for question in group)


def _too_much(groups: list[list[Question]], limits: Limits) -> bool:
    rows = sum(map(len, groups))
    contexts = len(groups) * len(groups[0][0].context)
    behind = rows * max(len(question.continuation) for group in groups for question in group)
    return rows > limits.rows or contexts + behind > limits.tokens


def halve(batch: Batch, error: Exception) -> list[Batch]:
    """Split a batch that did not fit.

    Raises:
        OutOfMemory: there is nothing left to split.
    """
    if len(batch.groups) > 1:
        middle = len(batch.groups) // 2
        return [Batch(batch.groups[:middle], batch.shared), Batch(batch.groups[middle:], batch.shared)]
    (group,) = batch.groups
    if len(group) > 1:
        return [Batch([[question]], shared=False) for question in group]
    length = len(group[0].context) + len(group[0].continuation)
    raise OutOfMemory(f"one sequence of {length} tokens does not fit the device; lower --max-length") from error


@torch.inference_mode()
def run(model: Transformer, batch: Batch) -> list[tuple[int, Score]]:
    """Score one batch."""
    questions = list(itertools.chain.from_iterable(batch.groups))
    hidden = _shared_hidden if batch.shared else _plain_hidden
    predicted_PD = hidden(model, batch.groups)
    targets_P = torch.tensor([i for question in questions for i in question.continuation], device=model.device)
    logprobs_P, greedy_P = token_scores(model, predicted_PD, targets_P)
    lengths = [len(question.continuation) for question in questions]
    results = []
    for question, logprobs, greedy in zip(questions, logprobs_P.split(lengths), greedy_P.split(lengths), strict=True):
        results.append((question.index, Score(float(logprobs.sum()), bool(greedy.all()))))
    return results


def _plain_hidden(model: Transformer, groups: list[list[Question]]) -> Tensor:
    """Each sequence read whole, padded on the right, where causality keeps the padding out of sight."""
    rows = [(question.context + question.continuation)[:-1] for (question,) in groups]
    hidden_RTD = model.hidden(_padded(rows, model.device))
    picked = []
    for (question,), row, hidden_TD in zip(groups, rows, hidden_RTD, strict=True):
        picked.append(hidden_TD[len(row) - len(question.continuation) : len(row)])
    return torch.cat(picked)


def _shared_hidden(model: Transformer, groups: list[list[Question]]) -> Tensor:
    """Each context read once, padded on the left; then all continuations behind the cache of their contexts."""
    from libneox.model.cache import KVCache

    width = len(groups[0][0].context)
    tails = [question.continuation[:-1] for group in groups for question in group]
    longest = max(map(len, tails))
    contexts = [group[0].context for group in groups]
    pads = [width - len(context) for context in contexts]
    ids_RT = torch.tensor([[0] * pad + [*context] for pad, context in zip(pads, contexts, strict=True)])
    pad_R = torch.tensor(pads, device=model.device) if any(pads) else None
    cache = KVCache(
        model.config,
        len(groups),
        width + longest,
        dtype=model.dtype,
        device=model.device,
        pad_B=pad_R,
        kv_heads=model.kv_heads,
    )
    last_RD = model.hidden(ids_RT.to(model.device), cache=cache)[:, -1]
    owner = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=model.device)
    first_QD = last_RD[owner]
    if longest == 0:
        return first_QD
    cache.select(owner)
    hidden_QTD = model.hidden(_padded(tails, model.device), cache=cache)
    picked = []
    for tail, first_D, hidden_TD in zip(tails, first_QD, hidden_QTD, strict=True):
        picked += [first_D[None], hidden_TD[: len(tail)]]
    return torch.cat(picked)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [R, T], filled up on the right with 0."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], device=device)
