# SPDX-License-Identifier: Apache-2.0
"""The packages' metadata agree with each other and with the code."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest

PROJECTS = ("libneox", "neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen")
# Imported only where the user has it; the code says how to install it when it is missing.
OPTIONAL = {"flash_attn", "wandb", "comet_ml", "tensorboard", "triton", "tiktoken_ext"}


@pytest.fixture(scope="module")
def metadata(root: Path) -> dict[str, dict[str, Any]]:
    return {project: tomllib.loads((root / project / "pyproject.toml").read_text()) for project in PROJECTS}


def requirements(project: dict[str, Any], extras: set[str] | None = None) -> dict[str, set[str]]:
    """Required distribution -> the extras it is asked with; `extras` None means all of the project's own."""
    lines = list(project["project"].get("dependencies", []))
    for extra, more in project["project"].get("optional-dependencies", {}).items():
        if extras is None or extra in extras:
            lines += more
    found: dict[str, set[str]] = {}
    for line in lines:
        name, inner = re.match(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", line).groups()  # type: ignore[union-attr]
        found.setdefault(canonical(name), set()).update(filter(None, re.split(r"[,\s]+", inner or "")))
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_projects_are_the_directories(root: Path, metadata: dict[str, dict[str, Any]]) -> None:
    assert {path.parent.name for path in root.glob("*/pyproject.toml")} == set(PROJECTS)
    for project, data in metadata.items():
        assert data["project"]["name"] == project


def test_versions_move_together(metadata: dict[str, dict[str, Any]]) -> None:
    versions = {project: data["project"]["version"] for project, data in metadata.items()}
    assert len(set(versions.values())) == 1, versions
    version = versions["libneox"]
    for project, data in metadata.items():
        own = [line for line in data["project"].get("dependencies", []) if canonical(line).startswith("libneox")]
        if project != "libneox":
            assert [line.rpartition("==")[2] for line in own] == [version], f"{project} depends on {own}"


def test_only_torch_commands_ask_for_torch(metadata: dict[str, dict[str, Any]]) -> None:
    for project, data in metadata.items():
        base = requirements(data, extras=set())
        wants_torch = "torch" in base or "torch" in base.get("libneox", set())
        assert wants_torch == (project not in ("libneox", "neox-tokenize", "neox-shard")), project
        assert data["project"]["requires-python"] == ">=3.11"
        assert data["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("project", PROJECTS)
def test_imports_are_declared(
    project: str, metadata: dict[str, dict[str, Any]], imports_of: Callable[[str], list[Any]]
) -> None:
    declared = requirements(metadata[project])
    # `libneox[torch]` brings what the library declares: its own dependencies and those of the named extras.
    declared |= requirements(metadata["libneox"], extras=declared.get("libneox", set()))
    owners = packages_distributions()
    own = {name.replace("-", "_") for name in PROJECTS}
    missing = {}
    for found in imports_of(project):
        if found.library in sys.stdlib_module_names or found.library in own or found.library in OPTIONAL:
            continue
        distributions = {canonical(name) for name in owners.get(found.library, [found.library])}
        if not distributions & set(declared):
            missing[found.library] = found.where
    assert not missing, f"{project} imports what its pyproject.toml does not declare: {missing}"


@pytest.mark.parametrize("project", PROJECTS[1:])
def test_commands_can_be_entered(project: str, metadata: dict[str, dict[str, Any]]) -> None:
    scripts = metadata[project]["project"]["scripts"]
    assert set(scripts) == {project}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_harness_finds_the_model_as_a_plugin() -> None:
    (point,) = entry_points(group="lm_eval.models", name="neox")
    assert point.load().__name__ == "NeoxLM"


@pytest.mark.parametrize("project", PROJECTS)
def test_every_source_file_is_licensed_and_described(project: str, root: Path) -> None:
    for path in [root / project / "BUILD", *sorted((root / project / "src").rglob("*.py"))]:
        lines = path.read_text().splitlines()
        assert lines[:1] == ["# SPDX-License-Identifier: Apache-2.0"], path
        if path.suffix == ".py":
            assert lines[1].startswith(('"""', 'r"""')), f"{path} does not begin with a docstring"


@pytest.mark.parametrize("project", PROJECTS)
def test_readme_tells_how_to_use_it(project: str, root: Path) -> None:
    text = (root / project / "README.md").read_text()
    assert "```sh" in text or project == "libneox", "no worked command line"
    if project != "libneox":
        assert re.search(r"exit codes?", text, re.IGNORECASE), "the exit codes are not told"
    assert f'neox_package("{project}"' in (root / project / "BUILD").read_text()
