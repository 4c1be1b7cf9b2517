# SPDX-License-Identifier: Apache-2.0
"""The journal of answers: asked once, kept line by line, never another model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neox_eval.answers import AnswerLog

QUESTIONS = [["a", 1], ["b", 2], ["a", 1], ["\ud800", None]]


class Asker:
    """Answers with the question's position; remembers what it was asked."""

    def __init__(self, stop_after: int = 99) -> None:
        self.asked: list[int] = []
        self.stop_after = stop_after

    def __call__(self, unknown: list[int]) -> Iterator[tuple[int, Any]]:
        self.asked += unknown
        for index in reversed(range(len(unknown))):
            if self.stop_after == 0:
                raise KeyboardInterrupt
            self.stop_after -= 1
            yield index, [float(unknown[index]), True]


def test_equal_questions_are_asked_once() -> None:
    ask = Asker()
    answers = AnswerLog().answer("m", QUESTIONS, ask)
    assert ask.asked == [0, 1, 3]
    assert answers == [[0.0, True], [1.0, True], [0.0, True], [3.0, True]]


def test_going_on_after_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "j"
    log = AnswerLog(path, model="x")
    with pytest.raises(KeyboardInterrupt):
        log.answer("m", QUESTIONS, Asker(stop_after=2))
    with path.open("ab") as file:
        file.write(b'{"q":"half a line')
    log = AnswerLog(path, model="x")
    assert log.found == 2
    ask = Asker()
    assert log.answer("m", QUESTIONS, ask) == [[0.0, True], [1.0, True], [0.0, True], [3.0, True]]
    assert ask.asked == [0]
    other = Asker()
    log.answer("another method", QUESTIONS, other)
    assert other.asked == [0, 1, 3]
    log.close()
    assert AnswerLog(path, model="x").found == 6
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage\n", b'{"neox_answers": 9, "model": "x"}\n', None])
def test_other_files_are_started_anew(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "j"
    if content is None:
        AnswerLog(path, model="another").answer("m", QUESTIONS, Asker())
    else:
        path.write_bytes(content)
    log = AnswerLog(path, model="x")
    assert log.found == 0
    log.answer("m", QUESTIONS, Asker())
    log.close()
    assert AnswerLog(path, model="x").found == 3
