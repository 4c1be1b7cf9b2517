# SPDX-License-Identifier: Apache-2.0
"""Running real pipes: shell lines with the commands on PATH, as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Shell = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but our commands, run by this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name.replace("-", "_")} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture
def environment(commands: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a pipe: our commands, one thread each, no tokenizer preset."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEOX_")}
    return kept | {"PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}


@pytest.fixture
def shell(environment: dict[str, str], tmp_path: Path) -> Shell:
    """Run a bash line in an empty directory; `${PIPESTATUS[@]}` is there as in any bash."""
    home = tmp_path / "work"
    home.mkdir()

    def run(
        line: str, *, input: bytes = b"", env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["bash", "-c", line],
            input=input,
            capture_output=True,
            cwd=home,
            env={**environment, **(env or {})},
            timeout=timeout,
            check=False,
        )

    run.cwd = home  # type: ignore[attr-defined]
    return run


@pytest.fixture
def work(shell: Shell) -> Path:
    """The directory that `shell` runs in."""
    return shell.cwd  # type: ignore[attr-defined]


@pytest.fixture
def documents(work: Path) -> Path:
    """docs.jsonl: 300 documents."""
    path = work / "docs.jsonl"
    path.write_text("".join(f'{{"text": "document {n}, of {n % 7} words"}}\n' for n in range(300)))
    return path


def is_silent(stderr: bytes) -> bool:
    """No traceback, no complaint of the interpreter."""
    return not any(word in stderr for word in (b"Traceback", b"Exception ignored", b"BrokenPipe", b"Error"))


@pytest.fixture
def silent() -> Callable[[bytes], bool]:
    """Judge a stderr."""
    return is_silent
