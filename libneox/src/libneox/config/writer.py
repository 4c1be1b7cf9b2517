# SPDX-License-Identifier: Apache-2.0
"""Writing a configuration as YAML that reads back to the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from libneox.config.reader import plain_scalar
from libneox.config.tree import all_keys


def write_yaml(values: Mapping[str, Any]) -> str:
    """Flat keys in groups, each group under a comment with its name.

    Args:
        values: what `NeoxConfig.to_dict` gives.
    """
    lines: list[str] = []
    group = ""
    for name, value in values.items():
        if all_keys()[name].group != group:
            group = all_keys()[name].group
            lines.append(f"# {group}")
        lines.append(yaml.dump({name: value}, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True).rstrip())
    return "\n".join([*lines, ""])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the reader would take for something else, and writes lists on one line."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> Any:
    ambiguous = not isinstance(plain_scalar(value), str) or value == "<<"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if ambiguous else None)


def _float(dumper: _Dumper, value: float) -> Any:
    text = repr(value)
    if "e" in text and "." not in text:  # 1e-08 is text to YAML 1.1 readers
        text = text.replace("e", ".0e")
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
    )


def _int(dumper: _Dumper, value: int) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value))


def _bool(dumper: _Dumper, value: bool) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", "true" if value else "false")


def _null(dumper: _Dumper, value: None) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", "null")


def _list(dumper: _Dumper, value: list[Any]) -> Any:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _float)
_Dumper.add_representer(int, _int)
_Dumper.add_representer(bool, _bool)
_Dumper.add_representer(type(None), _null)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)
