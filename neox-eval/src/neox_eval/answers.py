# SPDX-License-Identifier: Apache-2.0
"""Answers already given, kept in a file as they come, so that a killed evaluation goes on where it was.

    {"neox_answers": 1, "model": "..."}                       the first line: whose answers these are
    {"q": "sha256 of method and arguments", "a": [-3.2, true]}

A last line cut short by a kill is dropped. Answers of another model are never mixed in: the file is started anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1


class AnswerLog:
    """A journal of answers; without a path it remembers nothing and costs nothing."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, model: str = ""):
        """Open a journal, reading what an earlier run of the same model left.

        Args:
            model: identifies weights and settings that answers depend on.
        """
        self.path = Path(path) if path is not None else None
        self._known: dict[str, Any] = {}
        self._file: Any = None
        self._remember = path is not None
        self.found = 0
        if self.path is None:
            return
        head = {"neox_answers": FORMAT, "model": model}
        good = self._read(head)
        self.found = len(self._known)
        self._file = self.path.open("r+b" if good else "wb")
        if good:
            self._file.truncate(good)
            self._file.seek(good)
        else:
            self._write(head)

    def follow(self, told: Callable[[Any], Any]) -> None:
        """Know what the log knows whose answers `told` returns, now and later: both are asked the same in one order."""
        self._known = dict(told([list(pair) for pair in self._known.items()]))
        self._remember = True

    def _read(self, head: dict[str, Any]) -> int:
        """Take in the whole lines of the file and return how many bytes they are; 0 if it is not to be used."""
        good = 0
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)  # type: ignore[union-attr]
        except FileNotFoundError:
            return 0
        for line in lines:
            try:
                entry = json.loads(line)
                complete = line.endswith(b"\n")
            except ValueError:
                complete = False
            if not complete:
                break
            if good == 0 and entry != head:
                return 0
            if good:
                self._known[entry["q"]] = entry["a"]
            good += len(line)
        return good

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; what it holds stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def answer(
        self,
        method: str,
        questions: Sequence[Sequence[Any]],
        ask: Callable[[list[int]], Iterable[tuple[int, Any]]],
    ) -> list[Any]:
        """Answer questions, asking only what is not known, each once, and noting every answer as it comes.

        Args:
            method: what is asked; the same arguments mean another question to another method.
            questions: JSON-able arguments.
            ask: gets the positions of unknown questions, and gives (index into that list, answer) in any order.
        """
        keys = [_key(method, question) for question in questions]
        answers = dict(self._known)
        first: dict[str, int] = {}
        for position, key in enumerate(keys):
            if key not in answers:
                first.setdefault(key, position)
        unknown = list(first.values())
        for index, answer in ask(unknown) if unknown else ():
            key = keys[unknown[index]]
            answers[key] = answer
            if self._remember:
                self._known[key] = answer
            if self._file is not None:
                self._write({"q": key, "a": answer})
        return [answers[key] for key in keys]


def _key(method: str, question: Sequence[Any]) -> str:
    text = json.dumps([method, *question], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
