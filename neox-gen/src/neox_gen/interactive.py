# SPDX-License-Identifier: Apache-2.0
"""Talking with a model: a prompt a line, answers as they come, and history."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, BinaryIO

from libneox.cli import warn
from libneox.errors import DataError
from neox_gen.run import PROG, Options, load_for, make_engine

if TYPE_CHECKING:
    from neox_gen.loading import Loaded

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


def talk(options: Options, stdout: BinaryIO) -> None:
    """Read lines until the end of input and answer each on stdout."""
    loaded = load_for(options)
    from libneox.generation.conversation import Conversation

    engine = make_engine(options, loaded)
    conversation, said = Conversation(engine), Talk(loaded)
    person = sys.stdin is not None and sys.stdin.isatty()
    if person and not options.quiet:
        warn(PROG, HELP)
    for turn, line in enumerate(_lines(person)):
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


def _lines(person: bool) -> Any:
    if not person:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> ")  # descriptor 1 is stderr here: the prompt is no part of the answers
        except EOFError:
            print(file=sys.stderr)
            return
