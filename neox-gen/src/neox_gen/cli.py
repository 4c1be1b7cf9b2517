# SPDX-License-Identifier: Apache-2.0
"""Command lines of neox-gen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from libneox.cli import run
from libneox.errors import UsageError
from neox_gen.options import PROG, Options, Working

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="RUN, RUN/latest, RUN/step_N or a Hugging Face model directory.")
]
Input = Annotated[Path, typer.Argument(metavar="[FILE]", help="Prompts; stdin if absent or -.")]


def main() -> None:
    """Entry point."""
    run(PROG, complete, {"logprobs": logprobs})


def complete(
    checkpoint: Checkpoint,
    file: Input = Path("-"),
    *,
    options: Options,
    working: Working,
    stdout: BinaryIO,
) -> None:
    """Complete prompts with a language model: a line or a JSON object {"prompt": ...} each, a JSON object out for each.

    Output objects hold context, text (the completion alone), length, finished, message, duration_seconds and reason,
    in input order, each written as soon as it is there. Keys of an input object that are not used are passed on.
    Settings not given are the checkpoint's own (temperature, top_k, top_p, maximum_tokens) or greedy.
    """
    from neox_gen.run import generate_all

    records = options.logprobs is not None or options.ids
    if options.interactive and (options.number or str(file) != "-" or options.num_return > 1 or records):
        raise UsageError("--interactive takes no FILE, -n, --num-return, --logprobs or --ids")
    if options.text and records:
        raise UsageError("--text prints nothing but text; drop it, or --logprobs and --ids")
    if options.number and str(file) != "-":
        raise UsageError("-n makes texts from nothing; drop it or the FILE")
    if not options.prompt_end:
        raise UsageError("an empty --prompt-end separates nothing")
    if options.text is None:
        options = dataclasses.replace(options, text=stdout.isatty() and options.num_return == 1 and not records)
    options = dataclasses.replace(
        options, stop=[unescape(text) for text in options.stop or []], prompt_end=unescape(options.prompt_end)
    )
    generate_all(checkpoint, file, stdout, options=options, working=working)


def logprobs(checkpoint: Checkpoint, file: Input = Path("-"), *, working: Working, stdout: BinaryIO) -> None:
    """Score given continuations: JSONL {"context": ..., "continuation": ...} in, the same with log probabilities out.

    Adds logprob (the sum, natural logarithm), is_greedy, length, tokens and token_logprobs.
    """
    from neox_gen.scores import score_all

    score_all(checkpoint, file, stdout, working=working)


def unescape(text: str) -> str:
    r"""Turn the two characters \n and \t of a command line into a newline and a tab, and \\ into one backslash."""
    import re

    meanings = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda match: meanings[match[0]], text)
