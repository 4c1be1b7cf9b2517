# SPDX-License-Identifier: Apache-2.0
"""`--compat neox` gives the original's tokens; the default differs only where it says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from libneox.errors import DataError

NEOX = {"compat": "neox", "append_eod": True}


def pair(prefix: Path) -> list[list[int]]:
    """The sequences of a golden .bin/.idx pair."""
    index = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, np.int32, count, 34)
    values = np.fromfile(f"{prefix}.bin", {8: np.uint16, 4: np.int32}[index[17]])
    return [part.tolist() for part in np.split(values, np.cumsum(sizes)[:-1])]


@pytest.fixture
def preprocess(golden: Path) -> Path:
    return golden / "data" / "a_preprocess"


@pytest.mark.parametrize("source", ["sample.jsonl", "sample.jsonl.zst"])
def test_sample(tokenize, preprocess: Path, tokenizers_folder: Path, source: str) -> None:
    tokenizer = str(tokenizers_folder / "20B_tokenizer.json")
    expected = pair(preprocess / "sample_eod_text_document")
    for workers in (1, 3):
        stream = tokenize(preprocess / source, tokenizer=tokenizer, workers=workers, **NEOX)
        assert stream.ids[""] == expected
        assert stream.header.dtype == "uint16"
        assert stream.rejects == {"empty document": 3}
    stream = tokenize(preprocess / source, tokenizer=tokenizer, compat="neox")
    assert stream.ids[""] == pair(preprocess / "sample_noeod_text_document")


def test_the_default_differs_in_special_tokens_alone(tokenize, preprocess: Path, tokenizers_folder: Path) -> None:
    """A-16 on the original's sample."""
    tokenizer = str(tokenizers_folder / "20B_tokenizer.json")
    texts = [json.loads(line)["text"] for line in (preprocess / "sample.jsonl").read_text().splitlines()]
    texts = [text for text in texts if text]
    stream = tokenize(preprocess / "sample.jsonl", tokenizer=tokenizer, append_eod=True)
    assert stream.header.info["engine"] == "gigatoken"
    differing = 0
    for text, ours, neox in zip(texts, stream.ids[""], pair(preprocess / "sample_eod_text_document"), strict=True):
        if ours != neox:
            differing += 1
            assert "<|endoftext|>" in text or "<|padding|>" in text
    assert differing
    allowed = tokenize(preprocess / "sample.jsonl", tokenizer=tokenizer, append_eod=True, allow_special=True)
    assert allowed.ids[""] == pair(preprocess / "sample_eod_text_document")


def test_sample_charlevel(tokenize, preprocess: Path) -> None:
    stream = tokenize(preprocess / "sample.jsonl", tokenizer="charlevel", **NEOX)
    assert stream.ids[""] == pair(preprocess / "sample_char_text_document")


def test_sample_gpt2(tokenize, preprocess: Path, tokenizers_folder: Path) -> None:
    stream = tokenize(preprocess / "sample.jsonl", tokenizer=str(tokenizers_folder / "gpt2.json"), **NEOX)
    assert stream.ids[""] == pair(preprocess / "sample_gpt2_text_document")


def test_sample_hfgpt2(tokenize, preprocess: Path, tokenizers_folder: Path, tmp_path: Path) -> None:
    """HFGPT2Tokenizer is the same vocabulary with <|padding|> as one more special token."""
    import tokenizers

    padded = tokenizers.Tokenizer.from_file(str(tokenizers_folder / "gpt2.json"))
    padded.add_special_tokens(["<|padding|>"])
    padded.save(str(tmp_path / "hfgpt2.json"))
    stream = tokenize(preprocess / "sample.jsonl", tokenizer=str(tmp_path / "hfgpt2.json"), **NEOX)
    assert stream.ids[""] == pair(preprocess / "sample_hfgpt2_text_document")


def test_edge(tokenize, preprocess: Path, tokenizers_folder: Path) -> None:
    tokenizer = str(tokenizers_folder / "20B_tokenizer.json")
    stream = tokenize(preprocess / "edge.jsonl", tokenizer=tokenizer, **NEOX)
    assert stream.ids[""] == pair(preprocess / "edge_eod_text_document")


ARCHIVES = [
    "adir", "archive.dat.zst", "archive.json.zst", "archive.jsonl.zst", "crlf.jsonl", "crlf.jsonl.zst", "lines.gz",
    "lines.json.gz", "members.jsonl.zst.tar", "nan.jsonl", "objects.jsonl.gz", "one.txt", "plain.jsonl", "texts.tar.gz",
    "texts.zip", "twoframes.jsonl.zst",
]  # fmt: skip
# What the default reads differently: by content, line ends kept. Everything else is equal.
OTHERWISE = {
    "lines.gz": ["first line\nsecond ünï\n\nlast without newline"],
    "objects.jsonl.gz": ["first document\nwith two lines"],
    "one.txt": ["line one\r\nline two\rline three\n"],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tokenize, golden: Path, name: str) -> None:
    folder = golden / "data" / "a_lmd"
    expected = [text for text in json.loads((folder / "expected.json").read_text())[name]["docs"] if text]
    assert tokenize(folder / name, compat="neox").texts == expected
    assert tokenize(folder / name).texts == OTHERWISE.get(name, expected)


@pytest.mark.parametrize("compat", [None, "neox"])
@pytest.mark.parametrize("name", ["badkey.jsonl", "badkey.jsonl.zst", "invalid_utf8.jsonl", "invalid_utf8.jsonl.zst"])
def test_what_the_original_refused_is_refused(tokenize, golden: Path, name: str, compat: str | None) -> None:
    with pytest.raises(DataError, match=name):
        tokenize(golden / "data" / "a_lmd" / name, compat=compat)


def test_objects_that_crashed_the_tokenizer_are_read(tokenize, golden: Path) -> None:
    """The original yields the objects of a .json.gz whole, which no tokenizer takes; their texts are meant."""
    file = golden / "data" / "a_lmd" / "objects.json.gz"
    expected = json.loads((file.parent / "expected.json").read_text())[file.name]["docs"]
    for compat in (None, "neox"):
        stream = tokenize(file, compat=compat)
        assert stream.texts == [document["text"] for document in expected if document["text"]]
        assert stream.rejects == {"empty document": 1}


def test_every_archive_has_its_test(golden: Path) -> None:
    elsewhere = {"badkey", "invalid_utf8", "blankline", "number", "surrogate", "objects"}
    names = set(json.loads((golden / "data" / "a_lmd" / "expected.json").read_text())) - set(ARCHIVES)
    assert {name.partition(".")[0] for name in names} == elsewhere


@pytest.mark.parametrize("name", ["blankline.jsonl", "blankline.jsonl.zst"])
def test_blank_lines(tokenize, golden: Path, name: str) -> None:
    with pytest.raises(DataError, match=":2: broken JSON"):
        tokenize(golden / "data" / "a_lmd" / name, compat="neox")
    assert tokenize(golden / "data" / "a_lmd" / name).rejects == {"blank line": 1}


@pytest.mark.parametrize("name", ["number.jsonl", "surrogate.jsonl"])
def test_what_crashed_the_tokenizer_later_is_refused(tokenize, golden: Path, name: str) -> None:
    for compat in (None, "neox"):
        with pytest.raises(DataError, match=name):
            tokenize(golden / "data" / "a_lmd" / name, compat=compat)


def test_mask_before(tokenize, golden: Path, tokenizers_folder: Path) -> None:
    folder = golden / "data" / "e_mask_chat"
    stream = tokenize(
        golden / "data" / "a_preprocess" / "sample.jsonl",
        tokenizer=str(tokenizers_folder / "20B_tokenizer.json"),
        mask_before="27,187",
        **NEOX,
    )
    assert stream.header.dtype == "int32"
    assert stream.ids[""] == pair(folder / "masked_text_document")
    assert stream.labels[""] == pair(folder / "masked_label_document")


CHATS = {
    "chat": {},
    "chat_only-last": {"only_last": True},
    "chat_for-rm": {"for_rm": True},
    "chat_reward": {"reward_key": "reward"},
    "chat_binreward": {"reward_key": "good", "binary_reward": True},
}


@pytest.mark.parametrize("name", CHATS)
def test_chat(tokenize, golden: Path, name: str) -> None:
    folder = golden / "data" / "e_mask_chat"
    options = {"tokenizer": str(folder / "chat_tokenizer"), "chat": True, "key": ["conversation"], **CHATS[name]}
    stream = tokenize(folder / "chat.jsonl", compat="neox", **options)
    tokens, labels = (
        pair(folder / f"{name}_conversation_document"),
        pair(folder / f"{name}_conversation_label_document"),
    )
    assert stream.ids[""] == tokens
    assert stream.labels[""] == labels
    rewards = {"chat_reward": [0.5, -0.25, 1, 2, -1, 0, 0.125, 3], "chat_binreward": [-1, 1] * 4}  # not cut to integers
    assert stream.rewards == rewards.get(name, [])
    # the default finds the turns by characters: the original loses the newline after the last, empty answer
    default = tokenize(folder / "chat.jsonl", **options)
    assert default.ids[""][:7] == tokens[:7]
    assert default.labels[""] == labels
    assert default.texts[7].endswith("<|assistant|>\n\n<|endoftext|>" + "<|endoftext|>" * (name == "chat_for-rm"))
