# SPDX-License-Identifier: Apache-2.0
"""Each package builds to a wheel that works where nothing but libneox's wheel of the same build is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMANDS = ("neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen")
DATA_TOOLS = COMMANDS[:2]


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All seven wheels, built from a copy of what git tracks or would track, with the installed setuptools."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "libneox", *COMMANDS]
    tracked = subprocess.run(listing, cwd=root, capture_output=True, check=True, timeout=60).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, tracked)):
        source, target = root / name, copy / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    built = {}
    for project in ("libneox", *COMMANDS):
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy / project)]
        subprocess.run(build, check=True, capture_output=True, timeout=120)
        (built[project],) = out.glob(f"{project.replace('-', '_')}-*.whl")
    return built


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip alone."""
    path = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True, timeout=120)
    return path / "bin"


def pip(environment: Path, *arguments: str) -> None:
    command = [str(environment / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=clean, check=False)
    if run.returncode and re.search(r"No matching distribution|Connection|Temporary failure", run.stderr):
        pytest.skip(f"the package index is out of reach: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr


def test_wheels_hold_their_sources_and_nothing_else(root: Path, wheels: dict[str, Path]) -> None:
    for project, wheel in wheels.items():
        module = project.replace("-", "_")
        names = set(zipfile.ZipFile(wheel).namelist())
        source = root / project / "src"
        expected = {
            str(path.relative_to(source))
            for path in (source / module).rglob("*")
            if path.suffix in {".py", ".yml"} or path.name == "py.typed"
        }
        assert {name for name in names if ".dist-info/" not in name} == expected


def test_everything_installs_beside_libneox_alone(wheels: dict[str, Path], empty_environment: Path) -> None:
    """The data tools with their dependencies; the others without torch and the harness, and still they answer."""
    data_tools = [str(wheels[project]) for project in ("libneox", *DATA_TOOLS)]
    pip(empty_environment, "install", *data_tools)
    for command in DATA_TOOLS:
        answer(empty_environment, command, wheels[command])
    listing = [str(empty_environment / "python"), "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=60, env={"LANG": "C.UTF-8"})
    installed = listed.stdout.lower()
    assert not re.search(r"^(torch|transformers|deepspeed|safetensors)==", installed, re.MULTILINE), installed

    pip(empty_environment, "install", "--no-deps", *(str(wheels[command]) for command in COMMANDS[2:]))
    for command in COMMANDS[2:]:
        answer(empty_environment, command, wheels[command])


def answer(environment: Path, command: str, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    clean = {"PATH": f"{environment}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    for argument, start in (("--version", f"{command} {version}\n"), ("--help", f"Usage: {command}")):
        run = subprocess.run(
            [str(environment / command), argument],
            capture_output=True,
            text=True,
            timeout=60,
            env=clean,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(start)


def test_pipe_works_from_wheels(wheels: dict[str, Path], empty_environment: Path, tmp_path: Path) -> None:
    """The first line of the README, in an environment that has never seen torch."""
    pip(empty_environment, "install", *(str(wheels[project]) for project in ("libneox", *DATA_TOOLS)))
    (tmp_path / "x.jsonl").write_text('{"text": "one document"}\n{"text": "another"}\n')
    subprocess.run(
        ["bash", "-o", "pipefail", "-c", "cat x.jsonl | neox-tokenize | neox-shard"],
        cwd=tmp_path,
        env={"PATH": f"{empty_environment}:/usr/bin:/bin", "LANG": "C.UTF-8"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert {path.name for path in tmp_path.glob("dataset.*")} >= {"dataset.bin", "dataset.idx", "dataset.json"}


def test_wheels_require_the_library_they_were_built_with(wheels: dict[str, Path], root: Path) -> None:
    version = tomllib.loads((root / "libneox/pyproject.toml").read_text())["project"]["version"]
    for command in COMMANDS:
        with zipfile.ZipFile(wheels[command]) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = archive.read(name).decode()
        assert re.search(rf"^Requires-Dist: libneox(\[torch\])?=={re.escape(version)}$", metadata, re.MULTILINE)
