# SPDX-License-Identifier: Apache-2.0
"""Talking with a model: a prompt a line, answers as they come, and history."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from libneox.cli import warn
from libneox.errors import DataError
from libneox.files import open_input
from neox_gen.loading import Loaded, load
from neox_gen.options import PROG, Options, Working
from neox_gen.prompts import text_lines
from neox_gen.run import make_engine

HELP = "Ctrl-D ends, Ctrl-C stops an answer, /reset forgets what was said"


class Talk:
    """What was said so far, as the next prompt: messages of a chat model, or the text itself of any other."""

    def __init__(self, loaded: Loaded):
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._loaded = loaded

    def ask(self, line: str) -> str | list[int]:
        """Add the user's line; return the prompt."""
        if self._loaded.template is not None:
            self._messages.append({"role": "user", "content": line})
            return self._loaded.chat_ids(self._messages)
        self._text += line
        return self._text

    def answered(self, text: str) -> None:
        """Add the model's answer."""
        if self._loaded.template is not None:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._text += text + "\n"

    def reset(self) -> None:
        """Forget everything."""
        self._messages, self._text = [], ""


def talk(checkpoint: Path, stdout: BinaryIO, *, options: Options, working: Working) -> None:
    """Read lines until the end of input and answer each on stdout."""
    person = sys.stdin is not None and sys.stdin.isatty()
    lines = _typed_lines() if person else _piped_lines(open_input("-"))
    loaded = load(checkpoint, working, PROG)
    from libneox.generation.conversation import Conversation

    engine = make_engine(options, loaded)
    conversation, said = Conversation(engine), Talk(loaded)
    if person and not options.quiet:
        warn(PROG, HELP)
    for turn, line in enumerate(lines):
        if line.strip() == "/reset":
            said.reset()
        elif line:
            _answer(conversation, said, line, turn, stdout)


def _answer(conversation: Any, said: Talk, line: str, turn: int, stdout: BinaryIO) -> None:
    given: list[str] = []

    def show(text: str) -> None:
        given.append(text)
        stdout.write(text.encode("utf-8", "replace"))
        stdout.flush()

    try:
        prompt = said.ask(line)
        try:
            conversation.complete(prompt, show, turn=turn)
        except DataError as error:  # the history has grown too long: go on with this line alone
            if prompt == line:
                raise
            warn(PROG, f"{error}; starting anew with your last line")
            said.reset()
            conversation.complete(said.ask(line), show, turn=turn)
    except KeyboardInterrupt:
        warn(PROG, "stopped")
    said.answered("".join(given))
    stdout.write(b"\n")
    stdout.flush()


def _piped_lines(stream: BinaryIO) -> Iterator[str]:
    return (line.rstrip("\r\n") for _, line in text_lines(stream, "stdin"))


def _typed_lines() -> Iterator[str]:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> ")  # descriptor 1 is stderr here: the prompt is no part of the answers
        except UnicodeDecodeError:
            warn(PROG, "that was not UTF-8; nothing was asked")
        except EOFError:
            print(file=sys.stderr)
            return
