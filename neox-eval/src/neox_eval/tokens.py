# SPDX-License-Identifier: Apache-2.0
"""Text to ids as the harness means it: special tokens recognised, the template's own tokens added, chats rendered.

The tokenizer itself is `libneox.tokenizer`. What a Hugging Face directory says beside its tokenizer.json (which token
begins and ends a text, the chat template) is read here as plain JSON and text; no code of the directory is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from libneox.chat import ChatTemplate, named_tokens, read_settings, read_templates
from libneox.errors import DataError, UsageError
from libneox.tokenizer import Tokenizer, load_tokenizer


class HarnessTokens:
    """A tokenizer with the names the harness looks for (`eos_token`, ...).

    Attributes:
        bos_token_id, eos_token_id: what begins and ends a text; the end-of-document token where nothing else is said.
        templates: chat templates by name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
    ):
        settings = named_tokens(settings or {})
        self.base = tokenizer
        self.templates = dict(templates or {})
        self.eos_token, self.eos_token_id = self._special(settings, "eos_token", tokenizer.eod_id)
        self.bos_token, self.bos_token_id = self._special(settings, "bos_token", None)
        self.pad_token, self.pad_token_id = self._special(settings, "pad_token", tokenizer.pad_id)
        if self.eos_token_id is None:
            raise DataError(f"{tokenizer.name}: no end-of-text token, which evaluation needs; name its eos_token")

    @classmethod
    def load(cls, source: str | Path, *, beside: Path | None = None) -> HarnessTokens:
        """Read the tokenizer at `source` and the settings beside it.

        Args:
            source: anything `libneox.tokenizer.load_tokenizer` takes.
            beside: the directory of the settings; `source` itself if None.
        """
        folder = beside or Path(source)
        settings = read_settings(folder)
        return cls(load_tokenizer(source), settings, read_templates(folder, settings))

    def _special(self, settings: Mapping[str, str], name: str, default: int | None) -> tuple[str | None, int | None]:
        token = settings.get(name)
        if token is None:
            return (None, None) if default is None else (self.base.decode([default]), default)
        return token, self.base.token_id(token)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: add what the tokenizer's template adds (a BOS); None: unless the text begins with it.
        """
        if add_special_tokens is None:
            first = self.bos_token if self.bos_token_id is not None else self.eos_token
            add_special_tokens = not (first and text.startswith(first))
        return self.base.encode(text, allow_special=True, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out; ids the tokenizer does not have (padding of the vocabulary) too."""
        return self.base.decode([i for i in ids if i < self.base.vocab_size], skip_special_tokens=True)

    def template(self, name: str | None = None) -> str | None:
        """The chat template of that name, or the default one; None if there is none at all."""
        if not self.templates:
            return None
        chosen = self.templates.get(name or "default")
        if chosen is None:
            raise UsageError(
                f"{self.base.name}: no chat template {name or 'default'!r}; it has {', '.join(self.templates)}"
            )
        return chosen

    def render(self, chat: list[dict[str, str]], *, name: str | None = None, reply: bool = True) -> str:
        """A conversation as the model was taught to read it.

        Args:
            chat: messages with `role` and `content`.
            reply: end with what opens the assistant's turn; off, the last message is left open to be continued.
        Raises:
            UsageError: the model has no chat template.
            DataError: its template refuses the conversation.
        """
        source = self.template(name)
        if source is None:
            raise UsageError(f"{self.base.name}: no chat template; evaluate without --apply-chat-template")
        mark = "<|here the text goes on|> "  # the space shows whether the template trims
        if not reply and chat:
            chat = [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + mark}]
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        named = {name: token or "" for name, token in names.items()}
        text = ChatTemplate(source, named, self.base.name).render(chat, add_generation_prompt=reply)
        if reply or not chat:
            return text
        at = text.rfind(mark.rstrip())
        if at < 0:
            raise DataError(f"{self.base.name}: its chat template drops the end of a message that is to be continued")
        # Without what closes the last message.
        return text[:at] if text[at:].startswith(mark) else text[:at].rstrip()
