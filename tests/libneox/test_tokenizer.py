# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every kind load, encode, decode, and keep their identity on the way through bytes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import tokenizers

from libneox.errors import DataError, InputMissing, UsageError
from libneox.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

TEXTS = ["", "plain", "é 😀 \u0000\n\ttab", "<|endoftext|>", " "]


@pytest.fixture(scope="session")
def neox_20b(golden: Path) -> Path:
    path = golden.parent / "tokenizers" / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("no 20B_tokenizer.json beside the golden folder")
    return path


def test_bytes_is_what_it_says() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id, tokenizer.dtype) == (258, 0, 1, "uint16")
    for text in TEXTS:
        assert tokenizer.encode(text) == [2 + byte for byte in text.encode()]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_bad_data() -> None:
    for name in ("bytes", "charlevel"):
        with pytest.raises(DataError, match=r"U\+D83D"):
            load_tokenizer(name).encode("a\ud83d")


def test_bytes_is_the_same_file_for_ever() -> None:
    # data and checkpoints carry this fingerprint: a change would part them from each other
    assert byte_tokenizer().fingerprint == "8bbdbdf5bb9e8dd931a8e196fd545e45e98a02bc165383e81cda2b73dfc3035a"


def test_bytes_is_a_tokenizer_json(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(byte_tokenizer().data)
    raw = tokenizers.Tokenizer.from_file(str(file))
    assert raw.encode("é<|endoftext|>").ids == [2 + 0xC3, 2 + 0xA9, 0]
    assert load_tokenizer(file).fingerprint == load_tokenizer(tmp_path).fingerprint == byte_tokenizer().fingerprint


def test_special_tokens_in_text_are_text_unless_allowed(neox_20b: Path) -> None:
    tokenizer = load_tokenizer(neox_20b)
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert tokenizer.encode("a<|endoftext|>b", allow_special=True) == [66, 0, 67]


def test_the_20b_tokenizer(neox_20b: Path) -> None:
    tokenizer = load_tokenizer(neox_20b)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id) == (50277, 0, 1)
    again = Tokenizer.from_bytes(tokenizer.kind, tokenizer.data)
    assert again.fingerprint == tokenizer.fingerprint
    assert [ids.tolist() for ids in again.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer.from_str(byte_tokenizer().data.decode())
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcde")) == 5


def test_gpt2_vocabulary_and_merges(tmp_path: Path, golden: Path) -> None:
    source = golden.parent / "tokenizers" / "gpt2.json"
    if not source.exists():
        pytest.skip("no gpt2.json beside the golden folder")
    content = json.loads(source.read_bytes())
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "gpt2-merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    ours, reference = load_tokenizer(tmp_path / "gpt2-vocab.json"), load_tokenizer(source)
    text = "Hello world, it's 2024!\n\n  def f(x):\n\treturn naïve 日本語 😀"
    assert ours.encode(text) == reference.encode(text)
    assert ours.eod_id == 50256
    (tmp_path / "gpt2-merges.txt").unlink()
    with pytest.raises(InputMissing, match="merges"):
        load_tokenizer(tmp_path / "gpt2-vocab.json")


def test_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    lines = [f"the cat number {i} sat on the mat with {i * 7} dogs" for i in range(200)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=120, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.eod_id == 2  # </s>, as the model declares
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    again = Tokenizer.from_bytes(tokenizer.kind, tokenizer.data)
    assert again.encode("the dogs") == tokenizer.encode("the dogs")


def test_tiktoken(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_text("\n".join([*lines, f"{base64.b64encode(b'ab').decode()} 256"]))
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("abc<|endoftext|>")[:3] == [256, 99, 60]
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [100257] == [tokenizer.eod_id]
    assert tokenizer.dtype == "int32"
    assert tokenizer.decode([256, 99]) == "abc"
    again = Tokenizer.from_bytes(tokenizer.kind, tokenizer.data)
    assert again.encode("ab ab") == tokenizer.encode("ab ab")
    file.rename(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match="how text is split"):
        load_tokenizer(tmp_path / "mine.tiktoken")


def test_charlevel() -> None:
    tokenizer = load_tokenizer("charlevel")
    assert (tokenizer.encode("aé"), tokenizer.vocab_size, tokenizer.eod_id) == ([97, 195, 169], 512, 0)
    assert tokenizer.decode([97, 195, 169, 10]) == "aé\n"


def test_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(DataError, match="id 258"):
        load_tokenizer("bytes").decode([2, 258])


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("absent", None, InputMissing),
        ("x.json", b"{", DataError),
        ("x.json", b'{"a": "b"}', DataError),
        ("x.json", b'{"model": {}}', DataError),
        ("x.bin", b"\x00\x01", DataError),
        ("x.model", b"\x00\x01", DataError),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, name: str, content: bytes | None, error: type[Exception]) -> None:
    if name == "x.model":
        pytest.importorskip("sentencepiece")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=name):
        load_tokenizer(tmp_path / name)


def test_a_directory_without_one(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_an_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown kind"):
        Tokenizer.from_bytes("morse", b"")
