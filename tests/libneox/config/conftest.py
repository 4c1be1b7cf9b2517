# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the configuration tests: writing a file and reading the error it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from libneox.config import NeoxConfig, load_config
from libneox.errors import UsageError

SHAPE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nmax_position_embeddings: 64\n"


@pytest.fixture
def load_text(tmp_path: Path) -> Callable[..., NeoxConfig]:
    """Load YAML given as text; keyword `shape` puts the required keys in front."""

    def load(text: str, *overrides: str, shape: bool = False) -> NeoxConfig:
        path = tmp_path / "c.yml"
        path.write_text((SHAPE if shape else "") + text)
        return load_config([path], overrides=overrides)

    return load


@pytest.fixture
def error_of(load_text: Callable[..., NeoxConfig]) -> Callable[..., str]:
    """The message a configuration is refused with."""

    def error(text: str, *overrides: str, shape: bool = False) -> str:
        with pytest.raises(UsageError) as caught:
            load_text(text, *overrides, shape=shape)
        return str(caught.value)

    return error
