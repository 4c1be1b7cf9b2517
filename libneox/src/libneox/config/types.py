# SPDX-License-Identifier: Apache-2.0
"""Checking a value against a key's type, and saying what was expected in words."""

from __future__ import annotations

import types
import typing
from typing import Any

from libneox.config.key import Key

_YES_NO = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class WrongType(Exception):
    """The value does not fit; the message says what was expected and what was found."""


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; a single type as a tuple of one."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(part for part in typing.get_args(annotation) if part is not type(None))
    return (annotation,)


def coerce(key: Key, value: Any, text: str | None) -> Any:
    """Return `value` as the type of `key`.

    Args:
        text: how a plain scalar was written; a key that holds text keeps it letter for letter.

    Raises:
        WrongType: it does not fit.
    """
    if value is None:
        return key.default
    parts = alternatives(key.type)
    if parts == (str,) and text is not None and not isinstance(value, str):
        value = text
    if isinstance(value, dict) and str(value.get("enabled")).lower() in _YES_NO:
        value = value | {"enabled": _YES_NO[str(value["enabled"]).lower()]}
    for part in parts:
        fits, result = _fit(part, value, key.synonyms)
        if fits:
            _check_bounds(key, result)
            return result
    raise WrongType(f"expected {expected(key)}, found {found(value)}{_hint(parts, value)}")


def _fit(part: Any, value: Any, synonyms: dict[str, str]) -> tuple[bool, Any]:
    origin = typing.get_origin(part)
    if origin is typing.Literal:
        return _fit_choice(typing.get_args(part), value, synonyms)
    if origin is list:
        return _fit_list(typing.get_args(part)[0], value)
    if origin is dict or part is dict:
        return isinstance(value, dict), value
    if part is Any:
        return True, value
    if part is bool:
        if isinstance(value, str) and value.lower() in _YES_NO:
            return True, _YES_NO[value.lower()]
        return isinstance(value, bool), value
    if isinstance(value, bool):
        return False, value
    if part is int:
        if isinstance(value, float) and value.is_integer():
            return True, int(value)
        return isinstance(value, int), value
    if part is float:
        return isinstance(value, int | float), float(value) if isinstance(value, int | float) else value
    return isinstance(value, part), value


def _fit_choice(choices: tuple[Any, ...], value: Any, synonyms: dict[str, str]) -> tuple[bool, Any]:
    if not isinstance(value, str):
        return False, value
    lower = value.lower()
    lower = synonyms.get(lower, lower)
    by_lower = {choice.lower(): choice for choice in choices}
    return lower in by_lower, by_lower.get(lower, value)


def _fit_list(element: Any, value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list):
        return False, value
    fitted = [_fit(element, item, {}) for item in value]
    return all(fits for fits, _ in fitted), [item for _, item in fitted]


def _check_bounds(key: Key, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if number != number or number in (float("inf"), float("-inf")):
            raise WrongType(f"is {number}; give a finite number")
        if key.minimum is not None and number < key.minimum:
            raise WrongType(f"is {number}; it must be at least {key.minimum}")
        if key.above is not None and number <= key.above:
            raise WrongType(f"is {number}; it must be more than {key.above}")
        if key.maximum is not None and number > key.maximum:
            raise WrongType(f"is {number}; it must be at most {key.maximum}")


def expected(key: Key) -> str:
    """The type of a key in words, for example `an integer` or `one of linear, log`."""
    return " or ".join(_word(part) for part in alternatives(key.type))


def _word(part: Any) -> str:
    origin = typing.get_origin(part)
    if origin is typing.Literal:
        choices = typing.get_args(part)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin is list:
        inner = typing.get_args(part)[0]
        plural = {str: "texts", int: "integers", float: "numbers"}.get(inner)
        return f"a list of {plural}" if plural else "a list"
    if origin is dict:
        return "a mapping"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(part, str(part))


def found(value: Any) -> str:
    """A value in words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"the list {value!r}" if len(repr(value)) < 60 else "a list"
    return repr(value)


def _hint(parts: tuple[Any, ...], value: Any) -> str:
    if isinstance(value, str) and (int in parts or float in parts):
        try:
            float(value)
        except ValueError:
            return ""
        return "; write it without quotes and leading zeros"
    if any(typing.get_origin(part) is list for part in parts) and isinstance(value, str | int | float):
        return f"; write [{value}]"
    literals = [
        choice for part in parts if typing.get_origin(part) is typing.Literal for choice in typing.get_args(part)
    ]
    if literals and isinstance(value, str):
        from libneox.config.problems import suggestion

        return suggestion(value.lower(), literals)
    return ""
