# SPDX-License-Identifier: Apache-2.0
"""Completions for `generate_until`, by the library's own decoding loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.generation import Sampling
    from libneox.model import Transformer
    from neox_eval.tokens import HarnessTokens

SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
MEANINGLESS = {"num_beams": 1, "use_cache": True}  # what tasks say to Hugging Face's generate, at its only value here


class Prompt(NamedTuple):
    """A context to continue; `nth` tells repeats of one apart where tokens are drawn."""

    ids: list[int]
    nth: int = 0


def read_sampling(settings: dict[str, Any], seed: int) -> Sampling:
    """The generation settings of a task.

    Raises:
        UsageError: one that we do not have.
    """
    from libneox.generation import Sampling

    settings = dict(settings)
    drawn, temperature = settings.pop("do_sample", False), float(settings.pop("temperature", 0.0))
    for name, only in MEANINGLESS.items():
        if settings.get(name) == only:
            del settings[name]
    values = {name: settings.pop(name) for name in SAMPLING if name in settings}
    if settings:
        raise UsageError(
            f"generation settings {', '.join(sorted(settings))} are unknown here; known: {', '.join(SAMPLING)}"
        )
    if not drawn:
        values = {name: value for name, value in values.items() if name == "repetition_penalty"}
        temperature = 0.0
    elif not temperature:
        temperature = 1.0
    return Sampling(temperature=temperature, seed=seed, **values)


def complete(
    model: Transformer,
    tokens: HarnessTokens,
    prompts: Sequence[Prompt],
    *,
    stop: Sequence[str],
    max_tokens: int,
    rows: int,
    sampling: Sampling,
) -> Iterator[tuple[int, list[int]]]:
    """Continue each prompt until a stop string, the end of the text, or a length.

    Args:
        prompts: ids, at least one each; with `max_tokens` more they fit the model.
        rows: how many to continue at once.
    Yields:
        (index of the prompt, new ids, those of a stop string included), longest prompts first. What is drawn for a
        prompt depends on it, `nth` and the seed alone.
    """
    from libneox.generation import Engine

    engine = Engine(model, tokens.base, sampling=sampling, max_tokens=max_tokens, stop=stop)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        requests = [engine.request(prompts[i].ids, index=_key(prompts[i])) for i in some]
        for i, completion in zip(some, engine.run(requests), strict=True):
            yield i, completion.tokens


def _key(prompt: Prompt) -> int:
    return int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:7])
