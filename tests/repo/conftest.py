# SPDX-License-Identifier: Apache-2.0
"""What the sources import, read once and shared by the tests of the repository itself."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = ("libneox", "neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen")


class Import(NamedTuple):
    """One import: in which module, of what, and whether importing the module runs it."""

    importer: str
    imported: str
    at_top: bool
    where: str  # file:line

    @property
    def library(self) -> str:
        return self.imported.partition(".")[0]


def read_imports(path: Path, module: str) -> Iterator[Import]:
    """Every import of a source file. `from a import b` counts as `a.b`, so that submodules are seen."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_top = pending.pop()
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, at_top, where)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", at_top, where)
        elif isinstance(node, ast.Call) and (name := _import_call(node)):
            yield Import(module, name, at_top, where)
        body_runs = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            pending += [(child, at_top) for child in node.orelse]
            continue
        pending += [(child, body_runs) for child in ast.iter_child_nodes(node)]


def _import_call(node: ast.Call) -> str | None:
    """The constant name in `importlib.import_module("name")` or `__import__("name")`."""
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return None


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def read_project(project: str) -> list[Import]:
    """The imports of all sources under PROJECT/src."""
    source = ROOT / project / "src"
    found: list[Import] = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found += read_imports(path, module)
    assert found, f"{source} holds no sources"
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the tree."""
    return ROOT


@pytest.fixture(scope="session")
def projects() -> tuple[str, ...]:
    """The package directories, the library first."""
    return PROJECTS


@pytest.fixture(scope="session")
def imports_of() -> Callable[[str], list[Import]]:
    """The imports of one package directory's sources."""
    return read_project


@pytest.fixture(scope="session")
def read_file() -> Callable[[Path, str], Iterator[Import]]:
    """The imports of one source file, given its module name."""
    return read_imports


@pytest.fixture(scope="session")
def imports() -> list[Import]:
    """The imports of all packages."""
    return [found for project in PROJECTS for found in read_project(project)]
