# SPDX-License-Identifier: Apache-2.0
"""`--help`, `--version` and usage errors load no heavy library (the time they take: tests/bench/startup.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version

import pytest

COMMANDS = ("neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen")
HEAVY = {
    *("torch", "transformers", "deepspeed", "numpy", "pyarrow", "tokenizers", "lm_eval", "datasets"),
    *("safetensors", "zstandard", "gigatoken"),
}


def start(command: str, arguments: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command under `-X importtime`; return it with its stderr cleaned, and the modules it imported."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command.replace("-", "_"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    lines = run.stderr.splitlines()
    timed = [line for line in lines if line.startswith("import time:")]
    run.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    modules = {line.rpartition("|")[2].strip() for line in timed[1:]}
    assert "libneox.cli" in modules, f"importtime told nothing: {run.stderr}"
    return run, modules


def verbs(command: str) -> list[str]:
    """The command's verbs, as its help lists them."""
    help_text = start(command, ["--help"])[0].stdout
    return sorted(set(re.findall(rf"^\s*{command} ([a-z-]+):", help_text, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command_and_verbs(command: str) -> None:
    for arguments in ([], *([verb] for verb in verbs(command))):
        run, modules = start(command, [*arguments, "--help"])
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
        assert run.stdout.startswith(f"Usage: {' '.join([command, *arguments])}"), run.stdout
        assert "exit codes:" in run.stdout
        assert not modules & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_version(command: str) -> None:
    run, modules = start(command, ["--version"])
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{command} {version(command)}\n", "")
    assert not modules & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_error_is_one_line(command: str) -> None:
    run, modules = start(command, ["--no-such-flag"])
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"{command}: error: ")
    assert "--no-such-flag" in run.stderr
    assert "\n" not in run.stderr
    assert not modules & HEAVY


def test_config_error_of_train_loads_no_torch() -> None:
    """A config is judged before anything heavy is loaded (PyYAML and numpy are light enough to judge it with)."""
    run, modules = start("neox-train", ["pythia/14M", "--set", "no_such_key=1"])
    assert run.returncode == 2, run.stderr
    assert "no_such_key" in run.stderr
    assert not modules & (HEAVY - {"numpy"})


def test_library_alone_is_light() -> None:
    code = "import sys, libneox, libneox.cli, libneox.errors, libneox.files; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not set(out.split()) & HEAVY
