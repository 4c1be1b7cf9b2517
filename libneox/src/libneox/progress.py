# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: a bar for a person at a terminal, a line every 30 seconds for a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from libneox.files import stderr_is_live

LINE_EVERY_S = 30.0


class Progress:
    """Count units of work. In a pipeline give `live=False` to all but the last command, so that bars do not mix.

    Args:
        prog: command name, printed in front of each line.
        unit: what is counted, for example `documents`.
        total: how many there will be, or None if unknown.
        quiet: print nothing at all.
        live: draw a bar if stderr is a terminal.
    """

    def __init__(self, prog: str, unit: str, *, total: int | None = None, quiet: bool = False, live: bool = True):
        self._prog, self._unit, self._total, self._quiet = prog, unit, total, quiet
        self._started = self._printed = time.monotonic()
        self.count = 0
        self._bar: Any = None
        if live and not quiet and stderr_is_live():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, desc=prog, file=sys.stderr, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, units: int, note: str = "") -> None:
        """Count `units` more; `note` is shown behind the figures."""
        self.count += units
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif not self._quiet and time.monotonic() - self._printed >= LINE_EVERY_S:
            self._printed = time.monotonic()
            self._line(note)

    def _line(self, note: str) -> None:
        rate = self.count / max(self.seconds, 1e-9)
        total = f" of {self._total:,}" if self._total else ""
        tail = f"; {note}" if note else ""
        text = f"{self._prog}: {self.count:,}{total} {self._unit}, {rate:,.0f} a second{tail}"
        print(text, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
