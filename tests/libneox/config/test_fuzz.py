# SPDX-License-Identifier: Apache-2.0
"""Damaged configurations end in a usage error or load; nothing else ever escapes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from libneox.config import all_keys, load_config, presets
from libneox.config.estimate import dry_run, render
from libneox.config.support import check_supported
from libneox.errors import NeoxError

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 1e400, float("nan"), 10**30, "", "x", "1", "no", "\x00", "é" * 50,
    [], [1], ["a"], [[]], [1, [2]], [[["global"], "all"]], [[["a"], -1]], [[[], 3]],
    {}, {"a": 1}, {"enabled": True}, {"type": None}, {"type": "adam", "params": None}, {"stage": "2"},
    {"type": "yarn", "factor": "2"}, {"type": []}, {"enabled": 1}, {"enabled": True, "schedule_type": []},
    [[[["global"]], "all"]], {"type": "lion", "params": {"betas": [0.9]}}, {"params": 0.1},
]  # fmt: skip
DATA = {"data_path": "data/text"}  # without it, all would be refused for that alone
NOISE = ["", "\n", ":", "{", "- ", "&a ", "*a", "\t", "!!x ", "'", "9"]


def refused(sources: list[Any]) -> bool:
    """Do all that is done with a configuration before a run; whether a NeoxError came of it. Nothing else may."""
    try:
        config = load_config(sources)
        render(dry_run(config, 8))
        load_config([config.to_dict()])
        check_supported(config, 8)
    except NeoxError:
        return True
    return False


@pytest.mark.parametrize("name", ["pythia/160M", "20B", "llama3/8B"])
def test_damaged_text(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    text = presets.text(name)
    path = tmp_path / "c.yml"
    outcomes = []
    for _ in range(150):
        characters = list(text)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(characters))
            characters[at : at + rng.randint(0, 4)] = rng.choice(NOISE)
        path.write_text("".join(characters))
        outcomes.append(refused([path, DATA]))
    assert set(outcomes) == {True, False}, "both happen: some damage is in a comment, some in a key"


def test_any_value_of_any_key() -> None:
    rng = random.Random(0)
    base = load_config(["pythia/14M"]).to_dict() | DATA
    outcomes = {name: [refused([base | {name: value}]) for value in rng.sample(VALUES, 6)] for name in all_keys()}
    assert set(outcomes) == set(all_keys())
    assert sum(map(any, outcomes.values())) > len(outcomes) / 2, "most keys have values that are wrong for them"
