# SPDX-License-Identifier: Apache-2.0
"""Running the harness over checkpoints, one after another."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from libneox.cli import warn
from libneox.errors import InputMissing, NeoxError, UsageError
from libneox.files import open_input
from neox_eval.output import Place, dumps
from neox_eval.ranks import Ranks
from neox_eval.request import ModelRequest, Reporting, Request
from neox_eval.tasks import local_files, read_specs

PROG = "neox-eval"


def evaluate_all(
    checkpoints: Sequence[str], request: Request, stdout: BinaryIO, *, model: ModelRequest, reporting: Reporting
) -> None:
    """Evaluate checkpoints; write each one's results as a line of JSON to `stdout` as soon as they are there."""
    names, output = request.names, reporting.output_path
    with _harness_environment(names, online=reporting.online):
        specs, by_name = read_specs(names)
        with contextlib.closing(Ranks(model.tensor_parallel)) as ranks:
            manager: Any = None
            for checkpoint in _each(checkpoints, ranks):
                place = Place.of(output, _resolved(checkpoint), several=len(checkpoints) > 1 or checkpoints[0] == "-")
                if manager is None:
                    quiet = reporting.quiet or not ranks.is_first
                    manager = _task_manager(request, by_name, names, quiet=quiet)
                line = _Job(checkpoint, request, model, reporting, place, ranks).run(specs, manager)
                if line is not None:
                    stdout.write(line.encode(errors="surrogateescape") + b"\n")
                    stdout.flush()


def _each(checkpoints: Sequence[str], ranks: Ranks) -> Iterator[str]:
    """The checkpoints named, and those read from stdin as they come, by rank 0 for all."""
    for checkpoint in checkpoints:
        if checkpoint != "-":
            yield checkpoint
            continue
        lines = open_input("-") if ranks.is_first else None
        while True:
            line = os.fsdecode(lines.readline()) if lines else ""
            line = ranks.first(line)
            if not line:
                break
            if line.strip():
                yield line.rstrip("\r\n")


def _resolved(checkpoint: str) -> Path:
    path = Path(checkpoint)
    return path.resolve() if path.exists() else path


@contextlib.contextmanager
def _harness_environment(names: Sequence[str], *, online: bool) -> Iterator[None]:
    """Set what lm-eval and datasets read from the environment, before either is imported.

    Data of local files is converted in a temporary directory: nothing is left in the user's cache, and a read-only
    home does not matter.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not online:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    local = all(Path(name).exists() for name in names)
    with tempfile.TemporaryDirectory(prefix="neox-eval-") as cache:
        if local:
            os.environ["HF_DATASETS_CACHE"] = cache
        yield


def _task_manager(request: Request, by_name: bool, names: Sequence[str], *, quiet: bool) -> Any:
    from lm_eval.tasks import TaskManager

    if by_name and not quiet:
        warn(PROG, "reading the harness's list of tasks, some 15 seconds; task files (.yaml, .jsonl) need it not")
    manager = TaskManager(
        include_path=request.include_path or None, include_defaults=by_name, metadata=request.task_metadata
    )
    known = set(manager.all_tasks)
    unknown = [
        name for name in names if not Path(name).exists() and not manager.match_tasks([name]) and name not in known
    ]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `neox-eval harness ls tasks` lists them"
        raise UsageError(f"unknown task {', '.join(unknown)}{hint}")
    return manager


class _Job:
    """One checkpoint's evaluation."""

    def __init__(
        self, checkpoint: str, request: Request, model: ModelRequest, reporting: Reporting, place: Place, ranks: Ranks
    ):
        self.checkpoint, self.request, self.model, self.reporting = checkpoint, request, model, reporting
        self.place, self.ranks = place, ranks
        self.quiet = reporting.quiet or not ranks.is_first

    def run(self, specs: Sequence[Any], manager: Any) -> str | None:
        """Evaluate, write the files, and return the results as a line of JSON (None on ranks other than 0)."""
        from neox_eval.answers import AnswerLog
        from neox_eval.lm import NeoxLM

        started = time.time()
        options = self.model
        lm = NeoxLM(
            self.checkpoint,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=options.dtype,
            batch_size=options.batch_size,
            max_length=options.max_length,
            max_gen_toks=self.request.max_gen_toks,
            ranks=self.ranks,
            quiet=self.quiet,
        )
        lm.chat_template(self.request.template)
        fingerprint = self.request.fingerprint(lm.identity, options, local_files(self.request.names, specs))
        done = self.place.done(fingerprint, force=self.reporting.force)
        if done is not None:
            if not self.quiet:
                warn(PROG, f"{self.place.results}: already evaluated; --force evaluates again")
            return done.strip() if self.ranks.is_first else None
        self.place.make()
        suffix = f".rank{self.ranks.rank}" if self.ranks.world_size > 1 else ""
        journal = self.place.beside(f"answers{suffix}.jsonl") if self.ranks.leads else None
        drawn = self.request.seeds[2]
        lm.answers = AnswerLog(journal, model=f"{lm.identity} {lm.max_length} {lm.model.dtype} {drawn}")
        if self.ranks.tensor_parallel > 1:
            lm.answers.follow(self.ranks.told)
        if lm.answers.found and not self.quiet:
            warn(PROG, f"{journal}: going on behind {lm.answers.found:,} answers")
        results = self._ask_harness(lm, specs, manager)
        lm.answers.close()
        line = None
        if results is not None and self.ranks.is_first:
            line = self._finish(results, fingerprint, started)
        self.ranks.barrier()
        if journal is not None:
            journal.unlink(missing_ok=True)
        return line

    def _ask_harness(self, lm: Any, specs: Sequence[Any], manager: Any) -> dict[str, Any] | None:
        import copy

        from lm_eval import simple_evaluate

        request, seeds = self.request, self.request.seeds
        limit = request.limit
        with _translated_errors():
            return simple_evaluate(
                model=lm,
                tasks=copy.deepcopy(list(_expanded(specs, manager))),
                task_manager=manager,
                num_fewshot=request.num_fewshot,
                limit=int(limit) if limit is not None and limit >= 1 else limit,
                samples=request.documents,
                bootstrap_iters=request.bootstrap_iters,
                log_samples=self.reporting.log_samples,
                system_instruction=request.system_instruction,
                apply_chat_template=request.template,
                fewshot_as_multiturn=request.fewshot_as_multiturn and bool(request.template),
                gen_kwargs=request.gen_kwargs,
                predict_only=request.predict_only,
                random_seed=seeds[0],
                numpy_random_seed=seeds[1],
                torch_random_seed=seeds[2],
                fewshot_random_seed=seeds[3],
                confirm_run_unsafe_code=request.confirm_run_unsafe_code,
                metadata=request.task_metadata,
                batch_size=self.model.batch_size,
            )

    def _finish(self, results: dict[str, Any], fingerprint: str, started: float) -> str:
        """Write the files and the table; return the results as a line."""
        from lm_eval.utils import make_table

        samples = results.pop("samples", None) or {}
        results["config"]["model"] = "neox"
        results["config"]["model_args"] = {"checkpoint": self.checkpoint}
        results["neox"] = {"checkpoint": self.checkpoint, "request": fingerprint, "seconds": time.time() - started}
        line = dumps(results)
        self.place.write(line, samples if self.reporting.log_samples else {})
        if not self.quiet:
            print(f"{self.checkpoint}\n{make_table(results)}", file=sys.stderr)
            if results.get("groups"):
                print(make_table(results, "groups"), file=sys.stderr)
        return line


def _expanded(specs: Sequence[Any], manager: Any) -> Iterator[Any]:
    """Patterns like `mmlu_*` as the names they match."""
    for spec in specs:
        if isinstance(spec, str) and spec not in manager.all_tasks:
            yield from manager.match_tasks([spec])
        else:
            yield spec


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """What goes wrong inside the harness with a user's task or data, as our errors."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        yield
    except NeoxError:
        raise
    except ConnectionError as error:
        raise InputMissing(
            f"a task's data is not in the local cache; --online downloads it ({_line(error)})"
        ) from error
    except FileNotFoundError as error:  # also datasets.DatasetNotFoundError
        raise InputMissing(f"a task's data is not there: {_line(error)}; with --online it may be downloaded") from error
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:  # e.g. exp of a huge loss
        if _ours(error):
            raise
        raise UsageError(
            f"the harness refuses a task: {type(error).__name__}: {_line(error)}; --debug shows where"
        ) from error


def _ours(error: BaseException) -> bool:
    """Whether an exception comes out of our own code rather than a task's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return module.startswith(("neox_eval", "libneox", "torch"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
