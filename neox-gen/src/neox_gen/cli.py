# SPDX-License-Identifier: Apache-2.0
"""Command lines of neox-gen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import typer

from libneox.cli import Quiet, run
from libneox.errors import UsageError

PROG = "neox-gen"

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="RUN, RUN/latest, RUN/step_N or a Hugging Face model directory.")
]
Input = Annotated[Path, typer.Argument(metavar="[FILE]", help="Prompts; stdin if absent or -.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto: as stored, or float32 where the CPU has no hardware for that."),
]
TokenizerFile = Annotated[str | None, typer.Option(metavar="FILE", help="Use this tokenizer, not the checkpoint's.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts worked on at a time.")]
OnError = Annotated[
    Literal["fail", "skip"],
    typer.Option(help="A prompt that cannot be completed ends the run, or becomes a record with a message."),
]


def main() -> None:
    """Entry point."""
    run(PROG, complete, {"logprobs": logprobs})


def complete(
    checkpoint: Checkpoint,
    file: Input = Path("-"),
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=0, help="Tokens to make at most [64].")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0: the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely until they sum to p; 0: off.")] = None,
    min_p: Annotated[float, typer.Option(help="Draw from those at least p times as likely as the best; 0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already there are less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help=r"End a text where this appears (\n is a newline); repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing; each text draws on its own.")] = 0,
    num_return: Annotated[int, typer.Option("--num-return", min=1, help="Completions of each prompt.")] = 1,
    number: Annotated[
        int | None, typer.Option("-n", "--number", min=1, help="Read no prompts; make this many texts from nothing.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Talk: prompts are lines, with history.")
    ] = False,
    text: Annotated[
        bool | None,
        typer.Option("--text/--jsonl", help="Texts alone, as they come, or objects; default: texts on a terminal."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="Add tokens, log probabilities and those of the K best."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Add the tokens' ids.")] = False,
    format: Annotated[
        Literal["auto", "lines", "jsonl"],
        typer.Option(help="Of the prompts; auto: JSONL if line 1 is an object."),
    ] = "auto",
    prompt_end: Annotated[
        str, typer.Option(help=r"What separates prompts that are lines, as in GPT-NeoX's prompt_end.")
    ] = r"\n",
    guess: Annotated[
        int, typer.Option(min=0, help="Guess this many tokens ahead from repetitions (batch of 1); same text, faster.")
    ] = 0,
    batch_size: BatchSize = 16,
    on_error: OnError = "fail",
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerFile = None,
    threads: Threads = None,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Complete prompts with a language model: a line or a JSON object {"prompt": ...} each, a JSON object out for each.

    Output objects hold context, text (the completion alone), length, finished, message, duration_seconds and reason,
    in input order, each written as soon as it is there. Keys of an input object that are not used are passed on.
    Settings not given are the checkpoint's own (temperature, top_k, top_p, maximum_tokens) or greedy.
    """
    from neox_gen.run import Options, generate_all

    if interactive and (number or str(file) != "-" or num_return > 1 or logprobs is not None or ids):
        raise UsageError("--interactive takes no FILE, -n, --num-return, --logprobs or --ids")
    if text is None:
        text = stdout.isatty() and num_return == 1 and logprobs is None and not ids
    if text and (logprobs is not None or ids):
        raise UsageError("--text prints nothing but text; drop it, or --logprobs and --ids")
    if number and str(file) != "-":
        raise UsageError("-n makes texts from nothing; drop it or the FILE")
    options = Options(
        checkpoint=checkpoint, file=file, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, stop=[unescape(s) for s in stop or []], seed=seed,
        num_return=num_return, number=number, interactive=interactive, text=text, logprobs=logprobs, ids=ids,
        format=format, prompt_end=unescape(prompt_end), guess=guess, batch_size=batch_size, skip=on_error == "skip",
        device=device, dtype=dtype, tokenizer=tokenizer, threads=threads, quiet=quiet,
    )  # fmt: skip
    generate_all(options, stdout)


def logprobs(
    checkpoint: Checkpoint,
    file: Input = Path("-"),
    batch_size: BatchSize = 16,
    on_error: OnError = "fail",
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerFile = None,
    threads: Threads = None,
    *,
    stdout: BinaryIO,
) -> None:
    """Score given continuations: JSONL {"context": ..., "continuation": ...} in, the same with log probabilities out.

    Adds logprob (the sum, natural logarithm), is_greedy, length, tokens and token_logprobs.
    """
    from neox_gen.scores import score_all

    score_all(
        checkpoint, file, stdout, batch_size=batch_size, skip=on_error == "skip", device=device, dtype=dtype,
        tokenizer=tokenizer, threads=threads,
    )  # fmt: skip


def unescape(text: str) -> str:
    r"""Turn the two characters \n and \t of a command line into a newline and a tab, and \\ into one backslash."""
    import re

    meanings = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda match: meanings[match[0]], text)
