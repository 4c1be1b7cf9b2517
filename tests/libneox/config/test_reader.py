# SPDX-License-Identifier: Apache-2.0
"""YAML without surprises (series C of the reliability catalogue: C-02, C-04, C-05)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from libneox.config.problems import Problems
from libneox.config.reader import plain_scalar, read_document
from libneox.errors import UsageError


def parse(text: str) -> dict[str, Any]:
    problems = Problems()
    document = read_document(text, "c.yml", problems)
    problems.raise_if_any()
    return document.values


def message(text: str) -> str:
    problems = Problems()
    read_document(text, "c.yml", problems)
    with pytest.raises(UsageError) as caught:
        problems.raise_if_any()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-8", 1e-8),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", "017"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("969, 30, 1", "969, 30, 1"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    found = plain_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quotes_make_text() -> None:
    assert parse("a: '1e-4'\nb: \"true\"\nc: !!str 5") == {"a": "1e-4", "b": "true", "c": "5"}


def test_duplicate_keys_are_named_with_both_lines() -> None:
    assert message("a: 1\nb: 2\na: 3\n") == "c.yml:3: a: is given twice (first on line 1); remove one"


def test_duplicates_are_found_inside_and_across_spellings() -> None:
    assert "c.yml:3: optimizer.lr: is given twice" in message("optimizer:\n  lr: 1\n  lr: 2\n")
    assert "c.yml:2: seq_length: is given twice" in message("seq-length: 1\nseq_length: 1\n")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!custom", "!!binary"])
def test_no_object_is_ever_made(tag: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"a: {tag} ['touch {canary}']\nb: {tag} 'touch {canary}'\n"
    assert "c.yml:1: a" in message(text)
    assert "no objects are made" in message(text)
    assert not canary.exists()


def test_merge_keys_give_defaults() -> None:
    assert parse("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\n")["use"] == {"x": 1, "y": 3}


def test_aliases_cannot_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert message("\n".join(lines)) == "c.yml: has aliases that expand without end; remove them"
    assert message("a: &a [*a]") == "c.yml: has aliases that expand without end; remove them"


def test_broken_yaml_names_the_line() -> None:
    assert message("a: 1\nb: [1, 2\nc: 3\n").startswith("c.yml:3: is not YAML")
    assert message("- a\n- b\n") == "c.yml:1: holds no mapping; a config is made of lines `key: value`"
    assert "not YAML" in message("\x00")


def test_json_is_read() -> None:
    assert parse('{"a": 1e-8, "b": [true, null], "c": {"d": "x"},}') == {"a": 1e-8, "b": [True, None], "c": {"d": "x"}}
