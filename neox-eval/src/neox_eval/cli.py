# SPDX-License-Identifier: Apache-2.0
"""The command line of `neox-eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from libneox import cli
from libneox.errors import UsageError

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as stored, float32 where a CPU is slow at that), float32, bfloat16 or float16.")
]
BatchSize = Annotated[str, typer.Option("--batch-size", "-b", help="Most sequences at once; auto limits tokens.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Most tokens read at once.")]
TensorParallel = Annotated[
    int, typer.Option(min=1, help="Processes that hold one model together, where it does not fit one device.")
]
TokenizerPath = Annotated[Path | None, typer.Option(help="Tokenizer, if not the checkpoint's.")]


def evaluate(
    stdout: BinaryIO,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="CKPT", help="RUN, RUN/step_N or Hugging Face directories; - reads them from stdin."),
    ] = None,
    *,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "-t", help="Task names, task files (.yaml) and data files (.jsonl), comma-separated."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", "-f", min=0, help="Examples shown.")] = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", "-L", help="Documents of each task; below 1 a share of them. For trying things out."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(help='Documents by number, JSON or a file of it: {"task": [0, 3]}.'),
    ] = None,
    batch_size: BatchSize = "auto",
    max_length: MaxLength = None,
    max_gen_toks: Annotated[int, typer.Option(min=1, help="Most tokens generated where a task says nothing.")] = 256,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(help="Generation settings over the tasks' own: temperature=0.7,do_sample=true."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
    tensor_parallel: TensorParallel = 1,
    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", "-o", help="X.json, or a directory (a folder each). A rerun resumes."),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", "-s", help="Write every document with its answers beside the results.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="System prompt in front of everything.")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as in a chat.")] = False,
    chat_template: Annotated[str | None, typer.Option(help="Which of several chat templates.")] = None,
    fewshot_as_multiturn: Annotated[bool, typer.Option(help="Examples as turns of the chat.")] = True,
    include_path: Annotated[list[Path] | None, typer.Option(help="Directory with more task files.")] = None,
    seed: Annotated[
        str, typer.Option(help="One seed, or four: Python's, numpy's, torch's, and that of the examples' choice.")
    ] = "0,1234,1234,1234",
    bootstrap_iters: Annotated[int, typer.Option(min=0, help="Resamplings for standard errors; 0 for none.")] = 100000,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Answers only, no metrics.")] = False,
    metadata: Annotated[str | None, typer.Option(help="JSON object handed to the tasks.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run code the model wrote.")
    ] = False,
    online: Annotated[bool, typer.Option("--online", help="Let tasks download their data.")] = False,
    force: cli.Force = False,
    quiet: cli.Quiet = False,
) -> None:
    """Evaluate checkpoints with the lm-evaluation-harness: results as JSON on stdout, one line a checkpoint.

    The table goes to stderr. Nothing is downloaded without --online.
    """
    if not checkpoints:
        raise UsageError("no checkpoint given; name one, or - to read them from stdin (see neox-eval --help)")
    if not tasks:
        raise UsageError("no tasks given; --tasks NAME, FILE.yaml or FILE.jsonl (see neox-eval --help)")
    if log_samples and output_path is None:
        raise UsageError("--log-samples needs --output-path, where to write them")
    if limit is not None and samples is not None:
        raise UsageError("--limit and --samples exclude each other")
    from neox_eval.request import ModelRequest, Request, read_json, read_seeds

    request = Request(
        tasks=tuple(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        samples=read_json(samples, "--samples"),
        gen_kwargs=gen_kwargs,
        system_instruction=system_instruction,
        chat_template=chat_template or apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        include_path=tuple(str(path) for path in include_path or ()),
        seeds=read_seeds(seed),
        bootstrap_iters=bootstrap_iters,
        predict_only=predict_only,
        metadata=read_json(metadata, "--metadata"),
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        model=ModelRequest(
            device, dtype, batch_size, max_length, max_gen_toks, str(tokenizer) if tokenizer else None, tensor_parallel
        ),
    )
    from neox_eval.evaluation import evaluate_all

    evaluate_all(
        checkpoints,
        request,
        stdout,
        output=output_path,
        log_samples=log_samples,
        online=online,
        force=force,
        quiet=quiet,
    )


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
    batch_size: BatchSize = "auto",
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
    tensor_parallel: TensorParallel = 1,
    quiet: cli.Quiet = False,
) -> None:
    """Measure how well a model predicts texts: per token, byte and word, one JSON object a file on stdout."""
    from neox_eval.perplexity import measure_all
    from neox_eval.request import ModelRequest

    path = str(tokenizer) if tokenizer else None
    model = ModelRequest(device, dtype, batch_size, max_length, 256, path, tensor_parallel)
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
