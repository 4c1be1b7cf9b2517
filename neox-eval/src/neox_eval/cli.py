# SPDX-License-Identifier: Apache-2.0
"""The command line of `neox-eval`."""

from __future__ import annotations

import sys
from typing import Annotated, BinaryIO

import typer

from libneox import cli
from libneox.errors import UsageError
from neox_eval.request import ModelRequest, Reporting, Request


def evaluate(
    stdout: BinaryIO,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="CKPT", help="RUN, RUN/step_N or Hugging Face directories; - reads them from stdin."),
    ] = None,
    *,
    request: Request,
    model: ModelRequest,
    reporting: Reporting,
) -> None:
    """Evaluate checkpoints with the lm-evaluation-harness: results as JSON on stdout, one line a checkpoint.

    The table goes to stderr. Nothing is downloaded without --online.
    """
    if not checkpoints:
        raise UsageError("no checkpoint given; name one, or - to read them from stdin (see neox-eval --help)")
    request.check()
    if reporting.log_samples and reporting.output_path is None:
        raise UsageError("--log-samples needs --output-path, where to write them")
    from neox_eval.evaluation import evaluate_all

    evaluate_all(checkpoints, request, stdout, model=model, reporting=reporting)


def perplexity(
    stdout: BinaryIO,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="RUN, RUN/step_N or a Hugging Face directory.")],
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="PREFIX of .bin/.idx pairs, or JSONL files."),
    ],
    *,
    key: Annotated[str, typer.Option(help="Field of a JSONL line that holds the text.")] = "text",
    limit: Annotated[int | None, typer.Option("--limit", "-L", min=1, help="Documents of each file.")] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of context that every window repeats; more is slower and closer.")
    ] = 1,
    model: ModelRequest,
    quiet: cli.Quiet = False,
) -> None:
    """Measure how well a model predicts texts: per token, byte and word, one JSON object a file on stdout."""
    from neox_eval.perplexity import measure_all

    measure_all(checkpoint, data, stdout, model=model, key=key, limit=limit, context=context, quiet=quiet)


def harness(
    stdout: BinaryIO,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGS", help="As for lm_eval: run, ls, validate; `harness run --help` lists them."),
    ] = None,
) -> None:
    """Run the harness's own command line, `lm_eval ARGS...`, with `--model neox` known to it."""
    from neox_eval.harness import forward

    forward(arguments or ["--help"], stdout)


def main() -> None:
    """Enter the command."""
    if sys.argv[1:2] == ["harness"] and sys.argv[2:3] not in ([], ["--help"], ["-h"], ["--version"]):
        sys.argv.insert(2, "--")  # everything behind is the harness's
    cli.run("neox-eval", evaluate, {"perplexity": perplexity, "harness": harness})
