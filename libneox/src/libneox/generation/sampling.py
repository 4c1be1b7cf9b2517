# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from logits.

Every text has a random generator of its own and takes one number a token from it, so what is drawn does not depend on
which other texts are in the batch. Suffixes: B rows, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from libneox.errors import UsageError

LEAST_TEMPERATURE = 1e-6  # logits over a smaller one would be infinite, and their probabilities no numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; all defaults: always the most likely one (greedy).

    Filters act in the order of the fields. As in GPT-NeoX, a filter without a temperature means temperature 1.

    Attributes:
        repetition_penalty: logits of tokens already in the text are divided by it if positive, multiplied if negative
            (CTRL, arXiv 1909.05858); 1 is off.
        temperature: logits are divided by it.
        top_k: keep the k most likely; 0 is off.
        top_p: keep the most likely until their sum crosses p, the crossing one included; 0 and 1 are off.
        min_p: keep those at least min_p times as likely as the most likely; 0 is off.
        seed: of the drawing.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.repetition_penalty < float("inf"):
            faults.append(f"repetition penalty {self.repetition_penalty} is not a number above 0")
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf")):
            faults.append(f"temperature {self.temperature} is neither 0 (greedy) nor at least {LEAST_TEMPERATURE}")
        if self.top_k < 0:
            faults.append(f"top-k {self.top_k} is negative")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name.replace('_', '-')} {getattr(self, name)} is not between 0 and 1")
        if faults:
            raise UsageError("; ".join(faults))

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return not (self.temperature or self.top_k or self.top_p or self.min_p)


def text_generator(seed: int, prompt: int, copy: int) -> torch.Generator:
    """The random numbers of one text, by its prompt's place in the input and its number among the returned."""
    key = hashlib.sha256(f"{seed}/{prompt}/{copy}".encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "little") >> 1)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen_BV` (bool) less likely."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Pick a token for each row: int64 [B].

    Args:
        logits_BV: float32; -inf is never picked.
        generators: one a row; not touched when greedy.
    """
    if sampling.greedy:
        return logits_BV.argmax(-1)
    kept_BV = filtered(logits_BV, sampling)
    cumulative_BV = kept_BV.softmax(-1).double().cumsum(-1)
    draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    points_B1 = torch.stack(draws).to(logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    picked_B1 = torch.searchsorted(cumulative_BV, points_B1, right=True)
    return picked_B1.squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature, with -inf where a filter removes a token."""
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    nothing = float("-inf")
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, nothing)
    if 0 < sampling.top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probability_BV = ordered_BV.softmax(-1)
        beyond_BV = probability_BV.cumsum(-1) - probability_BV > sampling.top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), nothing)
    if sampling.min_p > 0:
        probability_BV = logits_BV.softmax(-1)
        rare_BV = probability_BV < sampling.min_p * probability_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(rare_BV, nothing)
    return logits_BV
