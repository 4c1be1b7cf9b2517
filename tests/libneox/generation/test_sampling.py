# SPDX-License-Identifier: Apache-2.0
"""Filters and draws: what may be drawn, how often, and from which random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from libneox.errors import UsageError
from libneox.generation.sampling import Sampling, choose, filtered, penalise, text_generator

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1, 0.0]]).log()


def kept(sampling: Sampling) -> list[int]:
    return filtered(LOGITS, sampling)[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3]),
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_k=99), [0, 1, 2, 3]),
        (Sampling(top_p=0.45), [0]),
        (Sampling(top_p=0.6), [0, 1]),  # the token that crosses p stays
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(min_p=0.3), [0, 1, 2]),
        (Sampling(top_k=3, top_p=0.8), [0, 1]),  # of the three kept, two sum to 0.83
    ],
)
def test_filters(sampling: Sampling, expected: list[int]) -> None:
    assert kept(sampling) == expected


def test_top_p_equals_transformers() -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(filtered(logits, Sampling(top_p=p)), TopPLogitsWarper(p)(None, logits))
        assert torch.equal(filtered(logits, Sampling(min_p=p)), MinPLogitsWarper(p)(None, logits))
    assert torch.equal(filtered(logits, Sampling(top_k=7)), TopKLogitsWarper(7)(None, logits))


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 50), torch.randint(0, 50, (2, 9))
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalise(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits))


def test_draws_follow_the_distribution() -> None:
    generators = [text_generator(0, i, 0) for i in range(4000)]
    drawn = choose(LOGITS.expand(4000, -1), Sampling(temperature=2.0), generators)
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]).sqrt()
    expected = weights / weights.sum()
    counts = torch.bincount(drawn, minlength=5) / 4000
    assert counts[4] == 0
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_greedy_draws_nothing() -> None:
    generator = text_generator(0, 0, 0)
    before = generator.get_state()
    assert choose(LOGITS, Sampling(), [generator]).tolist() == [0]
    assert torch.equal(generator.get_state(), before)


def test_texts_draw_on_their_own() -> None:
    states = {tuple(text_generator(*key).get_state().tolist()) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(states) == 4


@pytest.mark.parametrize(
    "fault", [{"temperature": 1e-40}, {"temperature": math.nan}, {"repetition_penalty": math.nan},
              {"repetition_penalty": math.inf}, {"min_p": math.nan}],
)  # fmt: skip
def test_numbers_that_would_make_no_probabilities(fault: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**fault)  # type: ignore[arg-type]


def test_all_faults_are_named() -> None:
    with pytest.raises(UsageError) as raised:
        Sampling(temperature=-1, top_k=-2, top_p=1.5, min_p=-0.1, repetition_penalty=0)
    for name in ("temperature", "top-k", "top-p", "min-p", "repetition penalty"):
        assert name in str(raised.value)
