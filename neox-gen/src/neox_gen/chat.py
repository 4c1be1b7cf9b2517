# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages to the text a model was tuned on. Templates come with models and are run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from libneox.errors import DataError, UsageError

if TYPE_CHECKING:
    from libneox.tokenizer import Tokenizer


class Chat:
    """Renders messages with a Jinja template, as transformers' `apply_chat_template` does."""

    def __init__(self, template: str | None, tokenizer: Tokenizer):
        if template is None:
            raise UsageError("the model has no chat template, so `messages` mean nothing to it; give a `prompt`")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        environment.globals["raise_exception"] = _refuse
        self._errors = TemplateError
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise DataError(f"the chat template is no valid Jinja: {error}") from error
        self._tokenizer = tokenizer
        eod = tokenizer.eod_id
        end = tokenizer.decode([eod]) if eod is not None else ""
        self._names = {"bos_token": _first(tokenizer, end), "eos_token": end}

    def ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of the messages with the beginning of an answer behind them."""
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._names)
        except self._errors as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return self._tokenizer.encode(text, allow_special=True, add_special_tokens=False)


def _first(tokenizer: Tokenizer, otherwise: str) -> str:
    """The token that the tokenizer itself puts in front of a text, or the one that ends documents."""
    front = tokenizer.encode("", add_special_tokens=True)
    return tokenizer.decode(front[:1]) if front else otherwise


def _refuse(message: str) -> None:
    raise DataError(f"the chat template refuses these messages: {message}")
