# SPDX-License-Identifier: Apache-2.0
"""From a path to a model that is ready to run, its tokenizer, its own settings and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from libneox.errors import DataError, InputMissing, UsageError

if TYPE_CHECKING:
    from libneox.model import Transformer
    from libneox.tokenizer import Tokenizer

CONFIG_KEYS = ("temperature", "top_k", "top_p", "maximum_tokens")


class Loaded(NamedTuple):
    """What generation needs."""

    model: Transformer
    tokenizer: Tokenizer
    settings: dict[str, Any]  # of CONFIG_KEYS, those that the checkpoint's config.yml sets
    chat_template: str | None
    end_ids: list[int]  # tokens that end a text, by the Hugging Face files; the tokenizer knows its own


def load(
    checkpoint: Path, *, device: str | None, dtype: str, tokenizer: str | None, threads: int | None, prog: str
) -> Loaded:
    """Load a checkpoint or a Hugging Face directory.

    Raises:
        InputMissing: no checkpoint or no tokenizer there.
        UsageError: the device is not there.
    """
    from libneox import run_directory
    from libneox.cli import warn
    from libneox.tokenizer import load_tokenizer

    ref = run_directory.resolve_checkpoint(checkpoint, warn=lambda message: warn(prog, message))
    try:
        tokens = load_tokenizer(tokenizer or ref.path)
    except InputMissing as error:
        if tokenizer:
            raise
        raise InputMissing(f"{checkpoint}: no tokenizer there; name one with --tokenizer") from error
    settings = _settings(ref.path / run_directory.CONFIG) if ref.kind == "neox" else {}
    model = _load_model(ref.path, device=device, dtype=dtype, threads=threads)
    return Loaded(model, tokens, settings, _chat_template(ref.path), _end_ids(ref.path))


def _load_model(path: Path, *, device: str | None, dtype: str, threads: int | None) -> Transformer:
    import torch

    import libneox
    from libneox.generation.prepack import has_bfloat16

    if threads:
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU here; use --device cpu")
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    try:
        model = libneox.load_model(path, dtype=wanted, device=device)
    except RuntimeError as error:
        if "device" in str(error).lower():
            raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
        raise
    slow = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and not has_bfloat16())
    return model.float() if device == "cpu" and dtype == "auto" and slow else model


def _settings(config: Path) -> dict[str, Any]:
    from libneox.config import load_config

    loaded = load_config([config])
    return {key: loaded.get(key) for key in CONFIG_KEYS if loaded.is_set(key)}


def _chat_template(directory: Path) -> str | None:
    """The template of a Hugging Face directory, from its own file or from tokenizer_config.json."""
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    template = _json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _end_ids(directory: Path) -> list[int]:
    """`eos_token_id` of a Hugging Face directory: one or several."""
    for name in ("generation_config.json", "config.json"):
        ids = _json(directory / name).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty if there is none."""
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    return record
