# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of GPT-NeoX in place: the slim release of the 20B and a save directory, against golden greedy tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPT = 12  # ids given, the rest of each golden row was generated


def test_the_slim_20b_in_python(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stored in fp16, run in fp32, one prompt after the other and both at once."""
    import torch

    import libneox

    folder = golden / "model/slim20b"
    wanted = np.load(folder / "greedy_tokens.npy").tolist()
    tokenizer = libneox.load_tokenizer(folder)  # the file that its configuration names
    model = libneox.load_model(folder, dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    assert "averaged" in capsys.readouterr().err
    prompts = [row[:PROMPT] for row in wanted]
    for batch in (1, 2):
        made = libneox.generate(model, tokenizer, prompts, max_tokens=len(wanted[0]) - PROMPT, batch_size=batch)
        assert [row[:PROMPT] + one.tokens for row, one in zip(wanted, made, strict=True)] == wanted


def test_the_slim_20b_on_the_command_line(golden: Path, tmp_path: Path, run_command: Any) -> None:
    folder = golden / "model/slim20b"
    wanted = np.load(folder / "greedy_tokens.npy").tolist()
    prompts = "".join(json.dumps({"prompt": row[:PROMPT]}) + "\n" for row in wanted).encode()
    options = ["--ids", "-m", str(len(wanted[0]) - PROMPT)]
    run = run_command(["neox-gen", folder, *options], input=prompts)
    assert run.returncode == 0, run.stderr
    assert b"averaged" in run.stderr
    made = [json.loads(line)["tokens"] for line in run.stdout.splitlines()]
    assert [row[:PROMPT] + tokens for row, tokens in zip(wanted, made, strict=True)] == wanted

    shutil.copytree(folder, tmp_path / "slim", copy_function=shutil.copyfile)  # away from its tokenizer
    run = run_command(["neox-gen", tmp_path / "slim", *options], input=prompts)
    assert run.returncode == 66
    assert b"name one with --tokenizer" in run.stderr
    given = ["--tokenizer", golden / "model/data/tiny_bpe_500.json"]
    run = run_command(["neox-gen", tmp_path / "slim/latest", *options, *given], input=prompts)
    assert run.returncode == 0, run.stderr
    assert [json.loads(line)["tokens"] for line in run.stdout.splitlines()] == made


@pytest.mark.parametrize("case", ["pythia_pp0_tp1", "llama_gqa_pp0_tp1"])
def test_a_save_directory_continues_as_the_original_did(golden: Path, case: str) -> None:
    import libneox

    golden_text = json.loads((golden / "model/generate" / f"{case}.json").read_text())
    wanted = golden_text["kv_cache"]
    folder = golden / "model/ckpts" / case / "ckpt"
    model = libneox.load_model(folder)  # all rows of the embedding: the original makes padding ids too
    made = libneox.generate(model, Rows(model.config.vocab_size), [wanted[:PROMPT]], max_tokens=len(wanted) - PROMPT)
    assert wanted[:PROMPT] + made[0].tokens == wanted


class Rows:
    """A tokenizer of nothing but ids."""

    eod_id = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: list[int]) -> str:
        """No text."""
        return ""
