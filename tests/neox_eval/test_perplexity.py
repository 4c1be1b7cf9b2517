# SPDX-License-Identifier: Apache-2.0
"""`neox-eval perplexity` counts what the harness's rolling tasks count."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

TEXTS = ["one two  three", "x" * 200, "é 雪", "", "last"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, run_command: Any) -> Path:
    """texts.jsonl, the same compressed, and the pair d made from it."""
    folder = tmp_path_factory.mktemp("texts")
    data = "".join(json.dumps({"a": {"text": text}}) + "\n" for text in TEXTS).encode()
    (folder / "texts.jsonl").write_bytes(data)
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    stream = run_command(["neox-tokenize", "-k", "a.text", folder / "texts.jsonl", "--append-eod"])
    assert stream.returncode == 0, stream.stderr
    packed = run_command(["neox-shard", "pack", "-o", folder / "d"], input=stream.stdout)
    assert packed.returncode == 0, packed.stderr
    return folder


def test_jsonl_and_pair(files: Path, hf_models: dict[str, Path], run_command: Any) -> None:
    run = run_command(
        ["neox-eval", "perplexity", hf_models["pythia"], "--key", "a.text", "-q"]
        + [files / "texts.jsonl", files / "texts.jsonl.gz", files / "d"]
    )
    assert run.returncode == 0, run.stderr
    plain, compressed, pair = (json.loads(line) for line in run.stdout.splitlines())
    size = sum(len(text.encode()) for text in TEXTS)
    assert plain["documents"] == len(TEXTS)
    assert plain["tokens"] == plain["bytes"] == size
    assert {k: v for k, v in plain.items() if k != "data"} == {k: v for k, v in compressed.items() if k != "data"}
    assert plain["loss"] == pytest.approx(plain["nats"] / size)
    assert plain["bits_per_byte"] == pytest.approx(plain["nats"] / size / math.log(2))
    assert plain["token_perplexity"] == pytest.approx(math.exp(plain["loss"]))
    assert pair["documents"] >= len(TEXTS) - 1  # an empty text may be no document
    assert pair["tokens"] == size + pair["documents"], "the pair's documents end in an end-of-document token"
    assert pair["bytes"] == size
    assert pair["nats"] > plain["nats"]


def test_equals_a_plain_forward(files: Path, hf_models: dict[str, Path], run_command: Any) -> None:
    """Windows by hand: each token predicted once, the later ones behind a full window."""
    import torch

    import libneox

    model, total = libneox.load_model(hf_models["llama"]), 0.0
    tokenizer = libneox.load_tokenizer(hf_models["llama"])
    for text in TEXTS:
        ids = [0, *tokenizer.encode(text)]  # encode puts a BOS in front, and so does the first window
        done = 1
        while done < len(ids):
            end = min(len(ids), done + 64)
            window = ids[max(0, end - 65) : end]
            with torch.inference_mode():
                logprobs = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
            wanted = torch.tensor(window[1:])
            total -= logprobs.gather(1, wanted[:, None])[-(end - done) :].sum().item()
            done = end
    run = run_command(["neox-eval", "perplexity", hf_models["llama"], files / "texts.jsonl", "--key", "a.text"])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["nats"] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["gone"], 66, "gone"),
        (["texts.jsonl"], 65, "texts.jsonl:1: no text under 'text'"),
        (["d", "--context", "65"], 2, "--context 65"),
        (["d", "--dtype", "float12"], 2, "float12"),
        (["d", "--device", "abacus"], 2, "abacus"),
        (["half.jsonl"], 65, "half.jsonl:1: the text holds U+D83D"),
        (["deep.jsonl"], 65, "deep.jsonl:1: no text"),
    ],
)
def test_errors(
    files: Path, hf_models: dict[str, Path], run_command: Any, arguments: list[str], code: int, words: str
) -> None:
    run = run_command(["neox-eval", "perplexity", hf_models["pythia"], *arguments], cwd=files)
    assert run.returncode == code, run.stderr
    assert words in run.stderr.decode()
    assert run.stdout == b""


def test_another_tokenizer_is_refused(files: Path, hf_models: dict[str, Path], run_command: Any) -> None:
    run = run_command(["neox-eval", "perplexity", hf_models["llama"], files / "d"])
    assert run.returncode == 2
    assert b"tokenizer" in run.stderr


def test_a_checkpoint_of_gpt_neox_in_place(golden: Path, tmp_path: Path, run_command: Any) -> None:
    """The slim release of the 20B, with the tokenizer its configuration names, in float32 though stored in fp16."""
    import torch

    import libneox

    folder, text = golden / "model/slim20b", "First Citizen: Before we proceed any further, hear me speak."
    model, tokenizer = libneox.load_model(folder, dtype=torch.float32), libneox.load_tokenizer(folder)
    ids = torch.tensor([[tokenizer.eod_id, *tokenizer.encode(text)]])
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    run = run_command(["neox-eval", "perplexity", folder, tmp_path / "t.jsonl", "-q"])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["loss"] == pytest.approx(expected, abs=1e-4)
    assert b"averaged" in run.stderr
