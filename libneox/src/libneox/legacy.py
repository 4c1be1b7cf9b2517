# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of GPT-NeoX on disk: what tells it, where its files, configuration and tokenizer are. No torch.

SAVE/latest                         a text file: global_step143000
SAVE/global_step143000/             mp_rank_00_model_states.pt ... or layer_00-model_00-model_states.pt ...
SAVE/global_step143000/configs/     the YAML files of the run; the slim release of the 20B has SAVE/configs/
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from libneox.errors import InputMissing, NeoxError

if TYPE_CHECKING:
    from libneox.config import NeoxConfig

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
PARENTS = 4  # directories above a configuration in which its tokenizer is looked for


def is_legacy(source: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a checkpoint of GPT-NeoX, by the names of its files."""
    folder = Path(source)
    # DeepSpeed leaves global_stepN in Hugging Face directories as well: what names itself otherwise comes first.
    if any((folder / name).exists() for name in ("manifest.json", "config.json")) or any(folder.glob("step_*")):
        return False
    return _is_step(folder) or any(folder.glob("global_step*"))


def find_step(path: Path) -> Path:
    """The directory with the files: `path` itself, or the one its `latest` names.

    Raises:
        InputMissing: no checkpoint there.
    """
    if not path.is_dir():
        raise InputMissing(f"{path}: no such directory")
    if _is_step(path):
        return path
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text(errors="replace").strip()
        if "/" not in tag and tag not in ("", "..") and _is_step(path / tag):
            return path / tag
        raise InputMissing(f"{latest}: names {tag!r}, which holds no checkpoint")
    steps = [step.name for step in sorted(path.glob("global_step*")) if _is_step(step)]
    hint = f"; it has {', '.join(steps)}: name one" if steps else ""
    raise InputMissing(f"{path}: no GPT-NeoX checkpoint (no mp_rank_*, no layer_* files, no 'latest'){hint}")


def _is_step(path: Path) -> bool:
    return any(RANK_FILE.fullmatch(name) or LAYER_FILE.fullmatch(name) for name in _names(path))


def _names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir()) if path.is_dir() else []


def stored_configs(step: Path) -> list[Path]:
    """The YAML files GPT-NeoX put into a checkpoint (or beside it, as in the slim release of the 20B)."""
    for folder in (step / "configs", step.parent / "configs"):
        if found := sorted([*folder.glob("*.yml"), *folder.glob("*.yaml")]):
            return list(found)
    raise InputMissing(f"{step}: no configs/*.yml in it; give the training configuration with --config FILE")


def stored_tokenizer(source: str | os.PathLike[str]) -> Path | None:
    """The tokenizer file that the configuration in a checkpoint names, if it is still there."""
    from libneox.config import load_config

    try:
        configs = stored_configs(find_step(Path(source)))
        return named_tokenizer(load_config(list(configs)), [file.parent for file in configs])
    except NeoxError:  # whoever opens the checkpoint itself says what is wrong with it
        return None


def named_tokenizer(config: NeoxConfig, folders: Iterable[Path]) -> Path | None:
    """The tokenizer file that a configuration names, looked for from where it lies upwards."""
    named = config.tokenizer_source
    if named is None:
        return None
    for folder in folders:
        for base in (folder, *folder.resolve().parents[:PARENTS]):
            if (base / named).is_file():
                return base / named
    return None
