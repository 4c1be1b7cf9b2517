# SPDX-License-Identifier: Apache-2.0
"""Where an evaluation's files go: results, samples, and the answers kept until the results are there.

-o X.json    X.json, X.samples_TASK.jsonl, X.answers.jsonl
-o DIR       DIR/CHECKPOINT/results.json, samples_TASK.jsonl, answers.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from libneox.errors import OutputExists, UsageError
from libneox.files import atomic_write, write_text


class Place(NamedTuple):
    """The files of one checkpoint's evaluation; all None without `-o`."""

    results: Path | None = None
    stem: str = ""  # in front of the names of the other files

    @classmethod
    def of(cls, output: Path | None, checkpoint: Path, *, several: bool) -> Place:
        """The place for a checkpoint.

        Raises:
            UsageError: several checkpoints and one file for all.
        """
        if output is None:
            return cls()
        if output.suffix == ".json":
            if several:
                raise UsageError(f"{output}: one file for several checkpoints; give a directory")
            return cls(output, f"{output.stem}.")
        return cls(output / checkpoint_name(checkpoint) / "results.json")

    def beside(self, name: str) -> Path | None:
        """Another file of this evaluation."""
        return None if self.results is None else self.results.with_name(self.stem + name)

    def make(self) -> None:
        """Make the directory.

        Raises:
            OutputExists: it cannot be made.
        """
        if self.results is not None:
            try:
                self.results.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputExists(f"{self.results.parent}: {error.strerror}") from error

    def done(self, fingerprint: str, *, force: bool) -> str | None:
        """The results that are there already, if they answer the same question.

        Raises:
            OutputExists: they answer another one.
        """
        if self.results is None or force or not self.results.is_file():
            return None
        try:
            text = self.results.read_text(encoding="utf-8", errors="surrogateescape")
            found = json.loads(text)["neox"]["request"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != fingerprint:
            raise OutputExists(f"{self.results}: holds the results of another evaluation; --force replaces it")
        return text

    def write(self, text: str, samples: dict[str, list[Any]]) -> None:
        """Write samples, then results, each whole or not at all."""
        if self.results is None:
            return
        for task, entries in samples.items():
            path = self.beside(f"samples_{task.replace('/', '_')}.jsonl")
            with atomic_write(path) as file:  # type: ignore[arg-type]
                for entry in entries:
                    file.write(dumps(entry).encode("utf-8", "replace") + b"\n")
        write_text(self.results, text + "\n")


def checkpoint_name(path: Path) -> str:
    """RUN-step_N for a step of a run, else the directory's name."""
    path = path.resolve()
    return f"{path.parent.name}-{path.name}" if path.name.startswith("step_") else path.name or "root"


def dumps(value: Any) -> str:
    """One line of JSON; what JSON cannot say (numpy numbers, tensors, functions) as the harness writes it."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)
