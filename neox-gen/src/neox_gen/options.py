# SPDX-License-Identifier: Apache-2.0
"""The options of neox-gen, in groups that its verbs share. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from libneox.cli import Quiet

PROG = "neox-gen"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is made of prompts, and how it is written."""

    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=0, help="Tokens to make at most [64].")
    ] = None
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0: the most likely token.")] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: off.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely until they sum to p; 0: off.")] = None
    min_p: Annotated[float, typer.Option(help="Draw from those at least p times as likely as the best; 0: off.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already there are less likely.")] = 1.0
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help=r"End a text where this appears (\n is a newline); repeatable.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of the drawing; each text draws on its own.")] = 0
    num_return: Annotated[int, typer.Option("--num-return", min=1, help="Completions of each prompt.")] = 1
    number: Annotated[
        int | None, typer.Option("-n", "--number", min=1, help="Read no prompts; make this many texts from nothing.")
    ] = None
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Talk: prompts are lines, with history.")] = (
        False
    )
    text: Annotated[
        bool | None,
        typer.Option("--text/--jsonl", help="Texts alone, as they come, or objects; default: texts on a terminal."),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="Add tokens, log probabilities and those of the K best."),
    ] = None
    ids: Annotated[bool, typer.Option("--ids", help="Add the tokens' ids.")] = False
    format: Annotated[
        Literal["auto", "lines", "jsonl"],
        typer.Option(help="Of the prompts; auto: JSONL if the first line with something in it is an object."),
    ] = "auto"
    prompt_end: Annotated[
        str, typer.Option(help=r"What separates prompts that are lines, as in GPT-NeoX's prompt_end.")
    ] = r"\n"
    guess: Annotated[
        int, typer.Option(min=0, help="Guess this many tokens ahead from repetitions (batch of 1); same text, faster.")
    ] = 0
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class Working:
    """How the model is loaded and run."""

    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts worked on at a time.")] = 16
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="A prompt that cannot be completed ends the run, or becomes a record with a message."),
    ] = "fail"
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; auto: as stored, or float32 where the CPU has no hardware for that."),
    ] = "auto"
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="Use this tokenizer, not the checkpoint's.")] = (
        None
    )
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None

    @property
    def skip(self) -> bool:
        """Whether faults become records."""
        return self.on_error == "skip"
