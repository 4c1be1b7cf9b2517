# SPDX-License-Identifier: Apache-2.0
"""Logits and greedy texts equal those of GPT-NeoX itself, for each of its checkpoints in the golden folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from libneox.checkpoint.load import build_model
from libneox.checkpoint.neox import open_neox
from libneox.model import KVCache, Transformer

ALL_LAYOUTS = """
    alibi_pp0_tp1 gpt2_tied_pp0_tp1 gpt2_tied_pp1_tp1 gpt2_tied_pp1_tp2 llama_gqa_pp0_tp1 llama_gqa_pp1_tp2
    llama_pp0_tp1 mistral_pp0_tp1 neox_seqres_pp0_tp1 pythia_pp0_tp1 pythia_pp0_tp2 pythia_pp1_tp1 pythia_pp1_tp2
    pythia_pp2_tp1 x_1layer_pp1_tp1 x_geglu_pp0_tp1 x_gelufusion_pp0_tp1 x_gptj_tied_ln_pp0_tp1 x_padvocab_pp0_tp1
    x_qknorm_pp0_tp1 x_qknorm_pp0_tp2 x_relu_pp0_tp1 x_rpe_pp0_tp1 x_scalenorm_pp0_tp1 x_sinusoidal_pp0_tp1
"""
CASES = ALL_LAYOUTS.split()


def load(folder: Path) -> Transformer:
    opened = open_neox(folder / "ckpt", vocab_size=500)
    return build_model(opened.config, opened.tensors, source=folder)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_original(case: str, golden: Path) -> None:
    folder = golden / "model" / "ckpts" / case
    own = folder / "logits.npy"
    expected = np.load(own if own.exists() else folder.parent / f"logits_{case.rsplit('_', 2)[0]}.npy")
    ids = torch.from_numpy(np.load(golden / "model" / "tokens.npy"))[: len(expected)]
    with torch.inference_mode():
        logits = load(folder)(ids)
    assert np.abs(logits.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("case", ["alibi_pp0_tp1", "gpt2_tied_pp0_tp1", "llama_gqa_pp0_tp1", "pythia_pp0_tp1"])
def test_greedy_text_equals_the_original(case: str, golden: Path) -> None:
    expected = json.loads((golden / "model" / "generate" / f"{case}.json").read_text())["kv_cache"]
    model = load(golden / "model" / "ckpts" / case)
    text = expected[:12]
    cache = KVCache(model.config, 1, len(expected), dtype=model.dtype)
    with torch.inference_mode():
        logits = model(torch.tensor([text]), cache=cache)
        while len(text) < len(expected):
            text.append(int(logits[0, -1].argmax()))  # also ids past the vocabulary, as the original makes them
            logits = model(torch.tensor([text[-1:]]), cache=cache)
    assert text == expected


def test_every_checkpoint_of_the_folder_is_a_case(golden: Path) -> None:
    assert sorted(path.name for path in (golden / "model" / "ckpts").iterdir() if path.is_dir()) == sorted(CASES)


def load_slim(golden: Path) -> Transformer:
    folder = golden / "model" / "slim20b"
    opened = open_neox(folder, vocab_size=512)
    return build_model(opened.config, opened.tensors, source=folder, dtype=torch.float32)


def test_slim_20b_logits(golden: Path) -> None:
    expected = np.load(golden / "model" / "slim20b" / "logits_fp32_exact_inv_freq.npy")
    ids = torch.from_numpy(np.load(golden / "model" / "tokens.npy"))[:, : expected.shape[1]]
    with torch.inference_mode():
        assert np.abs(load_slim(golden)(ids).numpy() - expected).max() < 1e-5


def test_slim_20b_greedy_text(golden: Path) -> None:
    expected = torch.from_numpy(np.load(golden / "model" / "slim20b" / "greedy_tokens.npy")).long()
    model = load_slim(golden)
    rows, length = expected.shape
    cache, text = KVCache(model.config, rows, length, dtype=model.dtype), expected[:, :12]
    with torch.inference_mode():
        logits = model(text, cache=cache)
        while text.shape[1] < length:
            text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
            logits = model(text[:, -1:], cache=cache)
    assert torch.equal(text, expected)
