# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of continuations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from libneox.errors import DataError
from libneox.generation.scoring import encode_pair, score
from libneox.model import Transformer
from libneox.tokenizer import Tokenizer


def test_scores_are_sums_of_log_probabilities(noise_model: Callable[..., Transformer], tokenizer: Tokenizer) -> None:
    model = noise_model()
    texts = [("hello", " world"), ("a longer context ", "b"), ("", "abc")]
    pairs = [encode_pair(tokenizer, *text) for text in texts]
    for (context, own), result in zip(pairs, score(model, pairs), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([context + own]))[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(own)), own]
        torch.testing.assert_close(torch.tensor(result.token_logprobs), expected, atol=1e-4, rtol=1e-4)
        assert result.logprob == pytest.approx(expected.sum().item(), abs=1e-3)
        assert not result.is_greedy


def test_greedy_continuation_is_known_as_such(noise_model: Callable[..., Transformer]) -> None:
    model = noise_model()
    ids = [5, 6, 7]
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1, :258].argmax()))
    assert score(model, [(ids[:3], ids[3:]), (ids[:3], [1, 1])])[0].is_greedy


def test_spaces_belong_to_the_continuation(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "ab ", "c") == ([99, 100], [34, 101])
    assert encode_pair(tokenizer, "", "c") == ([0], [101])


def test_too_long_is_refused(noise_model: Callable[..., Transformer]) -> None:
    model = noise_model()
    assert score(model, [([2] * 64, [3])])
    with pytest.raises(DataError, match="66 tokens"):
        score(model, [([2] * 64, [3, 3])])
    assert score(model, []) == []
