# SPDX-License-Identifier: Apache-2.0
"""From raw records to texts: strict, and with a reason for every record that is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from libneox.errors import UsageError
from neox_tokenize.blocks import Block

SURROGATES = re.compile("[\ud800-\udfff]")
BOM = b"\xef\xbb\xbf"
INTEGER_DIGITS = 300  # longer integers are read as floats: they are no counts of anything


@dataclass(frozen=True)
class Reject:
    """A record that gives no document.

    Attributes:
        where: the record, as a message calls it.
        reason: a fixed word, counted.
        detail: the fact, for a person.
        record: its raw bytes.
        harmless: it holds nothing to lose (an empty document, a blank line): counted, never an error.
        before: documents of its block that stand before it.
    """

    where: str
    reason: str
    detail: str
    record: bytes = field(repr=False)
    harmless: bool = False
    before: int = 0


class BadRecord(Exception):
    """A record cannot be used: reason and detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rules:
    """How records are read.

    Attributes:
        keys: fields to tokenize; a dot goes into an object.
        replace: put U+FFFD in place of what is no valid Unicode, instead of refusing the record.
        last_duplicate: of a key given twice take the last, instead of refusing the record.
        neox: read as GPT-NeoX did: lists are joined, falsy values are empty, a BOM may start any line.
    """

    keys: tuple[str, ...] = ("text",)
    replace: bool = False
    last_duplicate: bool = False
    neox: bool = False


class Reader:
    """Turns blocks into rows: for each record the values of the keys, or a reject.

    Safe to use from several threads.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self._paths = [tuple(key.split(".")) for key in rules.keys]
        self._marks = [f'"{part}"'.encode() for part in {part for path in self._paths for part in path}]
        self._decode = None if rules.neox else _fast_decoder(self._paths)

    def texts(self, block: Block) -> tuple[list[list[str]], list[Reject]]:
        """The texts of a block, one list for each key, all as long as there are documents; and what was left out.

        Takes the records out of the block: a line of gigabytes need not stay beside its text.
        """
        columns: list[list[str]] = [[] for _ in self._paths]
        rejects: list[Reject] = []
        for index, record in enumerate(block.records):
            try:
                values = self._values(block, index, record)
                reject = None if any(values) else nothing_in(block, index, "empty document" if values else "blank line")
            except BadRecord as error:
                reject = rejected(block, index, error)
            if reject is not None:
                rejects.append(replace(reject, before=len(columns[0])))
                continue
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        block.records.clear()
        return columns, rejects

    def values(self, block: Block, keys: Sequence[str]) -> Iterator[list[Any] | Reject]:
        """Whatever JSON values stand under some keys, or a reject, of each record in turn."""
        paths = [tuple(key.split(".")) for key in keys]
        for index, record in enumerate(block.records):
            if block.kind == "json" and not record.strip():
                yield nothing_in(block, index, "blank line")
                continue
            try:
                if block.kind == "text":
                    raise BadRecord("not JSON", "records with fields are needed, this is plain text")
                value = record if block.kind == "row" else parse(record.removeprefix(BOM))
                found: list[Any] | Reject = [self._follow(value, path) for path in paths]
            except BadRecord as error:
                found = rejected(block, index, error)
            yield found

    def _values(self, block: Block, index: int, record: Any) -> Sequence[str]:
        if block.kind == "json":
            if index == 0 and block.first == 1 and record[:3] == BOM:
                record = record[3:]
            if self._decode is not None and not any(record.count(mark) > 1 for mark in self._marks):
                try:
                    return self._decode(record)
                except Exception:  # noqa: S110 - whatever is wrong, the strict reader says it better
                    pass
            return self._slowly(record)
        if block.kind == "row":
            return [self._text(_follow(record, path), path) for path in self._paths]
        if len(self._paths) > 1:
            raise BadRecord("not JSON", f"the keys {', '.join(self.rules.keys)} need records with fields; this is text")
        at_start = block.names is not None or block.first + index == 1
        return [self._plain(record, first=at_start)]

    def _plain(self, record: bytes, *, first: bool) -> str:
        if first and record[:3] == BOM:
            record = record[3:]
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            if self.rules.replace:
                return record.decode(errors="replace")
            raise BadRecord("invalid UTF-8", f"byte {record[error.start]:#04x} at offset {error.start}") from error

    def _slowly(self, record: bytes) -> Sequence[str]:
        if self.rules.neox:
            record = record.removeprefix(BOM).removeprefix(b"\x1e")
        elif not record.strip():
            return ()
        value = parse(record)
        if isinstance(value, str) and len(self._paths) == 1:  # a bare string is a document, as in GPT-NeoX
            return [self._text(value, self._paths[0])]
        return [self._text(self._follow(value, path), path) for path in self._paths]

    def _follow(self, value: Any, path: tuple[str, ...]) -> Any:
        return _follow(value, path, once=not self.rules.last_duplicate and not self.rules.neox)

    def _text(self, value: Any, path: tuple[str, ...]) -> str:
        if self.rules.neox:
            value = "\n\n".join(map(str, value)) if isinstance(value, list) else value or ""
        if not isinstance(value, str):
            raise BadRecord("not a string", f"the value of {'.'.join(path)!r} is {_name_of(value)}, not a string")
        return self.clean(value)

    def clean(self, text: str) -> str:
        """Valid Unicode of a string that JSON allowed; raises BadRecord if it is not and must not be replaced."""
        found = SURROGATES.search(text)
        if found is None:
            return text
        if self.rules.replace:
            return SURROGATES.sub("\ufffd", text)
        code = ord(found.group())
        if 0xDC80 <= code <= 0xDCFF:  # how parse() carries a byte that is no UTF-8
            offset = len(text[: found.start()].encode(errors="surrogateescape"))
            raise BadRecord(
                "invalid UTF-8",
                f"byte {code - 0xDC00:#04x} at offset {offset} of the text; --errors replace makes it U+FFFD",
            )
        raise BadRecord(
            "lone surrogate", f"U+{code:04X} at character {found.start()} of the text is no character; --errors replace"
        )


def rejected(block: Block, index: int, error: BadRecord) -> Reject:
    """A record of a block that cannot be used."""
    return Reject(block.where(index), error.reason, error.detail, _raw(block.records[index]))


def nothing_in(block: Block, index: int, reason: str) -> Reject:
    """A record of a block that holds nothing to lose."""
    return Reject(block.where(index), reason, "nothing in it", _raw(block.records[index]), harmless=True)


class _Object(dict):  # type: ignore[type-arg]
    """A JSON object that remembers which of its keys were given more than once."""

    repeated: frozenset[str] = frozenset()


def parse(record: bytes) -> Any:
    """One JSON value, by the slow and strict way; bytes that are no UTF-8 become lone surrogates of U+DC80 to U+DCFF.

    Raises:
        BadRecord: it is not JSON, or nested too deep.
    """
    try:
        text = record.decode(errors="surrogateescape")
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise BadRecord("nested too deep", "the JSON is nested more than about 1000 deep") from error
    except ValueError as error:
        raise BadRecord("broken JSON", f"not valid JSON ({error})") from error


def _integer(digits: str) -> int | float:
    # a number of 5000 digits, which int() refuses, in a field nobody asked for is none of our business
    return int(digits) if len(digits) <= INTEGER_DIGITS else float(digits)


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        result.repeated = frozenset(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return result


def _follow(value: Any, path: Sequence[str], *, once: bool = False) -> Any:
    """What stands under a path of keys; with `once`, none of them may stand there twice."""
    for depth, part in enumerate(path):
        if not isinstance(value, Mapping):
            behind = f"the value of {'.'.join(path[:depth])!r}" if depth else "the record"
            raise BadRecord("no object", f"{behind} is {_name_of(value)}, not an object with the key {part!r}")
        name = ".".join(path[: depth + 1])
        if part not in value:
            present = ", ".join(map(repr, list(value)[:8])) or "none"
            raise BadRecord("missing key", f"no key {name!r} (there are: {present}); --key names another")
        if once and isinstance(value, _Object) and part in value.repeated:
            detail = f"the key {name!r} stands there twice; --duplicate-keys last takes the last of them"
            raise BadRecord("duplicate key", detail)
        value = value[part]
    return value


def _name_of(value: Any) -> str:
    names = {dict: "an object", _Object: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a string" if isinstance(value, str) else f"a number ({value!r})"[:40])


def _raw(record: Any) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record, default=str, ensure_ascii=False).encode()


def _fast_decoder(paths: Sequence[tuple[str, ...]]) -> Any:
    """A function from a JSON object's bytes to the strings at `paths`; it raises on anything unusual.

    msgspec checks the whole record, builds nothing but the wanted strings, and is five times as fast as json.
    """
    import msgspec

    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"--key {'.'.join(path)} goes into another --key")
        if isinstance(node.get(path[-1]), dict):
            raise UsageError(f"another --key goes into --key {'.'.join(path)}")
        node[path[-1]] = str
    decoder = msgspec.json.Decoder(_struct(tree))
    getters = [tuple(f"f{list(_at(tree, path[:i])).index(part)}" for i, part in enumerate(path)) for path in paths]
    if len(getters) == 1 and len(getters[0]) == 1:
        return lambda record: (decoder.decode(record).f0,)

    def values(record: bytes) -> list[str]:
        top, result = decoder.decode(record), []
        for getter in getters:
            value = top
            for name in getter:
                value = getattr(value, name)
            result.append(value)
        return result

    return values


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for part in path:
        tree = tree[part]
    return tree


def _struct(tree: Mapping[str, Any]) -> type:
    import msgspec

    fields = [
        (f"f{i}", _struct(child) if isinstance(child, dict) else str, msgspec.field(name=key))
        for i, (key, child) in enumerate(tree.items())
    ]
    return msgspec.defstruct("Record", fields)
