# SPDX-License-Identifier: Apache-2.0
"""`log_dir`: the lines of stderr, in a file for each rank as well. No torch."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any, TextIO


class StderrCopy:
    """Stands in for sys.stderr. What a progress line overwrites on a terminal is not copied."""

    def __init__(self, stream: TextIO, file: TextIO):
        self._stream, self._file, self._line, self._failed = stream, file, "", False

    def write(self, text: str) -> int:
        """Write to the stream, and each line that is complete to the file."""
        self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        try:
            for line in lines:
                self._file.write(line.rsplit("\r", 1)[-1].removeprefix("\x1b[K") + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                self._stream.write(f"neox-train: warning: {self._file.name}: {error.strerror}; log_dir has gaps\n")
            self._failed = True
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # whether it is a terminal, its descriptor, ...


def copy_stderr(folder: str, rank: int) -> None:
    """From now on the lines of sys.stderr are appended to FOLDER/HOST_rankN.log too.

    Raises:
        OSError: it cannot be created.
    """
    path = Path(folder) / f"{socket.gethostname()}_rank{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", errors="backslashreplace")  # as stderr itself: paths may be no UTF-8
    sys.stderr = StderrCopy(sys.stderr, file)  # type: ignore[assignment]
