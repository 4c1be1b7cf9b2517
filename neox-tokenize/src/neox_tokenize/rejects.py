# SPDX-License-Identifier: Apache-2.0
"""What becomes of records that give no document: an error, a count, or a place in quarantine."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from libneox.cli import warn
from libneox.errors import DataError, UsageError
from libneox.files import atomic_write, check_output
from neox_tokenize.records import Reject

SHOWN = 5  # messages of one reason that are printed; the rest is counted


class Rejects:
    """Apply `--on-error` to the rejects, in the order of the input, and count them.

    Attributes:
        counts: reason to number.
    """

    def __init__(self, prog: str, *, fail: bool, quarantine: BinaryIO | None, hint: str = ""):
        self._prog, self._fail, self._quarantine, self._hint = prog, fail, quarantine, hint
        self.counts: Counter[str] = Counter()

    def take(self, rejects: Iterable[Reject]) -> None:
        """Deal with some rejects.

        Raises:
            DataError: for the first that is not harmless, if errors are fatal.
        """
        for reject in rejects:
            message = f"{reject.where}: {reject.reason}: {reject.detail}"
            if self._fail and not reject.harmless:
                raise DataError(f"{message}; --on-error skip leaves such records out and counts them")
            self.counts[reject.reason] += 1
            if reject.harmless:
                continue
            if self.counts[reject.reason] <= SHOWN:
                warn(self._prog, f"skipped {message}")
            if self._quarantine is not None:
                entry = {"where": reject.where, "reason": reject.reason, "detail": reject.detail}
                record = reject.record.decode(errors="backslashreplace")
                self._quarantine.write(
                    json.dumps({**entry, "record": record}, ensure_ascii=False).encode(errors="backslashreplace")
                    + b"\n"
                )

    def summary(self) -> str:
        """`3 skipped (2 broken JSON, 1 empty document)`, or nothing."""
        if not self.counts:
            return ""
        parts = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total():,} skipped ({parts})"


@contextlib.contextmanager
def open_rejects(prog: str, on_error: str, *, force: bool) -> Iterator[Rejects]:
    """`--on-error fail|skip|quarantine=FILE` as something to hand the rejects to."""
    if on_error in ("fail", "skip"):
        yield Rejects(prog, fail=on_error == "fail", quarantine=None)
        return
    mode, _, file = on_error.partition("=")
    if mode != "quarantine" or not file:
        raise UsageError(f"--on-error {on_error}: one of fail, skip, quarantine=FILE")
    with atomic_write(check_output(file, force=force)) as quarantine:
        yield Rejects(prog, fail=False, quarantine=quarantine)
