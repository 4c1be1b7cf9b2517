# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the golden folder, and running a command as a user would."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

# One thread a process: the tests themselves run side by side, and many start several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts the tests in the background may have them ignore Ctrl-C, and their commands after them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Processes started by tests find the sources that a runner such as Pants put on this one's path.
os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry.endswith("src"))


def pytest_configure(config: pytest.Config) -> None:
    """Only tests of a GPU see one: the others know what a CPU computes, and start more ranks than there may be GPUs."""
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out tests of a GPU where none is to be seen."""
    # by its name, as most tests do without torch
    if item.get_closest_marker("gpu") and not importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is no GPU, or it was not asked for: pytest -m gpu")


RunCommand = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers made by running the original; a clone of this project does not have it."""
    folder = os.environ.get("NEOX_GOLDEN")
    if not folder:
        pytest.skip("NEOX_GOLDEN is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def run_command(tmp_path_factory: pytest.TempPathFactory) -> RunCommand:
    """Run `neox-x ARGS` in a process of its own and return its exit code, stdout and stderr."""
    extensions = tmp_path_factory.mktemp("torch-extensions")

    def run(
        args: Sequence[str | os.PathLike[str]],
        *,
        input: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        module = os.fspath(args[0]).replace("-", "_")
        return subprocess.run(
            [sys.executable, "-m", module, *args[1:]],
            input=input,
            capture_output=True,
            env={**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), **(env or {})},
            cwd=cwd,
            timeout=timeout,
            check=False,
        )

    return run
