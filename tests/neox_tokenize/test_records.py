# SPDX-License-Identifier: Apache-2.0
"""What a record may be, and what is said of one that cannot be used: series A of the reliability catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libneox.errors import DataError, UsageError


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_broken_json_names_its_line(tokenize) -> None:
    data = [json.dumps({"text": f"document {i}"}) for i in range(20000)]
    data[6] = '{"text": "broken'
    source = "\n".join(data)
    with pytest.raises(DataError, match=r"in\.jsonl:7: broken JSON"):
        tokenize(source)
    stream = tokenize(source, on_error="skip")
    assert len(stream.ids[""]) == 19999
    assert stream.rejects == {"broken JSON": 1}


def test_a_late_line_has_its_number(tokenize) -> None:
    """Line numbers go on from block to block."""
    data = "\n".join([json.dumps({"text": "x" * 1000})] * 5000 + ["{"])
    with pytest.raises(DataError, match=r"in\.jsonl:5001:"):
        tokenize(data)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"other": "a"}', "no key 'text'.*'other'"),
        ('{"text": null}', "is null"),
        ('{"text": 5}', "is a number"),
        ('{"text": true}', "is a boolean"),
        ('{"text": ["a"]}', "is a list"),
        ('{"text": {"a": "b"}}', "is an object"),
        ("[1]", "the record is a list"),
        ("5", "the record is a number"),
    ],
)
def test_wrong_values_are_named(tokenize, line: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        tokenize('{"text": "good"}\n' + line)
    assert "in.jsonl:2" in str(error.value)


def test_nested_keys(tokenize) -> None:
    stream = tokenize(lines({"a": {"b": {"c": "deep"}}}), key=["a.b.c"])
    assert stream.texts == ["deep"]
    with pytest.raises(DataError, match=r"no key 'a.b.c'"):
        tokenize(lines({"a": {"b": {}}}), key=["a.b.c"])
    with pytest.raises(DataError, match="value of 'a' is a string"):
        tokenize(lines({"a": "x"}), key=["a.b.c"])


def test_each_key_has_its_own_field(tokenize) -> None:
    stream = tokenize(lines({"a": "one", "b": "two"}, {"b": "four", "a": "three"}), key=["a", "b"], append_eod=True)
    decoded = {key: [bytes(i - 2 for i in ids[:-1]).decode() for ids in column] for key, column in stream.ids.items()}
    assert decoded == {"a": ["one", "three"], "b": ["two", "four"]}
    assert stream.header.keys == ("a", "b")


def test_keys_inside_each_other_are_refused(tokenize) -> None:
    for keys in (["a", "a.b"], ["a.b", "a"], ["a", "a"]):
        with pytest.raises(UsageError, match="--key"):
            tokenize(lines({"a": "x"}), key=keys)


@pytest.mark.parametrize("filler", ["", ', "n": NaN'])
def test_duplicate_keys(tokenize, filler: str) -> None:
    source = '{"text": "a", "text": "b"' + filler + "}"
    with pytest.raises(DataError, match="stands there twice"):
        tokenize(source)
    assert tokenize(source, duplicate_keys="last").texts == ["b"]


def test_the_key_elsewhere_in_the_line_is_no_duplicate(tokenize) -> None:
    source = lines({"text": 'it says "text" here', "meta": {"text": "other"}, "also": ["text"]})
    assert tokenize(source).texts == ['it says "text" here']


def test_a_duplicate_of_another_key_does_not_matter(tokenize) -> None:
    assert tokenize('{"x": 1, "x": 2, "text": "a", "n": NaN}').texts == ["a"]


@pytest.mark.parametrize(
    ("text", "says", "replaced"),
    [
        (rb"ab\ud800c", "lone surrogate.*U.D800 at character 2", "ab\ufffdc"),
        (b"ab\xed\xa0\x80c", "invalid UTF-8.*0xed at offset 2", "ab\ufffd\ufffd\ufffdc"),
        (b"ab\xffc", "invalid UTF-8.*0xff at offset 2", "ab\ufffdc"),
        (b"ab\xc0\xafc", "invalid UTF-8.*0xc0 at offset 2", "ab\ufffd\ufffdc"),
    ],
)
def test_invalid_unicode(tokenize, text: bytes, says: str, replaced: str) -> None:
    source = b'{"text": "' + text + b'"}'
    with pytest.raises(DataError, match=says):
        tokenize(source)
    assert tokenize(source, errors="replace").texts == [replaced]
    assert tokenize(b'{"text": "a", "other": "' + text + b'"}').texts == ["a"]  # not asked for, not looked at


def test_ends_of_lines_bom_and_nul(tokenize) -> None:
    clean = tokenize('{"text": "a\\u0000b"}\n{"text": "c"}\n')
    assert clean.texts == ["a\x00b", "c"]
    messy = tokenize(b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n\r\n  \n{"text": "c"}')
    assert messy.ids == clean.ids
    assert messy.rejects == {"blank line": 2}
    with pytest.raises(DataError, match=r":2: broken JSON"):
        tokenize(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}')


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 30, "1" * 5000, '{"a": NaN}'])
def test_other_fields_do_not_matter(tokenize, value: str) -> None:
    assert tokenize(f'{{"n": {value}, "text": "a"}}').texts == ["a"]


def test_a_line_over_the_limit(tokenize) -> None:
    source = lines({"text": "short"}) * 3 + lines({"text": "x" * (3 << 20)})
    with pytest.raises(DataError, match=r":4: a line: longer than .*--max-doc-bytes"):
        tokenize(source, max_doc_bytes="1M")
    assert len(tokenize(source, max_doc_bytes="4M").ids[""]) == 4


def test_deep_json(tokenize) -> None:
    source = '{"text": "a", "deep": ' + "[" * 100000 + "]" * 100000 + "}"
    with pytest.raises(DataError, match="nested too deep"):
        tokenize(source)


def test_special_tokens_in_a_text_are_text(tokenize) -> None:
    line = json.dumps({"text": "a<|endoftext|>b"})
    assert tokenize(line).ids[""] == [[2 + byte for byte in b"a<|endoftext|>b"]]
    assert tokenize(line, allow_special=True).ids[""] == [[2 + ord("a"), 0, 2 + ord("b")]]


def test_empty_documents_are_counted(tokenize) -> None:
    stream = tokenize(lines({"text": ""}, {"text": " "}, {"text": "\n\n"}), append_eod=True)
    assert stream.texts == [" <|endoftext|>", "\n\n<|endoftext|>"]
    assert stream.rejects == {"empty document": 1}


def test_a_document_that_encodes_to_nothing(tokenize, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    stream = tokenize(lines({"text": "  "}, {"text": "a a"}), append_eod=True, tokenizer=str(tmp_path / "words.json"))
    assert stream.ids[""] == [[0], [1, 1, 0]]


def test_one_side_of_a_pair_may_be_empty(tokenize) -> None:
    """Columns stay row for row beside each other."""
    stream = tokenize(lines({"a": "", "b": "x"}, {"a": "", "b": ""}, {"a": "y", "b": ""}), key=["a", "b"])
    assert stream.ids == {"a": [[], [123]], "b": [[122], []]}


def test_quarantine(tokenize, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    source = b'{"text": "a"}\n{"text": 5}\n{broken\n{"text": "\xff"}\n'
    stream = tokenize(source, on_error=f"quarantine={file}")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == ["not a string", "broken JSON", "invalid UTF-8"]
    assert [entry["record"] for entry in entries[:2]] == ['{"text": 5}', "{broken"]
    assert [entry["where"].rsplit(":", 1)[1] for entry in entries] == ["2", "3", "4"]
    assert stream.rejects == {"not a string": 1, "broken JSON": 1, "invalid UTF-8": 1}


def test_limit(tokenize) -> None:
    source = lines(*({"text": f"{i}"} for i in range(1000)))
    for limit in (0, 1, 999, 1000, 5000):
        assert tokenize(source, limit=limit).texts == [f"{i}" for i in range(min(limit, 1000))]


def test_no_document(tokenize, capfd) -> None:
    for source in (b"", b"\n\n"):
        stream = tokenize(source)
        assert stream.ids == {"": []}
        assert "no document" in capfd.readouterr().err
        with pytest.raises(DataError, match="no document"):
            tokenize(source, fail_on_empty=True)


def test_a_small_dtype_for_a_large_vocabulary(tokenize, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    large = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(70000)}, unk_token="w0"))
    large.save(str(tmp_path / "large.json"))
    with pytest.raises(UsageError, match="70000 ids"):
        tokenize(b"{broken", tokenizer=str(tmp_path / "large.json"), dtype="uint16")
    assert tokenize(lines({"text": "w69999"}), tokenizer=str(tmp_path / "large.json")).ids[""] == [[69999]]


def test_ftfy(tokenize) -> None:
    assert tokenize(lines({"text": "schÃ¶n"}), ftfy=True).texts == ["schön"]


def test_mask_before(tokenize) -> None:
    source = lines({"text": "q: a: b"}, {"text": "none"}, {"text": ": "}, {"text": "x"})
    stream = tokenize(source, mask_before=": ", append_eod=True)
    expected = [
        [-100] * 3 + stream.ids[""][0][3:],
        stream.ids[""][1],
        [-100, -100, 0],
        stream.ids[""][3],
    ]
    assert stream.labels[""] == expected
    assert stream.header.dtype == "int32"
    assert tokenize(source, mask_before="60,34", append_eod=True).labels == stream.labels


@pytest.mark.parametrize("text", ["R\u00e9ponse:", "\u7b54\u3048:", "\U0001f600 \\n", "\\u00e9"])
def test_mask_before_a_text_of_any_script(tokenize, text: str) -> None:
    plain = text.replace("\\n", "\n").replace("\\u00e9", "\u00e9")
    stream = tokenize(lines({"text": f"a {plain} b"}), mask_before=text)
    masked = len(f"a {plain}".encode())
    assert stream.labels[""] == [[-100] * masked + stream.ids[""][0][masked:]]


def test_mask_before_broken_escapes(tokenize) -> None:
    for text in ("\\", "\\x", "\\ud800"):
        with pytest.raises(UsageError, match="--mask-before"):
            tokenize(lines({"text": "a"}), mask_before=text)


def test_what_stands_behind_the_limit_is_not_looked_at(tokenize) -> None:
    """Neither as an error nor as a count, wherever the borders of blocks fall."""
    source = b"\n" + lines({"text": "a"}, {"text": ""}, {"text": "b"}) + b'\n{broken\n{"text": 5}'
    stream = tokenize(source, limit=2)
    assert stream.texts == ["a", "b"]
    assert stream.rejects == {"blank line": 1, "empty document": 1}
    with pytest.raises(DataError, match=":6: broken JSON"):
        tokenize(source, limit=3)


def test_a_small_limit_holds_within_a_block(tokenize) -> None:
    source = lines({"text": "y"}) * 3 + lines({"text": "x" * 2000}, {"text": "z"})
    with pytest.raises(DataError, match=r":4: a line: longer than"):
        tokenize(source, max_doc_bytes="1K")
    assert len(tokenize(source, max_doc_bytes="3K").ids[""]) == 5


def test_mask_before_a_special_token(tokenize) -> None:
    """It is looked for as the documents have it: as text, or as its id."""
    source = lines({"text": "a<|padding|>b"})
    for options in ({"allow_special": True}, {"compat": "neox"}):
        assert tokenize(source, mask_before="<|padding|>", **options).labels[""] == [[-100, -100, 2 + ord("b")]]
    assert tokenize(source, mask_before="<|padding|>").labels[""] == [[-100] * 12 + [2 + ord("b")]]
