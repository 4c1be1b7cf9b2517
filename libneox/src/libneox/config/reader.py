# SPDX-License-Identifier: Apache-2.0
"""Reading YAML (and JSON, its subset) with line numbers and without surprises.

Differences from PyYAML's own loaders: only `true` and `false` are booleans here (a key that wants a boolean takes
yes, no, on and off too, see `libneox.config.types`), `1e-4` is a number, dates and sexagesimals are text, a key given
twice is an error, and no tag can make an object.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from libneox.config.problems import Place, Problems

Path = tuple[str | int, ...]
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNTAGGED = "untagged"
_CORE = "tag:yaml.org,2002:"
_MOST_NODES = 50_000  # a config has hundreds; nested aliases ("billion laughs") have billions

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# 017 is octal to YAML 1.1 and decimal to YAML 1.2: nobody can know, so it stays text
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z")
_BASED = re.compile(r"[-+]?0(?:o[0-7]+|x[0-9a-fA-F]+|b[01]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


class _Loader(_BASE):  # type: ignore[misc]
    """Composes nodes without resolving plain scalars; nothing is ever constructed by PyYAML."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    DEFAULT_SCALAR_TAG = _UNTAGGED


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A parsed mapping and where each of its values stands."""

    values: dict[str, Any]
    places: dict[Path, Place]


def read_document(text: str, source: str, problems: Problems) -> Document:
    """Parse one mapping. What is wrong goes to `problems`; the rest of the document is still returned."""
    builder = _Builder(source, problems)
    node = builder.compose(text)
    if node is None:
        return Document({}, {})
    if not isinstance(node, yaml.MappingNode):
        problems.add(builder.place(node), "", "holds no mapping; a config is made of lines `key: value`")
        return Document({}, {})
    return Document(builder.value_of(node) or {}, builder.places)


def read_value(text: str, source: str, problems: Problems) -> tuple[Any, dict[Path, Place]]:
    """Parse one YAML value, as in `--set key=VALUE`."""
    builder = _Builder(source, problems, lines=False)
    node = builder.compose(text)
    return (None if node is None else builder.value_of(node)), builder.places


class _EndlessError(Exception):
    """Aliases that contain themselves, or each other many times over."""


class _Builder:
    def __init__(self, source: str, problems: Problems, *, lines: bool = True):
        self._source, self._problems, self._lines = source, problems, lines
        self.places: dict[Path, Place] = {}
        self._nodes = 0
        self._open: set[int] = set()

    def compose(self, text: str) -> Any:
        try:
            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark and self._lines else None
            self._problems.add(Place(self._source, line), "", f"is not YAML: {error.problem or error.context}")
        except (yaml.YAMLError, RecursionError) as error:
            self._problems.add(Place(self._source), "", f"is not YAML: {str(error).splitlines()[0]}")
        return None

    def place(self, node: Any, text: str | None = None) -> Place:
        return Place(self._source, node.start_mark.line + 1 if self._lines else None, text)

    def value_of(self, node: Any) -> Any:
        try:
            return self.build(node, ())
        except (_EndlessError, RecursionError):
            self._problems.add(Place(self._source), "", "has aliases that expand without end; remove them")
            return None

    def build(self, node: Any, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES or id(node) in self._open:
            raise _EndlessError
        if isinstance(node, yaml.ScalarNode):
            self.places[path] = self.place(node, node.value)
            return self._scalar(node, path)
        self.places[path] = self.place(node)
        if node.tag not in (_CORE + "map", _CORE + "seq"):
            self._refuse_tag(node, path)
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}  # normalised spelling to line
        inherited: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_UNTAGGED, _CORE + "str"):
                self._problems.add(self.place(key_node), _name(path), "keys must be plain words")
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for part in reversed(parts):
                    merged = self.build(part, path)
                    inherited |= merged if isinstance(merged, dict) else {}
                continue
            normal, line = key.replace("-", "_"), key_node.start_mark.line + 1
            if normal in lines:
                where = f" (first on line {lines[normal]})" if self._lines else ""
                self._problems.add(self.place(key_node), _name((*path, key)), f"is given twice{where}; remove one")
                continue
            lines[normal] = line
            values[key] = self.build(value_node, (*path, key))
            old = self.places[(*path, key)]
            self.places[(*path, key)] = Place(old.source, line if self._lines else None, old.text)
        return inherited | values

    def _scalar(self, node: Any, path: Path) -> Any:
        text: str = node.value
        if node.tag == _CORE + "str" or (node.tag == _UNTAGGED and node.style):
            return text
        if node.tag == _CORE + "null":
            return None
        if node.tag not in (_UNTAGGED, _CORE + "int", _CORE + "float", _CORE + "bool"):
            self._refuse_tag(node, path)
            return None
        return plain_scalar(text)

    def _refuse_tag(self, node: Any, path: Path) -> None:
        tag = node.tag.replace(_CORE, "!!")
        self._problems.add(self.place(node), _name(path), f"has the tag {tag}; no objects are made from a config")


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar: null, true, false, a number, or text."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _BASED.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return _SPECIAL.get(text.lower(), text)


def _name(path: Path) -> str:
    return ".".join(str(part) for part in path)
