# SPDX-License-Identifier: Apache-2.0
"""From files, presets, mappings and `--set` to a NeoxConfig: finding, merging, translating, checking.

Order of precedence: presets, then files and mappings (which may not contradict each other), then overrides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libneox.config import presets
from libneox.config.aliases import ALIASES, REMOVED, llama_mlp, translate
from libneox.config.checks import check_values
from libneox.config.key import Key
from libneox.config.problems import Place, Problems, suggestion
from libneox.config.reader import Document, read_document, read_value
from libneox.config.tree import GROUPS, NeoxConfig, all_keys
from libneox.config.types import WrongType, coerce
from libneox.config.warnings import warnings_of
from libneox.errors import InputMissing

SUFFIXES = (".yml", ".yaml", ".json")
Source = str | Path | Mapping[str, Any]
# Keys that say the same thing in different ways: one from a later layer displaces the others of earlier layers.
ALTERNATIVES = (
    ("ffn_hidden_size", "intermediate_size", "expansion_factor"),
    ("train_iters", "train_epochs"),
    ("data_path", "train_data_paths"),
)


@dataclasses.dataclass(slots=True)
class Layer:
    """Values under today's names, and the place of each by its path."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[tuple[str | int, ...], Place] = dataclasses.field(default_factory=dict)
    mlp_type: tuple[Any, Place | None] | None = None
    nested: list[tuple[str, Any, Place | None, str]] = dataclasses.field(default_factory=list)  # path, value, alias
    notes: list[str] = dataclasses.field(default_factory=list)


def load_config(
    sources: Sequence[Source],
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    conf_dir: str | Path | None = None,
) -> NeoxConfig:
    """Read a configuration.

    Args:
        sources: YAML or JSON files (the suffix may be left out), names of presets such as `pythia/160M`, mappings.
        overrides: `key=value` or `key.inner=value` with the value in YAML; they win over everything.
        conf_dir: directory that file names are looked up in.

    Raises:
        UsageError: something is wrong; the message lists every problem with file and line.
        InputMissing: a file is not there.
    """
    problems = Problems()
    base, files = Layer(), Layer()
    for number, source in enumerate(sources, 1):
        document, is_preset = _read(source, number, conf_dir, problems, files.notes)
        _merge(base if is_preset else files, _translate(document, problems), problems)
    merged = _overlay(base, files)
    _expand_mlp_type(merged, problems)
    _hoist_extra_args(merged, problems)
    _apply_nested(merged, problems)
    _apply_overrides(merged, overrides, problems)
    values = _typed(merged, problems)
    _settle_precision(values, merged, problems)
    config = _tree(values, merged)
    check_values(config, problems)
    problems.raise_if_any()
    return dataclasses.replace(config, warnings=(*merged.notes, *warnings_of(config)))


def _read(
    source: Source, number: int, conf_dir: str | Path | None, problems: Problems, notes: list[str]
) -> tuple[Document, bool]:
    if isinstance(source, Mapping):
        place = Place(f"mapping {number}")
        return Document(dict(source), {(str(name),): place for name in source}), False
    path = _find(Path(source) if conf_dir is None else Path(conf_dir) / source)
    if path is not None:
        if conf_dir is None and str(source) in presets.names():
            notes.append(f"{path}: the file is used, not the preset of this name")
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problems.add(Place(str(path)), "", f"is not UTF-8 text (byte {error.start})")
            return Document({}, {}), False
        if path.suffix == ".json":
            text = text.replace("\t", " ")  # JSON may indent with tabs, YAML may not; strings hold no raw tab
        return read_document(text, str(path), problems), False
    if str(source) in presets.names():
        return read_document(presets.text(str(source)), f"preset {source}", problems), True
    hint = suggestion(str(source), presets.names())
    raise InputMissing(f"{source}: no such file or preset{hint or '; presets are listed by neox-train --list-presets'}")


def _find(path: Path) -> Path | None:
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _translate(document: Document, problems: Problems) -> Layer:
    """Bring a document's keys under today's names."""
    layer = Layer()
    written: dict[str, str] = {}  # today's name to the name that was written
    for raw, value in document.values.items():
        place = document.places.get((raw,))
        name = str(raw).replace("-", "_")
        target = _target(name, place, problems)
        if target is None:
            continue
        if name == "mlp_type":
            layer.mlp_type = (value, place)
            continue
        if name in ALIASES:
            layer.notes.append(f"{place}: {raw}: is an old name; write {target}")
            value = translate(name, value)
            if value is None:
                continue
        if "." in target:
            layer.nested.append((target, value, place, name))
            continue
        if target in written:
            problems.add(place, str(raw), f"means the same as {written[target]}; remove one")
            continue
        written[target] = str(raw)
        layer.values[target] = value
        layer.places |= {(target, *path[1:]): where for path, where in document.places.items() if path[:1] == (raw,)}
    return layer


def _target(name: str, place: Place | None, problems: Problems) -> str | None:
    if name in REMOVED:
        problems.add(place, name, f"is not known; {REMOVED[name]}")
        return None
    if name in ALIASES:
        return ALIASES[name].target
    if name in all_keys():
        return name
    problems.add(place, name, f"is not a key{suggestion(name, [*all_keys(), *ALIASES]) or '; remove it'}")
    return None


def _merge(into: Layer, layer: Layer, problems: Problems) -> None:
    for name, value in layer.values.items():
        if name in into.values:
            problems.add(
                layer.places.get((name,)), name, f"is set in {into.places.get((name,))} already; remove one of them"
            )
            continue
        into.values[name] = value
    into.places = layer.places | into.places
    into.nested += layer.nested
    into.mlp_type = into.mlp_type or layer.mlp_type
    into.notes += layer.notes


def _overlay(base: Layer, top: Layer) -> Layer:
    kept = {name: value for name, value in base.values.items() if name not in _displaced(top.values)}
    return Layer(
        kept | top.values,
        {path: place for path, place in base.places.items() if path[0] not in top.values} | top.places,
        base.mlp_type or top.mlp_type,
        base.nested + top.nested,
        base.notes + top.notes,
    )


def _displaced(values: Mapping[str, Any]) -> set[str]:
    """Keys of an earlier layer that these values replace although their names differ."""
    set_here = {name for name, value in values.items() if value is not None}
    return {name for group in ALTERNATIVES if set_here & set(group) for name in group if name not in set_here}


def _expand_mlp_type(layer: Layer, problems: Problems) -> None:
    if layer.mlp_type is None or layer.mlp_type[0] in (None, "regular"):
        return
    kind, place = layer.mlp_type
    if kind != "llama":
        problems.add(place, "mlp_type", f"expected llama or regular, found {kind!r}")
        return
    keys = llama_mlp(layer.values)
    said = ", ".join(f"{name}: {str(value).lower()}" for name, value in keys.items())
    layer.notes.append(f"{place}: mlp_type: llama is an old spelling; write {said}")
    layer.values.pop("intermediate_size", None)
    layer.values |= keys


def _hoist_extra_args(layer: Layer, problems: Problems) -> None:
    """Move keys of deepspeed_extra_args that are keys of their own to the top."""
    extra = layer.values.get("deepspeed_extra_args")
    if not isinstance(extra, dict):
        return
    rest = {}
    for name, value in extra.items():
        target = str(name)
        if target not in all_keys():
            rest[name] = value
        elif layer.values.get(target) is None:
            layer.values[target] = value
            here = ("deepspeed_extra_args", name)
            layer.places |= {(target, *path[2:]): place for path, place in layer.places.items() if path[:2] == here}
        elif layer.values[target] != value:
            place = layer.places.get(("deepspeed_extra_args", name))
            problems.add(place, name, f"contradicts {name} at {layer.places.get((target,))}; remove one of them")
    layer.values["deepspeed_extra_args"] = rest or None


def _apply_nested(layer: Layer, problems: Problems) -> None:
    """Put aliases of inner keys, such as `lr`, into their sections."""
    for path, value, place, alias in layer.nested:
        head, *inner = path.split(".")
        section = _copy_section(layer, head, inner, problems, place)
        if section is None or value is None:
            continue
        if inner[-1] in section and section[inner[-1]] != value:
            problems.add(place, alias, f"contradicts {path}, which is {section[inner[-1]]}; remove one of them")
            continue
        section[inner[-1]] = value
        layer.places[(head, *inner)] = place or Place("?")


def _copy_section(
    layer: Layer, head: str, inner: Sequence[str], problems: Problems, place: Place | None
) -> dict[str, Any] | None:
    """A fresh copy of the mapping that holds `head.inner[0]...`, linked into the layer; None if it is no mapping."""
    parent: dict[str, Any] = layer.values
    for done, part in enumerate([head, *inner[:-1]]):
        child = parent.get(part)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            problems.add(place, ".".join([head, *inner]), f"{'.'.join([head, *inner[:done]])} is no mapping")
            return None
        parent[part] = child = dict(child)
        parent = child
    return parent


def _apply_overrides(layer: Layer, overrides: Sequence[str] | Mapping[str, Any], problems: Problems) -> None:
    pairs: list[tuple[str, Any, str | None]]
    if isinstance(overrides, Mapping):
        pairs = [(name, value, None) for name, value in overrides.items()]
    else:
        pairs = [_split(text, problems) for text in overrides]
    given: dict[str, Any] = {}
    for raw, value, text in pairs:
        place = Place(f"--set {raw}", None, text)
        head, _, inner = raw.replace("-", "_").partition(".")
        target = _target(head, place, problems) if head else None
        if target is None:
            continue
        path = f"{target}.{inner}" if inner else target
        if head in ALIASES:
            layer.notes.append(f"--set {raw}: is an old name; write {path}")
            value = translate(head, value)
        given[target] = value
        _set_path(layer, path, value, place, problems)
    for name in _displaced(given):
        layer.values.pop(name, None)
    if given.get("precision") is not None:  # it wins over `fp16: {enabled: true}` of a file
        for section in {"fp16", "bf16"} - set(given):
            if isinstance(layer.values.get(section), dict):
                layer.values[section] = {k: v for k, v in layer.values[section].items() if k != "enabled"} or None


def _split(text: str, problems: Problems) -> tuple[str, Any, str | None]:
    name, equals, written = text.partition("=")
    if not equals or not name.partition(".")[0].strip():
        lacks = "key" if equals else "value"
        problems.add(Place(f"--set {text}"), "", f"has no {lacks}; write --set key=value")
        return "", None, None
    scratch = Problems()
    value, _ = read_value(written, f"--set {name}", scratch)
    key = all_keys().get(name.replace("-", "_"))
    if scratch and key is not None and "str" in str(key.type):
        value = written  # text that happens to be no YAML
    elif scratch:
        problems.add(Place(f"--set {name}"), "", f"{written!r} is not YAML")
    return name.strip(), value, written


def _set_path(layer: Layer, path: str, value: Any, place: Place, problems: Problems) -> None:
    head, *inner = path.split(".")
    if not inner:
        layer.values[head] = value
        layer.places = {p: w for p, w in layer.places.items() if p[0] != head}
    else:
        section = _copy_section(layer, head, inner, problems, place)
        if section is None:
            return
        section[inner[-1]] = value
    layer.places[(head, *inner)] = place
    layer.places[(head,)] = place


def _typed(layer: Layer, problems: Problems) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in layer.values.items():
        key = all_keys()[name]
        place = layer.places.get((name,))
        try:
            values[name] = coerce(key, value, place.text if place else None)
        except WrongType as error:
            problems.add(place, name, str(error))
            continue
        if isinstance(value, dict) and key.sections is not None:
            _check_section(key, value, layer, problems)
    return values


def _settle_precision(values: dict[str, Any], layer: Layer, problems: Problems) -> None:
    """Make `precision` say what `fp16: {enabled}` and `bf16: {enabled}` say."""
    for section, name in (("fp16", "fp16"), ("bf16", "bfloat16")):
        enabled = (values.get(section) or {}).get("enabled")
        if enabled is None:
            continue
        place = layer.places.get((section, "enabled")) or layer.places.get((section,))
        if not isinstance(enabled, bool):
            problems.add(place, f"{section}.enabled", f"expected true or false, found {enabled!r}")
        elif enabled and (values.get("precision") or name) != name:
            problems.add(place, section, f"is enabled but precision is {values['precision']}; keep one of them")
        elif not enabled and values.get("precision") == name:
            problems.add(place, section, f"is disabled but precision is {name}; keep one of them")
        if enabled is True:
            values.setdefault("precision", name)
            values["precision"] = values["precision"] or name


def _check_section(key: Key, value: Mapping[str, Any], layer: Layer, problems: Problems) -> None:
    for inner in value:
        if inner not in (key.sections or {}):
            place = layer.places.get((key.name, inner)) or layer.places.get((key.name,))
            hint = suggestion(str(inner), key.sections or {})
            problems.add(place, f"{key.name}.{inner}", f"is not a key of {key.name}{hint or '; remove it'}")


def _tree(values: Mapping[str, Any], layer: Layer) -> NeoxConfig:
    groups = {
        group: cls(**{name: value for name, value in values.items() if all_keys()[name].group == group})
        for group, cls in GROUPS.items()
    }
    places = {".".join(map(str, path)): place for path, place in layer.places.items()}
    return NeoxConfig(**groups, places=places)
