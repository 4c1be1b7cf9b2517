# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the sources: the line between the halves of the library, and between commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Import = Any  # tests/repo/conftest.py: importer, imported, at_top, where, library
COMMANDS = ("neox_tokenize", "neox_shard", "neox_train", "neox_eval", "neox_convert", "neox_gen")
TORCH_HALF = ("model", "parallel", "checkpoint", "objectives", "generation")
DATA_TOOLS = ("neox_tokenize", "neox_shard")
TORCH_LIBRARIES = {"torch", "safetensors", "deepspeed", "transformers", "accelerate", "lm_eval", "datasets"}
LAZY = {*TORCH_LIBRARIES, "numpy", "pyarrow", "tokenizers", "gigatoken", "zstandard", "ujson", "yaml", "matplotlib"}


def in_torch_half(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "libneox" and len(parts) > 1 and parts[1] in TORCH_HALF


def listed(arrows: list[Import]) -> str:
    return "\n".join(f"{i.where}: {i.importer} imports {i.imported}" for i in arrows)


def test_torch_free_half_never_reaches_torch(imports: list[Import]) -> None:
    half = [i for i in imports if i.importer.startswith("libneox") and not in_torch_half(i.importer)]
    # libneox/__init__.py names load_model and generate lazily, as strings; anything it imports counts.
    bad = [i for i in half if i.library in TORCH_LIBRARIES or in_torch_half(i.imported)]
    assert not bad, listed(bad)


def test_commands_never_import_each_other(imports: list[Import]) -> None:
    bad = [i for i in imports if i.library in COMMANDS and i.library != i.importer.partition(".")[0]]
    assert not bad, listed(bad)


def test_data_tools_never_reach_torch(imports: list[Import]) -> None:
    tools = [i for i in imports if i.importer.startswith(DATA_TOOLS)]
    lazily = ("libneox.load_model", "libneox.generate")
    bad = [i for i in tools if i.library in TORCH_LIBRARIES or in_torch_half(i.imported) or i.imported in lazily]
    assert not bad, listed(bad)


def test_model_knows_no_ranks_files_or_data(imports: list[Import]) -> None:
    allowed = ("libneox.model", "libneox.errors")
    bad = [
        i
        for i in imports
        if f"{i.importer}.".startswith("libneox.model.")
        and (
            (i.library == "libneox" and not i.imported.startswith((*allowed, "libneox.model_config")))
            or i.library in {"deepspeed", "transformers", "safetensors"}
            or i.imported.startswith("torch.distributed")
        )
    ]
    assert not bad, listed(bad)


def test_two_engines_import_deepspeed_and_nothing_else(imports: list[Import]) -> None:
    """Another engine can stand beside them."""
    engines = {"neox_train.engine", "neox_train.pipeline"}
    importers = {i.importer for i in imports if i.library == "deepspeed"}
    assert importers <= engines, f"deepspeed is imported by {sorted(importers - engines)}"
    users = {i.importer for i in imports if ".".join(i.imported.split(".")[:2]) in engines}
    assert users <= engines | {"neox_train.engines"}, f"an engine is imported by {sorted(users)}"


def test_transformers_only_where_it_is_the_subject(imports: list[Import]) -> None:
    """The product reads config.json and safetensors itself; transformers checks it and is measured, no more."""
    importers = {i.importer for i in imports if i.library == "transformers"}
    importers = {name for name in importers if name.partition(".")[0] != "neox_convert"}
    assert importers <= {"neox_train.benchmark"}, f"transformers is imported by {sorted(importers)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_starting_a_command_loads_nothing_heavy(imports: list[Import], command: str) -> None:
    """Follow the imports that run at start from the command's first module; what is heavy must be inside functions."""
    at_top: dict[str, list[Import]] = {}
    for found in imports:
        if found.at_top:
            at_top.setdefault(found.importer, []).append(found)
    modules = {i.importer for i in imports}
    pending, seen = [f"{command}.__main__", command], set()
    bad: list[Import] = []
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        for found in at_top.get(module, []):
            if found.library in LAZY:
                bad.append(found)
            parts = found.imported.split(".")
            pending += [m for n in range(1, len(parts) + 1) if (m := ".".join(parts[:n])) in modules]
    assert not bad, listed(bad)


def test_nothing_reads_pickles(imports: list[Import]) -> None:
    """One restricted unpickler, in the importer of legacy checkpoints, is all there is."""
    unpicklers = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    importers = {i.importer for i in imports if i.library in unpicklers}
    assert all(module.startswith("libneox.checkpoint.neox") for module in importers), sorted(importers)


def test_the_walk_sees_every_kind_of_import(tmp_path: Path, read_file: Callable[[Path, str], Iterable[Import]]) -> None:
    """The tests above are worth what this walk finds."""
    source = tmp_path / "m.py"
    source.write_text(
        "import a.b, c\n"
        "from d import e\n"
        "from . import f\n"
        "from .g import h\n"
        "if TYPE_CHECKING:\n    import never\n"
        "try:\n    import i\nexcept ImportError:\n    pass\n"
        "def late():\n    import j\n    importlib.import_module('k.l')\n"
        "class C:\n    import n\n"
    )
    found = {(i.imported, i.at_top) for i in read_file(source, "pkg.m")}
    top = {"a.b", "c", "d.e", "pkg.f", "pkg.g.h", "i", "n"}
    assert found == {(name, True) for name in top} | {("j", False), ("k.l", False)}
