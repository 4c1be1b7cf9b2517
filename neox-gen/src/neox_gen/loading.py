# SPDX-License-Identifier: Apache-2.0
"""From a path to a model that is ready to run, its tokenizer, its own settings and its chat template."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.chat import ChatTemplate, named_tokens, read_object, read_settings, read_templates
from libneox.errors import InputMissing, UsageError

if TYPE_CHECKING:
    from libneox.model import Transformer
    from libneox.run_directory import CheckpointRef
    from libneox.tokenizer import Tokenizer
    from neox_gen.options import Working

CONFIG_KEYS = ("temperature", "top_k", "top_p", "maximum_tokens")
Warn = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What generation needs.

    Attributes:
        settings: of CONFIG_KEYS, those that the checkpoint's configuration sets.
        end_ids: tokens that end a text, by the Hugging Face files; the tokenizer knows its own.
        template: the chat template, if the model has one.
        special: what a template may use by name, `bos_token` and the like.
    """

    model: Transformer
    tokenizer: Tokenizer
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    end_ids: Sequence[int] = ()
    template: str | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        if self.template is None:
            raise UsageError("the model has no chat template, so `messages` mean nothing to it; give a `prompt`")
        end = self.tokenizer.eod_id
        named = {} if end is None else {"eos_token": self.tokenizer.decode([end])}
        return ChatTemplate(self.template, named | dict(self.special), self.tokenizer.name)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages with the beginning of an answer behind them.

        Raises:
            UsageError: the model has no chat template.
            DataError: the template refuses the messages.
        """
        text = self._chat.render(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, allow_special=True, add_special_tokens=False)


def load(checkpoint: Path, working: Working, prog: str) -> Loaded:
    """Load a checkpoint of ours or of GPT-NeoX, or a Hugging Face directory.

    Raises:
        InputMissing: no checkpoint or no tokenizer there.
        UsageError: the device is not there.
    """
    from libneox import cli, run_directory
    from libneox.tokenizer import load_tokenizer

    def warn(message: str) -> None:
        cli.warn(prog, message)

    ref = run_directory.resolve_checkpoint(checkpoint, warn=warn)
    try:
        tokens = load_tokenizer(working.tokenizer or ref.path)
    except InputMissing as error:
        if working.tokenizer:
            raise
        raise InputMissing(f"{checkpoint}: no tokenizer there; name one with --tokenizer") from error
    files = read_settings(ref.path)
    return Loaded(
        _load_model(ref, tokens.vocab_size, working, warn),
        tokens,
        _settings(ref),
        _end_ids(ref.path),
        read_templates(ref.path, files).get("default"),
        named_tokens(files),
    )


def _load_model(ref: CheckpointRef, vocab_size: int, working: Working, warn: Warn) -> Transformer:
    import torch

    from libneox.generation.prepack import load_packed

    if working.threads:
        torch.set_num_threads(working.threads)
    device = working.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_packed(ref, device=device, dtype=working.dtype, vocab_size=vocab_size, warn=warn)


def _settings(ref: CheckpointRef) -> dict[str, Any]:
    """What the checkpoint's configuration says of generation."""
    from libneox.config import load_config
    from libneox.legacy import find_step, stored_configs
    from libneox.run_directory import CONFIG

    if ref.kind == "hf":
        return {}
    loaded = load_config(list(stored_configs(find_step(ref.path))) if ref.kind == "legacy" else [ref.path / CONFIG])
    return {key: loaded.get(key) for key in CONFIG_KEYS if loaded.is_set(key)}


def _end_ids(directory: Path) -> list[int]:
    """`eos_token_id` of a Hugging Face directory: one or several."""
    for name in ("generation_config.json", "config.json"):
        ids = read_object(directory / name).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
