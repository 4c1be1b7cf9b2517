# SPDX-License-Identifier: Apache-2.0
"""Reading prompts: formats, faults, and batches from pipes that are slow."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest

from libneox.errors import DataError
from neox_gen.cli import unescape
from neox_gen.prompts import Prompt, batches, json_line, read_prompts


def read(data: bytes, format: str = "auto", prompt_end: str = "\n") -> list[Prompt]:
    return list(read_prompts(io.BytesIO(data), format=format, prompt_end=prompt_end, name="stdin"))


@pytest.mark.parametrize(
    ("data", "format", "prompt_end", "expected"),
    [
        (b"a\n\n b \nc", "auto", "\n", ["a", "b", "c"]),
        (b'\xef\xbb\xbf{"prompt": "a"}\n{"context": "b"}', "auto", "\n", ["a", "b"]),
        (b'{"prompt": "a"}\n', "lines", "\n", ['{"prompt": "a"}']),
        (b'\n \n{"prompt": "a"}\n', "auto", "\n", ["a"]),
        (b"\n \n", "auto", "\n", []),
        (b"{not json\nb", "auto", "\n", ["{not json", "b"]),
        (b"a\nb###c\n###\n", "auto", "###", ["a\nb", "c"]),
        (b"", "auto", "\n", []),
        (b'\n{"prompt": ""}\n{"prompt": [1, 2]}', "jsonl", "\n", ["", [1, 2]]),
    ],
)
def test_formats(data: bytes, format: str, prompt_end: str, expected: list[object]) -> None:
    assert [prompt.content for prompt in read(data, format, prompt_end)] == expected


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"a\n\xff", "stdin: line 2: not UTF-8"),
        (b'{"prompt": "a"}\nb', "stdin: line 2: not JSON"),
        (b'{"prompt": "a"}\n[1]', "line 2: not a JSON object"),
        (b'{"prompt": "a"}\n{"text": "a"}', "line 2: no `prompt`"),
        (b'{"prompt": 5}', "line 1: `prompt` is not text"),
        (b'{"prompt": [-1]}', "line 1: `prompt` is not text"),
        (b'{"prompt": [true]}', "line 1: `prompt` is not text"),
        (b'{"messages": []}', "line 1: `messages` is not a list"),
        (b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2: not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "b", "score": NaN}', "line 2: not JSON"),
    ],
)
def test_faults_name_the_line(data: bytes, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read(data)


def test_batches_are_full_or_do_not_wait_long() -> None:
    go_on = threading.Event()

    def prompts() -> Iterator[Prompt]:
        for i in range(5):
            yield Prompt(content=str(i), where="")
        go_on.wait(30)
        yield Prompt(content="late", where="")
        raise DataError("broken")

    gathered = batches(prompts(), 2)
    assert [[prompt.content for prompt in next(gathered)] for _ in range(3)] == [["0", "1"], ["2", "3"], ["4"]]
    go_on.set()
    assert [prompt.content for prompt in next(gathered)] == ["late"]
    with pytest.raises(DataError, match="broken"):
        next(gathered)


def test_numbers_that_json_cannot_say_are_the_model_s_fault() -> None:
    assert json_line({"a": 1.5, "b": "\u00e9"}, "x") == '{"a": 1.5, "b": "\u00e9"}\n'.encode()
    with pytest.raises(DataError, match="line 3: the model's log probabilities are not finite"):
        json_line({"a": [float("-inf")]}, "line 3")


def test_unescape() -> None:
    assert unescape(r"a\n\t\\n\x") == "a\n\t\\n\\x"
