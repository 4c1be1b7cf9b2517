# SPDX-License-Identifier: Apache-2.0
"""Reading prompts: lines or JSON objects, gathered into batches while they arrive. And writing such objects."""

from __future__ import annotations

import dataclasses
import itertools
import json
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from libneox.errors import DataError

GRACE_S = 0.05  # a batch waits this long for the next prompt of a pipe
MOST_WAITING = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        content: text, token ids, or the messages of a chat.
        where: `line 3`, for messages.
        extra: other keys of its object, passed on to the output.
    """

    content: str | list[int] | list[dict[str, Any]]
    where: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the content is messages."""
        return isinstance(self.content, list) and bool(self.content) and isinstance(self.content[0], dict)


def read_prompts(stream: BinaryIO, *, format: str, prompt_end: str, name: str) -> Iterator[Prompt]:
    """Yield prompts as they arrive.

    Args:
        format: lines, jsonl, or auto: jsonl if the first line that is not blank is a JSON object.
        prompt_end: what separates prompts that are lines. They are stripped, and empty ones left out, as GPT-NeoX does.
    Raises:
        DataError: invalid UTF-8 or JSON, or an object without a prompt; says the line.
    """
    lines = text_lines(stream, name)
    begin = []
    for line in lines:
        begin.append(line)
        if line[1].strip():
            break
    rest = itertools.chain(begin, lines)
    if format == "jsonl" or (format == "auto" and begin and _is_object(begin[-1][1])):
        yield from (parse_object(text, f"{name}: line {number}") for number, text in rest if text.strip())
    elif prompt_end == "\n":
        found = ((number, text.strip()) for number, text in rest)
        yield from (Prompt(content=text, where=f"{name}: line {number}") for number, text in found if text)
    else:
        parts = enumerate("".join(text for _, text in rest).split(prompt_end), 1)
        yield from (Prompt(content=t.strip(), where=f"{name}: prompt {n}") for n, t in parts if t.strip())


def parse_object(line: str, where: str) -> Prompt:
    """A prompt from a line of JSONL: `prompt` (text or ids), GPT-NeoX's `context`, or `messages`."""
    record = load_object(line, where)
    key = next((key for key in ("prompt", "messages", "context") if key in record), None)
    if key is None:
        raise DataError(f"{where}: no `prompt`, `messages` or `context` in the object")
    content = record.pop(key)
    numbers = isinstance(content, list) and all(type(x) is int and x >= 0 for x in content)
    if key == "messages":
        ok = isinstance(content, list) and content and all(isinstance(x, dict) and "role" in x for x in content)
    else:
        ok = isinstance(content, str) or numbers
    if not ok:
        wanted = 'a list of {"role": ..., "content": ...}' if key == "messages" else "text or a list of token ids"
        raise DataError(f"{where}: `{key}` is not {wanted}")
    return Prompt(content=content, where=where, extra=record)


def load_object(line: str, where: str) -> dict[str, Any]:
    """A JSON object from a line; DataError if it is none."""
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object")
    return record


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def json_line(record: Mapping[str, Any], where: str) -> bytes:
    """An object as a line of JSON; DataError if it holds numbers that JSON cannot say: the model's, by then."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DataError(f"{where}: the model's log probabilities are not finite; is it damaged?") from error
    return text.encode("utf-8", "replace") + b"\n"


def numbered_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, blank ones left out."""
    return ((number, text) for number, text in text_lines(stream, name) if text.strip())


def text_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1; DataError if one is not UTF-8."""
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Gather prompts into lists of `size`; a shorter one if no more come for a moment, so that a live pipe is answered.

    Prompts are read ahead by a thread; its errors are raised here, after the prompts before them.
    """
    waiting: queue.Queue[Prompt | BaseException | None] = queue.Queue(MOST_WAITING)

    def read() -> None:
        try:
            for prompt in prompts:
                waiting.put(prompt)
            waiting.put(None)
        except BaseException as error:  # handed to the main thread
            waiting.put(error)

    threading.Thread(target=read, daemon=True, name="prompts").start()
    while True:
        batch: list[Prompt] = []
        item = waiting.get()
        while isinstance(item, Prompt):
            batch.append(item)
            if len(batch) == size:
                break
            try:
                item = waiting.get(timeout=GRACE_S)
            except queue.Empty:
                break
        if batch:
            yield batch
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return
