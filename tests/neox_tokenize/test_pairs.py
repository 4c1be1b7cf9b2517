# SPDX-License-Identifier: Apache-2.0
"""Through the real pipe: the .bin/.idx that GPT-NeoX's preprocessing wrote, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

# golden pair, input, tokenizer, further options
MASK = "--mask-before=27,187"
PAIRS = [
    ("a_preprocess/sample_eod_text_document", "sample.jsonl.zst", "20B_tokenizer.json", ["--append-eod"]),
    ("a_preprocess/sample_noeod_text_document", "sample.jsonl", "20B_tokenizer.json", []),
    ("a_preprocess/sample_char_text_document", "sample.jsonl", "charlevel", ["--append-eod"]),
    ("a_preprocess/sample_gpt2_text_document", "sample.jsonl", "gpt2.json", ["--append-eod"]),
    ("a_preprocess/sample_hfgpt2_text_document", "sample.jsonl", "gpt2.json + <|padding|>", ["--append-eod"]),
    ("a_preprocess/edge_eod_text_document", "edge.jsonl", "20B_tokenizer.json", ["--append-eod"]),
    ("e_mask_chat/masked_text_document", "sample.jsonl", "20B_tokenizer.json", ["--append-eod", MASK]),
]  # fmt: skip


@pytest.mark.parametrize(("pair", "source", "tokenizer", "options"), PAIRS)
def test_bytes(
    golden: Path, tokenizers_folder: Path, tmp_path: Path, pair: str, source: str, tokenizer: str, options: list[str]
) -> None:
    name, _, special = tokenizer.partition(" + ")
    if name.endswith(".json"):
        tokenizer = str(tokenizers_folder / name)
    if special:  # HFGPT2Tokenizer is the same vocabulary with one more special token
        backend = tokenizers.Tokenizer.from_file(tokenizer)
        backend.add_special_tokens([special])
        tokenizer = str(tmp_path / "tokenizer.json")
        backend.save(tokenizer)
    python = [sys.executable, "-m"]
    file = golden / "data" / "a_preprocess" / source
    tokenize = [*python, "neox_tokenize", file, "-t", tokenizer, "--compat", "neox", "-q", *options]
    with subprocess.Popen(tokenize, stdout=subprocess.PIPE) as producer:
        shard = [*python, "neox_shard", "pack", "-q", "-o", tmp_path / "out"]
        subprocess.run(shard, stdin=producer.stdout, check=True, timeout=120)
    assert producer.returncode == 0
    outputs = {"out": pair}
    if MASK in options:
        outputs["out_label"] = pair.replace("_text_", "_label_")
    for ours, theirs in outputs.items():
        for suffix in (".bin", ".idx"):
            written, expected = (tmp_path / ours).with_suffix(suffix), golden / "data" / f"{theirs}{suffix}"
            assert written.read_bytes() == expected.read_bytes()
