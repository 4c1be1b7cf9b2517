# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a configuration, gathered and reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from libneox.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written."""

    source: str  # a file, a preset, or `--set`
    line: int | None = None
    text: str | None = None  # the scalar as written, if it was a plain one

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Problems:
    """Gathers problems; `raise_if_any` turns them into one UsageError."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, place: Place | None, key: str, message: str) -> None:
        """Note a problem; `message` is `fact; remedy`."""
        where = str(place) if place else ""
        if key and where == f"--set {key}":
            key = ""
        line = ": ".join(part for part in (where, key, message) if part)
        if line not in self._lines:
            self._lines.append(line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def raise_if_any(self) -> None:
        """Raise UsageError naming every problem, one a line."""
        if len(self._lines) == 1:
            raise UsageError(self._lines[0])
        if self._lines:
            raise UsageError("\n  ".join([f"{len(self._lines)} problems in the configuration:", *self._lines]))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for the nearest known name, or the empty string."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
