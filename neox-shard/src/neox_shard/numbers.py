# SPDX-License-Identifier: Apache-2.0
"""Counts as people write them."""

from __future__ import annotations

from libneox.errors import UsageError

SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_count(text: str | None, option: str) -> int | None:
    """`300M` as 300000000; decimal units K, M, G (or B) and T. None stays None.

    Raises:
        UsageError: not a whole number above 0.
    """
    if text is None:
        return None
    digits, factor = text.strip().lower(), 1
    if digits[-1:] in SUFFIXES:
        digits, factor = digits[:-1], SUFFIXES[digits[-1]]
    try:
        value = float(digits) * factor if "." in digits else int(digits) * factor
    except ValueError as error:
        raise UsageError(f"{option} {text}: not a number such as 5000 or 300M") from error
    if value < 1 or value != int(value):
        raise UsageError(f"{option} {text}: must be a whole number above 0")
    return int(value)
