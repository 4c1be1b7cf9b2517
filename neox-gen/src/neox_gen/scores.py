# SPDX-License-Identifier: Apache-2.0
"""The work of `neox-gen logprobs`: how likely given continuations are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, BinaryIO

from libneox.errors import DataError
from libneox.files import open_input
from neox_gen.loading import load
from neox_gen.options import PROG, Working
from neox_gen.prompts import json_line, load_object, numbered_lines

VERB = f"{PROG} logprobs"


def score_all(
    checkpoint: Path,
    file: Path,
    stdout: BinaryIO,
    *,
    working: Working,
) -> None:
    """Score every line of `file` and write it back with its log probabilities, in order.

    Raises:
        DataError: a line is no object with context and continuation, or longer than the model's context.
    """
    from libneox.generation.scoring import encode_pair, score

    name = "stdin" if str(file) == "-" else str(file)
    stream = open_input(file)
    loaded = load(checkpoint, working, VERB)
    limit = loaded.model.config.max_position_embeddings
    lines = numbered_lines(stream, name)
    while batch := list(itertools.islice(lines, working.batch_size)):
        records, pairs, faults = [], [], []
        for number, line in batch:
            record = load_object(line, f"{name}: line {number}")
            try:
                pair = encode_pair(loaded.tokenizer, *_texts(record))
                if len(pair[0]) + len(pair[1]) - 1 > limit:
                    raise DataError(f"{sum(map(len, pair)):,} tokens, the model's context is {limit:,}")
                pairs.append(pair)
                faults.append(None)
            except DataError as error:
                if not working.skip:
                    raise DataError(f"{name}: line {number}: {error}") from error
                faults.append(str(error))
            records.append(record)
        scores = iter(score(loaded.model, pairs))
        for (number, _), record, fault in zip(batch, records, faults, strict=True):
            result = {"message": fault} if fault else _result(next(scores))
            stdout.write(json_line({**record, **result}, f"{name}: line {number}"))
        stdout.flush()


def _texts(record: dict[str, Any]) -> tuple[str, str]:
    texts = record.get("context", record.get("prompt")), record.get("continuation", record.get("completion"))
    if not all(isinstance(text, str) for text in texts):
        raise DataError("no `context` and `continuation` text in the object")
    return texts  # type: ignore[return-value]


def _result(scored: Any) -> dict[str, Any]:
    return {
        "logprob": scored.logprob,
        "is_greedy": scored.is_greedy,
        "length": len(scored.tokens),
        "tokens": scored.tokens,
        "token_logprobs": scored.token_logprobs,
    }
