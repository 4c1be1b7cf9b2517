# SPDX-License-Identifier: Apache-2.0
"""How one configuration key is declared: type, default, documentation and standing, in one place.

A group of keys is a frozen dataclass whose fields are made by `key`, `ignored` or `refused`. The annotation is the
type that a value is checked against; everything else that is ever said about a key (reference page, `--help-config`,
JSON schema, error messages) is generated from the field.
"""

import dataclasses
from typing import Any, Literal

Standing = Literal["acts", "ignored", "refused"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A declared key, as the rest of the package sees it."""

    name: str
    group: str
    type: Any
    default: Any
    doc: str
    standing: Standing
    reason: str  # why it is ignored or refused
    minimum: float | None
    above: float | None
    maximum: float | None
    synonyms: dict[str, str]  # other spellings of choices
    sections: dict[str, str] | None  # known keys of a dict-valued key, with their documentation


def key(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    synonyms: dict[str, str] | None = None,
    sections: dict[str, str] | None = None,
) -> Any:
    """A key that acts.

    Args:
        default: value when nobody sets the key; `key: null` means the default too.
        minimum, above, maximum: bounds of a number (`above` is exclusive).
        synonyms: other spellings of the choices of a Literal, spelling to choice.
        sections: the keys a dict may hold, with documentation; None allows any.
    """
    return _field(default, doc, "acts", "", minimum, above, maximum, synonyms, sections)


def ignored(default: Any, doc: str, reason: str) -> Any:
    """A key of GPT-NeoX that is accepted, changes nothing, and is warned about when set to another value."""
    return _field(default, doc, "ignored", reason)


def refused(default: Any, doc: str, reason: str) -> Any:
    """A key of GPT-NeoX that is an error when set to anything but its default."""
    return _field(default, doc, "refused", reason)


def _field(
    default: Any,
    doc: str,
    standing: Standing,
    reason: str,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    synonyms: dict[str, str] | None = None,
    sections: dict[str, str] | None = None,
) -> Any:
    metadata = {
        "doc": doc,
        "standing": standing,
        "reason": reason,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "synonyms": synonyms or {},
        "sections": sections,
    }
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(group: str, cls: type) -> list[Key]:
    """The keys a group declares, in order."""
    return [
        Key(name=field.name, group=group, type=field.type, default=field.default, **field.metadata)
        for field in dataclasses.fields(cls)
    ]
