# SPDX-License-Identifier: Apache-2.0
"""Whatever the engine and the number of workers, the ids are those of the tokenizers library."""

from __future__ import annotations

import json
import random
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from libneox.cli import flat
from libneox.errors import UsageError
from libneox.tokenizer import JsonTokenizer, load_tokenizer
from neox_tokenize import cli, gigatoken_engine
from neox_tokenize.encode import append_eod, in_order, mask_before
from neox_tokenize.engines import ByteEngine, ReferenceEngine
from neox_tokenize.gigatoken_engine import DIFFERING, EnginesDiffer, GigatokenEngine, Unsuitable


@pytest.fixture(scope="module", params=["20B_tokenizer.json", "gpt2.json", "trained"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    if request.param == "trained":
        folder = tmp_path_factory.mktemp("trained")
        text = Path(json.__file__).read_text() * 3
        (folder / "text.txt").write_text(text)
        out = folder / "tokenizer.json"
        flat(cli.train)(files=[folder / "text.txt"], vocab_size=700, out=out, quiet=True, stdout=None)
        loaded = load_tokenizer(out)
    else:
        golden: Path = request.getfixturevalue("golden")
        path = golden.parent / "tokenizers" / request.param
        if not path.exists():
            pytest.skip(f"no {request.param} beside the golden folder")
        loaded = load_tokenizer(path)
    assert isinstance(loaded, JsonTokenizer)
    return loaded


def mixed_texts(count: int, seed: int) -> list[str]:
    """Random texts of all kinds: any assigned character, marks in any order, scripts, code, spaces, added tokens."""
    rng = random.Random(seed)
    assigned = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Co")]
    marks = [c for c in assigned if unicodedata.combining(c)]
    pools = [
        assigned,
        marks + list("aeiouAEIOU\u05d0\u0628\u0915"),
        list("abcdefgh ABC 0123 \n\t'.,;:!?\"()[]{}<>|=+-*/\\_"),
        [chr(i) for i in range(0x4E00, 0x9FFF)] + list("\u3001\u3002 "),
        [chr(i) for i in range(0x1F300, 0x1FAFF)] + ["\u200d", "\ufe0f"],
        [chr(i) for i in range(0x590, 0x700)] + [" "],
        [chr(i) for i in range(0x900, 0xE00)] + [" "],
        [" ", "  ", "        ", "\n", "\r\n", "\t", "x", "\u00a0", "\u3000"],
        ["<|endoftext|>", "<|padding|>", "<|", "|>", "endoftext", " ", "don't", "I'LL", "'s"],
        [chr(i) for i in range(0xAC00, 0xD7A4)] + [chr(i) for i in range(0x1100, 0x1200)],
    ]
    texts = []
    for _ in range(count):
        chosen = rng.sample(pools, rng.randint(1, 3))
        texts.append("".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(0, 120))))
    return texts


def encoded(engine: object, texts: list[str]) -> list[list[int]]:
    values, lengths = engine.encode(texts)  # type: ignore[attr-defined]
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def test_gigatoken_equals_tokenizers(tokenizer: JsonTokenizer) -> None:
    fast = GigatokenEngine(tokenizer, "int32", workers=2, allow_special=False)
    reference = ReferenceEngine(tokenizer, "int32", allow_special=False)
    texts = mixed_texts(3000, 0)
    assert encoded(fast, texts) == encoded(reference, texts)
    assert 0 < len(fast._for_reference(texts)) < 2000  # both ways are taken


def test_the_table_of_differing_characters_is_needed(golden: Path) -> None:
    """The fence is not there for nothing: without it these texts get other ids."""
    path = golden.parent / "tokenizers" / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip("no 20B_tokenizer.json beside the golden folder")
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, JsonTokenizer)
    fast = GigatokenEngine(tokenizer, "int32", workers=1, allow_special=False)
    reference = ReferenceEngine(tokenizer, "int32", allow_special=False)
    for text in ("a\u0345\u08ca", "a\u059a\u089f", "a\u031b\u08ca\u0301"):
        assert fast._for_reference([text]) == [0]
        assert encoded(fast, [text]) == encoded(reference, [text])
    assert fast._fast(["a\u0345\u08ca"])[0].tolist() != reference.encode(["a\u0345\u08ca"])[0].tolist()


def test_the_table_is_well_formed() -> None:
    bounds = [int(part, 16) for entry in DIFFERING.split() for part in entry.split("-")]
    assert all(0x80 <= point < 0x110000 for point in bounds)
    assert int(gigatoken_engine._differing_table().sum()) > 1000


def test_a_difference_ends_the_run(tokenizer: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GigatokenEngine(tokenizer, "int32", workers=1, allow_special=False)
    texts = ["some words here"] * 2000
    engine.encode(texts)
    fast = engine._fast

    def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        values, lengths = fast(texts)
        return values + 1, lengths

    monkeypatch.setattr(engine, "_fast", wrong)

    def encode_on() -> None:
        for _ in range(20):
            engine.encode(texts)

    with pytest.raises(EnginesDiffer, match="--engine tokenizers"):
        encode_on()


def test_the_check_keeps_to_its_share(tokenizer: JsonTokenizer) -> None:
    engine = GigatokenEngine(tokenizer, "int32", workers=1, allow_special=False)
    for size, count in ((10, 30), (1000, 300), (100000, 3)):
        for _ in range(10):
            engine.encode(["x y " * size] * count)
    assert 0 < engine._checked <= 0.002 * engine._seen


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "split"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "split"),
    ],
)
def test_other_kinds_are_left_to_the_reference(tokenizer: JsonTokenizer, change: dict, reason: str) -> None:
    other = JsonTokenizer(json.dumps({**json.loads(tokenizer.data), **change}).encode(), "other")
    with pytest.raises(Unsuitable, match=reason):
        GigatokenEngine(other, "int32", workers=1, allow_special=False)


def test_insisting_on_gigatoken(tokenize, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer.json"):
        tokenize("text", "a.txt", tokenizer="charlevel", engine="gigatoken")


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_workers_do_not_matter(tokenize, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from neox_tokenize import blocks

    file = tmp_path / "t.json"
    words = ["a", "few", "words", "for", "a", "small", "tokenizer,", "123", "of", "them"]
    (tmp_path / "in.txt").write_text(" ".join(random.Random(0).choices(words, k=5000)))
    flat(cli.train)(files=[tmp_path / "in.txt"], vocab_size=400, out=file, quiet=True, stdout=None)
    source = "\n".join(json.dumps({"text": text}) for text in [*mixed_texts(1000, 9), "x" * 100000])
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10000)
    monkeypatch.setattr(blocks, "READ_BYTES", 1000)
    options = {"tokenizer": str(file), "engine": engine, "append_eod": True}
    one, two, many = (tokenize(source, workers=workers, **options) for workers in (1, 2, 16))
    assert one.data == two.data == many.data
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 26)
    assert tokenize(source, **options).ids == one.ids


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a" * 1_000_000, id="one letter"),
        pytest.param("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=500_000)), id="random letters"),
        pytest.param("\n" * 1_000_000, id="newlines"),
        pytest.param("a" + "\u0301" * 100_000, id="combining marks"),
    ],
)
def test_hard_texts_take_linear_time(tokenize, golden: Path, text: str) -> None:
    """Quadratic time would run into the limit that every test has. The ids are those of the library."""
    tokenizer = golden.parent / "tokenizers" / "20B_tokenizer.json"
    if not tokenizer.exists():
        pytest.skip("no 20B_tokenizer.json beside the golden folder")
    stream = tokenize(json.dumps({"text": text}), tokenizer=str(tokenizer))
    assert stream.texts == [unicodedata.normalize("NFC", text)]
    part = text[:50_000]
    assert tokenize(json.dumps({"text": part}), tokenizer=str(tokenizer)).ids[""] == [
        load_tokenizer(tokenizer).encode(part)
    ]


def test_byte_engine_equals_its_tokenizer() -> None:
    texts = [text for text in mixed_texts(300, 4) if text]
    reference = ReferenceEngine(load_tokenizer("bytes"), "uint16", allow_special=False)
    assert encoded(ByteEngine("uint16"), texts) == encoded(reference, texts)


def test_append_eod() -> None:
    values, lengths = append_eod(np.array([5, 6, 7], np.uint16), np.array([2, 0, 1]), 9)
    assert values.tolist() == [5, 6, 9, 9, 7, 9]
    assert lengths.tolist() == [3, 1, 2]
    assert values.dtype == np.uint16
    assert append_eod(np.zeros(0, np.int32), np.zeros(0, np.int64), 9)[0].tolist() == []


def test_mask_before_stays_inside_its_document() -> None:
    # the pattern 1,2 stands across the border of the first two documents, and twice in the third
    values, lengths = np.array([3, 1, 2, 4, 0, 1, 2, 1, 2, 5]), np.array([2, 2, 6])
    labels = mask_before(values, lengths, (1, 2))
    assert labels.tolist() == [3, 1, 2, 4, -100, -100, -100, 1, 2, 5]
    assert mask_before(values, lengths, tuple(range(20))).tolist() == values.tolist()


def test_in_order_keeps_order_and_bounds() -> None:
    started: list[int] = []

    def items():
        for i in range(50):
            started.append(i)
            yield i

    def work(i: int) -> int:
        time.sleep(random.Random(i).random() / 200)
        return i * i

    results = in_order(work, items(), 4)
    assert next(results) == 0
    assert len(started) <= 6  # the reader does not run ahead of a slow consumer
    assert list(results) == [i * i for i in range(1, 50)]


def test_in_order_stops_at_the_first_error() -> None:
    def work(i: int) -> int:
        if i >= 3:
            raise RuntimeError(f"item {i}")
        return i

    results = in_order(work, range(100), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="item 3"):
        next(results)
