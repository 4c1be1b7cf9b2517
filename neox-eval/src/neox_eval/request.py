# SPDX-License-Identifier: Apache-2.0
"""What is asked of an evaluation, in groups of options that the commands share. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from libneox.cli import Force, Quiet
from libneox.errors import UsageError
from neox_eval.tasks import split_names


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """How to load the model and how much to give it at once; see `neox_eval.lm.NeoxLM`."""

    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", help="Most sequences at once; auto limits tokens.")
    ] = "auto"
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens read at once.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")] = None
    dtype: Annotated[
        str, typer.Option(help="auto (as stored, float32 where a CPU is slow at that), float32, bfloat16 or float16.")
    ] = "auto"
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="Tokenizer, if not the checkpoint's.")] = None
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that hold one model together, where it does not fit one device.")
    ] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that results depend on, but the model."""

    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "-t", help="Task names, task files (.yaml) and data files (.jsonl), comma-separated."),
    ] = None
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", "-f", min=0, help="Examples shown.")] = None
    limit: Annotated[
        float | None,
        typer.Option("--limit", "-L", help="Documents of each task; below 1 a share of them. For trying things out."),
    ] = None
    samples: Annotated[
        str | None, typer.Option(help='Documents by number, JSON or a file of it: {"task": [0, 3]}.')
    ] = None
    max_gen_toks: Annotated[int, typer.Option(min=1, help="Most tokens generated where a task says nothing.")] = 256
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Generation settings over the tasks' own: temperature=0.7,do_sample=true.")
    ] = None
    system_instruction: Annotated[str | None, typer.Option(help="System prompt in front of everything.")] = None
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as in a chat.")] = False
    chat_template: Annotated[str | None, typer.Option(help="Which of several chat templates.")] = None
    fewshot_as_multiturn: Annotated[bool, typer.Option(help="Examples as turns of the chat.")] = True
    include_path: Annotated[list[str] | None, typer.Option(help="Directory with more task files.")] = None
    seed: Annotated[
        str, typer.Option(help="One seed, or four: Python's, numpy's, torch's, and that of the examples' choice.")
    ] = "0,1234,1234,1234"
    bootstrap_iters: Annotated[int, typer.Option(min=0, help="Resamplings for standard errors; 0 for none.")] = 100000
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Answers only, no metrics.")] = False
    metadata: Annotated[str | None, typer.Option(help="JSON object handed to the tasks.")] = None
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run code the model wrote.")
    ] = False

    @functools.cached_property
    def names(self) -> list[str]:
        """The tasks, one by one."""
        return split_names(self.tasks or [])

    @functools.cached_property
    def documents(self) -> dict[str, Any] | None:
        """`samples`, read."""
        return read_json(self.samples, "--samples")

    @functools.cached_property
    def task_metadata(self) -> dict[str, Any] | None:
        """`metadata`, read."""
        return read_json(self.metadata, "--metadata")

    @functools.cached_property
    def seeds(self) -> tuple[int, int, int, int]:
        """Python's, numpy's, torch's, and that of the examples' choice."""
        return read_seeds(self.seed)

    @property
    def template(self) -> str | bool:
        """The chat template by name; True for the default one, False for none."""
        return self.chat_template or self.apply_chat_template

    def check(self) -> None:
        """Raise UsageError for what is wrong or missing, before anything is loaded."""
        if not self.names:
            raise UsageError("no tasks given; --tasks NAME, FILE.yaml or FILE.jsonl (see neox-eval --help)")
        if self.limit is not None and self.samples is not None:
            raise UsageError("--limit and --samples exclude each other")
        if self.limit is not None and not self.limit > 0:
            raise UsageError(f"--limit {self.limit:g}: a number of documents, or a share of them between 0 and 1")
        _ = self.documents, self.task_metadata, self.seeds

    def fingerprint(self, identity: str, model: ModelRequest, files: Iterable[Path]) -> str:
        """Identifies the question put to a model; `files`, those of tasks and their data, count by content."""
        asked = dataclasses.asdict(self) | {
            "tasks": self.names,
            "samples": self.documents,
            "metadata": self.task_metadata,
            "seed": self.seeds,
        }
        # device, batch size and ranks change the time, not the answers
        values = [identity, asked, model.dtype, model.max_length]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for file in files:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reporting:
    """Where results go and what is said."""

    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", "-o", help="X.json, or a directory (a folder each). A rerun resumes."),
    ] = None
    log_samples: Annotated[
        bool, typer.Option("--log-samples", "-s", help="Write every document with its answers beside the results.")
    ] = False
    online: Annotated[bool, typer.Option("--online", help="Let tasks download their data.")] = False
    force: Force = False
    quiet: Quiet = False


def read_json(text: str | None, option: str) -> dict[str, Any] | None:
    """A JSON object from the command line, or from the file named there."""
    if text is None:
        return None
    try:
        value = json.loads(Path(text).read_text() if not text.lstrip().startswith("{") else text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{option}: neither a JSON object nor a file of one ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{option}: not a JSON object")
    return value


def read_seeds(text: str) -> tuple[int, int, int, int]:
    """`7` for all four, or four numbers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seed {text}: numbers, please") from error
    if len(numbers) == 1:
        numbers *= 4
    if len(numbers) != 4 or min(numbers) < 0:
        raise UsageError(f"--seed {text}: one number, or four: Python's, numpy's, torch's, the examples'")
    return numbers[0], numbers[1], numbers[2], numbers[3]
