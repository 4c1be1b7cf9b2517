# SPDX-License-Identifier: Apache-2.0
"""Presets: configurations of published models, shipped with the library."""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from importlib.resources.abc import Traversable

_SUFFIX = ".yml"


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A preset as `--list-presets` shows it."""

    name: str
    parameters: int
    summary: str  # the file's first comment line


@functools.cache
def names() -> tuple[str, ...]:
    """Names of all presets, families together and small models first."""
    found: list[str] = []
    root = _root()
    for entry in sorted(root.iterdir(), key=lambda item: item.name):
        if entry.is_dir():
            found += [f"{entry.name}/{item.name.removesuffix(_SUFFIX)}" for item in entry.iterdir() if _is_preset(item)]
        elif _is_preset(entry):
            found.append(entry.name.removesuffix(_SUFFIX))
    return tuple(sorted(found, key=lambda name: (name.partition("/")[0], _size(name), name)))


def text(name: str) -> str:
    """The YAML of a preset."""
    return _root().joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def list_presets() -> list[Preset]:
    """Every preset with its logical parameter count."""
    from libneox.config.load import load_config

    found = []
    for name in names():
        parameters = load_config([name]).model_config().num_parameters()
        found.append(Preset(name, parameters, text(name).splitlines()[1].removeprefix("#").strip()))
    return found


def _root() -> Traversable:
    return resources.files("libneox.config").joinpath("presets")


def _is_preset(entry: Traversable) -> bool:
    return entry.name.endswith(_SUFFIX)


def _size(name: str) -> float:
    """`pythia/1.4B` as 1.4e9, to sort by."""
    size = name.rpartition("/")[2]
    return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
