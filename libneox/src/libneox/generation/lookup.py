# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: guess that what followed the same few tokens before follows them again.

The guess is checked by the model in one pass and only what it would have produced itself is kept, so the text is the
same as without guessing. Source: prompt lookup decoding (Saxena 2023); no draft model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH = 3


class Lookup:
    """Finds guesses in a growing text, in constant time a token."""

    def __init__(self, ids: Sequence[int], guesses: int):
        """Guess up to `guesses` tokens at a time."""
        self._ids: list[int] = []
        self._guesses = guesses
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index behind its latest occurrence but the current one
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Add a token to the text."""
        # The n-grams that ended before this token are now followed by something.
        end = len(self._ids)
        for size in range(1, LONGEST_MATCH + 1):
            if end >= size:
                self._after[tuple(self._ids[end - size : end])] = end
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Tokens that may come next, at most `most`; empty if the end of the text is new."""
        end = len(self._ids)
        for size in range(min(LONGEST_MATCH, end), 0, -1):
            start = self._after.get(tuple(self._ids[end - size :]))
            if start is not None:
                return self._ids[start : start + min(self._guesses, most)]
        return []
