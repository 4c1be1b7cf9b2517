# SPDX-License-Identifier: Apache-2.0
"""Lists of sha256 sums as `sha256sum` writes and checks them: a hash and a name on each line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from libneox.errors import DataError, InputMissing

# In a name with one of these the backslashes and they themselves are escaped, and the line begins with a backslash.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")


def sum_line(digest: str, name: str) -> bytes:
    """The line of one file, its newline included; a name that is no UTF-8 keeps its bytes."""
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n".encode(errors="surrogateescape")


def read_sums(path: str | os.PathLike[str]) -> dict[str, str]:
    """The lower-case hex sha256 of each name of a list.

    Raises:
        InputMissing: there is no such list.
        DataError: a line of it is something else.
    """
    try:
        lines = Path(path).read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    sums = {}
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line:
            continue  # what is behind the last newline
        found = _LINE.fullmatch(line.removesuffix("\r"))
        if found is None:
            raise DataError(f"{path}:{number}: not a line of sha256sum's; fetch or write the list again")
        sums[_unescaped(found[3]) if found[1] else found[3]] = found[2].lower()
    return sums


def _unescaped(name: str) -> str:
    plain = {escape: character for character, escape in _ESCAPES.items()}
    return re.sub(r"\\[\\nr]", lambda found: plain[found[0]], name)
