# SPDX-License-Identifier: Apache-2.0
"""The page of keys in neox-train's README is the generated one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from libneox.config.reference import PAGE_END, PAGE_START, markdown, with_page
from libneox.errors import UsageError

README = Path(__file__).resolve().parents[3] / "neox-train" / "README.md"


def test_the_page_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_page(text) == text, "run: python -m libneox.config.reference neox-train/README.md"


def test_a_stale_page_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{PAGE_START}\nold\n{PAGE_END}\nafter\n")
    subprocess.run([sys.executable, "-m", "libneox.config.reference", str(path)], check=True, timeout=60)
    assert path.read_text() == f"before\n{PAGE_START}\n{markdown()}{PAGE_END}\nafter\n"
    with pytest.raises(UsageError, match="add them"):
        with_page("nothing here")
