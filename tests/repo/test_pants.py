# SPDX-License-Identifier: Apache-2.0
"""The Pants half of the build: the BUILD files cover the tree, and the bootstrap lists, tests and packages it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

NO_PYTHON = 3  # exit code of build-support/pants where there is no Python 3.9
HEAVY = re.compile(r"^\s*(import|from) (torch|transformers|lm_eval|deepspeed)\b", re.MULTILINE)
QUICK = ("tests/libneox:tests", "tests/libneox/data:tests")  # of the torch-free tests, those that take seconds


def test_every_directory_of_tests_has_a_build_file(root: Path) -> None:
    folders = {path.parent for path in (root / "tests").rglob("test_*.py")}
    assert folders
    missing = sorted(str(folder.relative_to(root)) for folder in folders if not (folder / "BUILD").is_file())
    assert not missing, f"no BUILD in {missing}"


def test_what_is_not_tagged_needs_no_torch(root: Path) -> None:
    """`--tag=-torch` is the lane without torch: a directory that is in it whole imports none."""
    for build in (root / "tests").rglob("BUILD"):
        if "torch" in build.read_text() or not list(build.parent.glob("test_*.py")):
            continue
        for path in build.parent.glob("*.py"):
            heavy = HEAVY.search(path.read_text())
            assert heavy is None, f"{path.relative_to(root)}: {heavy}; tag its directory's tests in BUILD"  # type: ignore[union-attr]


def test_the_torch_half_has_one_border(root: Path) -> None:
    """What the BUILD files hold apart is what test_imports.py holds apart."""
    named = [
        re.search(r"^TORCH_HALF = (\(.*\))$", (root / path).read_text(), re.MULTILINE)
        for path in ("build-support/macros.py", "tests/repo/test_imports.py")
    ]
    assert all(named)
    assert len({match[1] for match in named if match}) == 1


def test_settings_name_no_machine(root: Path) -> None:
    """What belongs to a machine (index, certificates, paths) is written by the bootstrap outside the tree."""
    settings = tomllib.loads((root / "pants.toml").read_text())
    assert settings["GLOBAL"]["pants_version"] in (root / "build-support/pants").read_text()
    assert not {"python-repos", "pex-cli"} & set(settings)
    assert not list(root.glob("*.lock"))
    assert not re.search(r"https?://|file://|/home/|/root/", (root / "pants.toml").read_text())


@pytest.fixture(scope="module")
def pants(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bootstrap in a copy of the tree, so that no run writes into this one; skips where it cannot work."""
    copy = tmp_path_factory.mktemp("tree")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, capture_output=True, check=True, timeout=60).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((root / name).read_bytes())
            (copy / name).chmod((root / name).stat().st_mode)
    command = [str(copy / "build-support/pants"), "--no-pantsd"]
    run = call(command, "--version")
    if run.returncode == NO_PYTHON:
        pytest.skip("no Python 3.9 here, which Pants 2.17 runs on")
    if run.returncode and re.search(r"No matching distribution|Connection|Temporary failure", run.stderr):
        pytest.skip(f"the package index is out of reach: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    return command


def call(command: list[str], *arguments: str, timeout: float = 290) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    cwd = Path(command[0]).parents[1]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_list_knows_every_source_and_test(pants: list[str]) -> None:
    run = call(pants, "list", "::")
    assert run.returncode == 0, run.stderr
    listed = {line.partition(":")[0] for line in run.stdout.splitlines()}
    tree = Path(pants[0]).parents[1]
    for folder in (tree / "tests", *tree.glob("*/src")):
        for path in folder.rglob("test_*.py" if folder.name == "tests" else "*.py"):
            assert str(path.relative_to(tree)) in listed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("libneox/src/libneox/schedule.py", "libneox.model.transformer"),
        ("libneox/src/libneox/schedule.py", "torch"),
        ("neox-shard/src/neox_shard/cli.py", "libneox.checkpoint.store"),
        ("neox-gen/src/neox_gen/cli.py", "neox_eval.cli"),
    ],
)
def test_dependencies_across_the_lines_are_refused(pants: list[str], importer: str, imported: str) -> None:
    path = Path(pants[0]).parents[1] / importer
    source = path.read_text()
    path.write_text(f"{source}\nimport {imported}\n")
    try:
        run = call(pants, "dependencies", importer)
    finally:
        path.write_text(source)
    assert run.returncode != 0
    assert re.search(rf"1 dependency violation.*: DENY.*{importer}.* -> ", run.stderr, re.DOTALL), run.stderr


@pytest.mark.slow
def test_package_makes_seven_wheels(pants: list[str]) -> None:
    run = call(pants, "package", "::")
    assert run.returncode == 0, run.stderr[-3000:]
    wheels = {path.name.partition("-")[0] for path in (Path(pants[0]).parents[1] / "dist").glob("*.whl")}
    commands = ("convert", "eval", "gen", "shard", "tokenize", "train")
    assert wheels == {"libneox", *(f"neox_{name}" for name in commands)}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_quick_torch_free_tests_pass(pants: list[str]) -> None:
    run = call(pants, "--tag=-torch", "test", *QUICK, timeout=900)  # the first time, it fetches all requirements
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "tests/libneox/data/test_order.py:tests succeeded" in run.stderr
