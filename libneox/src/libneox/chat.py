# SPDX-License-Identifier: Apache-2.0
"""Chat templates: conversations to the text a model was taught to read. Templates come with models: sandboxed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libneox.errors import DataError

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A Jinja template with the filters, functions and tags that transformers' `apply_chat_template` gives it.

    Args:
        source: the template.
        names: what it may use by name: `bos_token`, `eos_token`, ...
        origin: where it came from, for messages.
    Raises:
        DataError: it is not valid Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str], origin: str):
        from jinja2.exceptions import TemplateError

        self._names, self._origin = dict(names), origin
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise DataError(f"{origin}: not a valid chat template ({error})") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with what opens the assistant's turn.
        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._names
            )
        except Exception as error:  # a template is a program: it can divide by zero
            raise DataError(f"{self._origin}: the chat template fails on this conversation: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a Hugging Face directory as plain JSON, or nothing. No code is run."""
    return read_object(folder / SETTINGS)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file.

    Raises:
        DataError: it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: not a JSON object")
    return value


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of the settings, as strings."""
    found = {name: settings.get(name) for name in NAMED_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in texts.items() if isinstance(token, str)}


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a Hugging Face directory by name; the only or main one is "default".

    Raises:
        DataError: they are not written as they should be.
    """
    if (folder / TEMPLATE).is_file():
        more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        return {"default": read_template(folder / TEMPLATE)} | {path.stem: read_template(path) for path in more}
    template = settings.get("chat_template") or []
    entries = template if isinstance(template, list) else [{"name": "default", "template": template}]
    try:
        found = {entry["name"]: entry["template"] for entry in entries}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / SETTINGS}: its chat_template is no list of names and templates") from error
    if not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"{folder / SETTINGS}: a chat template in it is no text")
    return found


def read_template(path: Path) -> str:
    """The text of a template file.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error


def _environment() -> Any:
    import datetime

    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Generation(Extension):
        """`{% generation %}` marks what is trained on; for the text it means nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 asks for it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
