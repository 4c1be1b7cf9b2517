# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 set a flag that the loop looks at after each step. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from libneox.errors import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches every process of a terminal, and a launcher passes its own on: the same keystroke twice.
ECHO_S = 1.0


class StopRequest:
    """Whether somebody asked this process to stop, and with which signal."""

    def __init__(self, *, echoes: bool):
        """`echoes`: a launcher may deliver one request twice; a second SIGINT within a second is not a second one."""
        self.name = ""
        self.last_words: Callable[[], None] = lambda: None  # said before a second SIGINT ends the process
        self._first_interrupt = 0.0
        self._echoes = echoes

    def __bool__(self) -> bool:
        return bool(self.name)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals over; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt and not (self._echoes and now - self._first_interrupt < ECHO_S):
                os.write(2, b"neox-train: interrupted again; leaving without saving\n")
                with contextlib.suppress(Exception):
                    self.last_words()
                os._exit(INTERRUPTED)
            self._first_interrupt = self._first_interrupt or now
        if not self.name:
            self.name = signal.Signals(number).name
            message = f"neox-train: {self.name}: saving after the step under way, then stopping\n"
            os.write(2, message.encode())


@contextlib.contextmanager
def sparing_children() -> Iterator[None]:
    """Processes started in here outlive signals sent to the whole group (Ctrl-C, schedulers): they inherit the mask.

    The signals themselves reach this process when it is left, if no other thread has taken them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stdout_line(fd: int | None, text: str) -> int | None:
    """Write a line to a descriptor; None once its reader is gone, which must not end a run."""
    if fd is None:
        return None
    data = text.encode() + b"\n"
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        print(f"neox-train: stdout: {error.strerror}; going on without it", file=sys.stderr, flush=True)
        return None
    return fd
