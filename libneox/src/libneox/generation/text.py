# SPDX-License-Identifier: Apache-2.0
"""From ids to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libneox.tokenizer import Tokenizer

ANCHOR = 8  # ids of the prompt decoded along, so that a tokenizer that drops a leading space does not
LONGEST_CHARACTER = 4  # tokens of a single byte each
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one completion as it grows.

    Attributes:
        text: all of it so far, without the stop string.
        stopped: the stop string that ended it, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids = list(prompt_ids[-ANCHOR:])
        self._begin, self._read = 0, len(self._ids)  # ids before `begin` are done with, those before `read` are in text
        self._given = 0  # characters handed out
        self.text, self.stopped = "", None

    def push(self, token: int) -> str:
        """Add a token; return new text that is certain: whole characters, no part of a possible stop string."""
        self._ids.append(token)
        self._decode(final=False)
        return self._release(self._certain())

    def finish(self) -> str:
        """No more tokens come: return the rest."""
        self._decode(final=True)
        return self._release(len(self.text))

    def _decode(self, *, final: bool) -> None:
        if self.stopped is not None or self._read == len(self._ids):
            return
        known = self._tokenizer.decode(self._ids[self._begin : self._read])
        whole = self._tokenizer.decode(self._ids[self._begin :])
        pending = len(self._ids) - self._read
        if whole.endswith(INCOMPLETE) and pending < LONGEST_CHARACTER and not final:
            return
        searched = len(self.text)
        self.text += whole[len(known) :] if whole.startswith(known) else self._tokenizer.decode(self._ids[self._read :])
        self._begin, self._read = self._read, len(self._ids)
        self._search(searched)

    def _search(self, searched: int) -> None:
        found = [(self.text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in self._stop]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, self.stopped = min(found)
            self.text = self.text[:at]

    def _certain(self) -> int:
        """Characters that no further token can take back."""
        if self.stopped is not None:
            return len(self.text)
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        return len(self.text) - held

    def _release(self, end: int) -> str:
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new
