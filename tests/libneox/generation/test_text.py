# SPDX-License-Identifier: Apache-2.0
"""Streamed text: whole characters only, nothing of a stop string, and in the end the same as decoding at once."""

from __future__ import annotations

import pytest

from libneox.generation.text import TextStream
from libneox.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, data: bytes, stop: list[str] | None = None) -> tuple[list[str], TextStream]:
    """Push the bytes one token each until the stream has stopped."""
    text = TextStream(tokenizer, [2 + ord("x")], stop or [])
    given = []
    for byte in data:
        given.append(text.push(2 + byte))
        if text.stopped is not None:
            return given, text
    given.append(text.finish())
    return given, text


@pytest.mark.parametrize("text", ["plain", "a\u00e9\u4e2d\U0001f600z", "\u4e2d\u6587", "tabs\tand\nlines "])
def test_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    given, result = stream(tokenizer, text.encode())
    assert "".join(given) == result.text == text
    assert not any("\ufffd" in piece for piece in given)


@pytest.mark.parametrize("data", [b"ab\xff\xfecd", b"\xe4\xb8", b"\xc3(", b"\xf0\x9f\x98", b"\x80" * 9])
def test_invalid_bytes_become_replacement_characters(tokenizer: Tokenizer, data: bytes) -> None:
    given, result = stream(tokenizer, data)
    assert "".join(given) == result.text
    assert "\ufffd" in result.text
    assert result.text.encode().decode() == result.text
    letters = [c for c in data.decode("ascii", "ignore")]
    assert [c for c in result.text if c != "\ufffd"] == letters


def test_stop_strings_end_the_text_and_are_never_shown(tokenizer: Tokenizer) -> None:
    given, result = stream(tokenizer, b"one END two ENDX three", ["ENDX", "zzz"])
    assert result.stopped == "ENDX"
    assert "".join(given) == result.text == "one END two "


def test_text_that_only_began_like_a_stop_string_is_given_back(tokenizer: Tokenizer) -> None:
    given, result = stream(tokenizer, b"a\n\nb\n", ["\n\n\n"])
    assert "".join(given) == result.text == "a\n\nb\n"
    assert given[1] == given[2] == ""  # held back until it was certain
    assert result.stopped is None


def test_the_earliest_stop_string_wins(tokenizer: Tokenizer) -> None:
    _, result = stream(tokenizer, b"abcdef", ["cd", "bcd"])
    assert (result.text, result.stopped) == ("a", "bcd")


def test_leading_space_of_a_sentencepiece_style_tokenizer_is_kept() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "\u2581Hello": 1, "\u2581world": 2, "</s>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Metaspace()
    spaced = Tokenizer.from_bytes("tokenizer.json", backend.to_str().encode())
    assert spaced.decode([2]) == "world"
    text = TextStream(spaced, [1])
    assert text.push(2) == " world"
