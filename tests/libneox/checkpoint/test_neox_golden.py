# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint written by the original, read by ours: its logits are the original's."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import libneox
from libneox.checkpoint.load import build_model
from libneox.checkpoint.neox import open_neox
from libneox.checkpoint.neox.merge import merge
from libneox.checkpoint.neox.torchfile import TorchFile
from libneox.errors import DataError, NeoxError, UnsafeInput

# In the folder of golden numbers; `x_qknorm` at TP 2 normalises other groups and has logits of its own.
CHECKPOINTS = (
    "alibi_pp0_tp1",
    "gpt2_tied_pp0_tp1",
    "gpt2_tied_pp1_tp1",
    "gpt2_tied_pp1_tp2",
    "llama_gqa_pp0_tp1",
    "llama_gqa_pp1_tp2",
    "llama_pp0_tp1",
    "mistral_pp0_tp1",
    "neox_seqres_pp0_tp1",
    "pythia_pp0_tp1",
    "pythia_pp0_tp2",
    "pythia_pp1_tp1",
    "pythia_pp1_tp2",
    "pythia_pp2_tp1",
    "x_1layer_pp1_tp1",
    "x_geglu_pp0_tp1",
    "x_gelufusion_pp0_tp1",
    "x_gptj_tied_ln_pp0_tp1",
    "x_padvocab_pp0_tp1",
    "x_qknorm_pp0_tp1",
    "x_qknorm_pp0_tp2",
    "x_relu_pp0_tp1",
    "x_rpe_pp0_tp1",
    "x_scalenorm_pp0_tp1",
    "x_sinusoidal_pp0_tp1",
)


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    legacy = open_neox(path, vocab_size=500)
    model = build_model(legacy.config, legacy.tensors, source=path, dtype=torch.float32)
    with torch.inference_mode():
        return model(ids)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_the_originals(golden: Path, name: str) -> None:
    folder = golden / "model/ckpts"
    own = folder / name / "logits.npy"
    wanted = np.load(own if own.exists() else folder / f"logits_{name.rsplit('_', 2)[0]}.npy")
    ids = torch.from_numpy(np.load(golden / "model/tokens.npy"))[: wanted.shape[0]]
    found = logits_of(folder / name / "ckpt", ids).numpy()
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_list_is_complete(golden: Path) -> None:
    assert {path.name for path in (golden / "model/ckpts").iterdir() if path.is_dir()} == set(CHECKPOINTS)


def test_slim_release_of_the_20b(golden: Path) -> None:
    """44 layers, two ranks, old names, drifted norms; logits with the exact inverse frequencies, as ours are."""
    folder = golden / "model/slim20b"
    legacy = open_neox(folder)
    wanted = np.load(folder / "logits_fp32_exact_inv_freq.npy")
    greedy = torch.from_numpy(np.load(folder / "greedy_tokens.npy"))
    model = build_model(legacy.config, legacy.tensors, source=folder, dtype=torch.float32)
    ids = torch.from_numpy(np.load(golden / "model/tokens.npy"))[:, : wanted.shape[1]]
    with torch.inference_mode():
        np.testing.assert_allclose(model(ids).numpy(), wanted, rtol=0, atol=1e-5)
        text = greedy[:, :12]
        while text.shape[1] < greedy.shape[1]:
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, greedy)
    assert any("averaged" in note for note in legacy.notes)
    assert any("summed" in note for note in legacy.notes)


@pytest.mark.parametrize("name", ["pythia_pp0_tp2", "pythia_pp1_tp2", "gpt2_tied_pp1_tp2", "llama_gqa_pp1_tp2"])
def test_every_layout_gives_the_same_tensors(golden: Path, name: str) -> None:
    folder = golden / "model/ckpts"
    single = open_neox(folder / f"{name.rsplit('_', 2)[0]}_pp0_tp1/ckpt", vocab_size=500)
    sharded = open_neox(folder / name / "ckpt", vocab_size=500)
    assert dataclasses.replace(sharded.config, qk_norm_groups=1) == single.config
    for tensor in single.tensors:
        # the golden checkpoints split each row-parallel bias 0.75 to 0.25, which rounds
        torch.testing.assert_close(sharded.tensors[tensor], single.tensors[tensor], rtol=1e-6, atol=1e-7)


def test_use_bias_in_norms_is_read_from_the_tensors(golden: Path) -> None:
    """The original writes norm biases whatever its use_bias_in_norms says."""
    path = golden / "model/ckpts/pythia_pp0_tp1/ckpt"
    legacy = open_neox(path, vocab_size=500, overrides=["use_bias_in_norms=false"])
    assert legacy.config.norm_bias
    assert "layers.0.attn_norm.bias" in legacy.tensors


def test_damaged_checkpoints_are_refused(golden: Path, tmp_path: Path) -> None:
    """A lost file, a lost rank, a configuration of another model: said before anything is read."""
    source = golden / "model/ckpts/pythia_pp1_tp2/ckpt/global_step0"
    for lost in ("layer_03-model_01-model_states.pt", "layer_05-model_00-model_states.pt"):
        copy = tmp_path / lost
        shutil.copytree(source, copy)
        (copy / lost).unlink()
        with pytest.raises(DataError):
            open_neox(copy, vocab_size=500)
    for override in ("num_layers=3", "hidden_size=128", "activation=swiglu", "use_bias_in_mlp=false"):
        with pytest.raises(NeoxError):
            open_neox(source, vocab_size=500, overrides=[override])
    with pytest.raises(DataError, match="600 ids"):
        open_neox(source, vocab_size=600)


def test_old_llama_names(golden: Path, tmp_path: Path) -> None:
    """w1 is the gate, w3 the up projection, w2 the down projection; the same model under today's names."""
    source = golden / "model/ckpts/llama_pp0_tp1/ckpt/global_step0"
    modern = open_neox(source, vocab_size=500)
    state = TorchFile(source / "mp_rank_00_model_states.pt").read()["module"]
    module = {}
    for name, tensor in state.items():
        value = tensor.load().clone()
        if name.endswith("mlp.linear1.weight"):
            up, gate = value.chunk(2)
            module[name.replace("linear1", "w3")], module[name.replace("linear1", "w1")] = up.clone(), gate.clone()
        else:
            module[name.replace("linear2", "w2")] = value
    torch.save({"module": module, "iteration": 0}, tmp_path / "mp_rank_00_model_states.pt")
    old = open_neox(tmp_path, config=[source / "configs/config.yml"], vocab_size=500)
    assert all(torch.equal(old.tensors[name], modern.tensors[name]) for name in modern.tensors)


def test_older_grouped_query_layout(golden: Path) -> None:
    """Before November 2024 each query head carried its share of key and value: undone with qkv_layout=heads."""
    path = golden / "model/ckpts/llama_gqa_pp0_tp1/ckpt"
    new = open_neox(path, vocab_size=500)
    q, k, v = new.tensors["layers.0.attn.qkv.weight"].split(new.config.qkv_sizes)
    heads = new.config.num_heads
    old = torch.cat([part.unflatten(0, (heads, -1)) for part in (q, k, v)], 1).flatten(0, 1)
    files = new.files
    shards = dict(files.shards)
    spec = shards[2, "attention.query_key_value.weight"][0]
    shards[2, "attention.query_key_value.weight"] = (dataclasses.replace(spec, load=lambda: old),)
    merged = merge(shards, new.config, qkv_layout="heads")
    assert torch.equal(merged["layers.0.attn.qkv.weight"].load(), new.tensors["layers.0.attn.qkv.weight"])


def test_load_model_reads_the_slim_release_in_place(golden: Path) -> None:
    folder = golden / "model/slim20b"
    wanted = np.load(folder / "logits_fp32_exact_inv_freq.npy")
    ids = torch.from_numpy(np.load(golden / "model/tokens.npy"))[:, : wanted.shape[1]]
    with torch.inference_mode():
        logits = libneox.load_model(folder, dtype=torch.float32)(ids).numpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


def test_load_model_runs_no_code_of_a_slim_release(golden: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "slim"
    shutil.copytree(golden / "model/slim20b", folder, copy_function=shutil.copyfile)
    torch.save({"weight": Hostile()}, min(folder.glob("global_step*/layer_*")))
    with pytest.raises(UnsafeInput):
        libneox.load_model(folder)
    assert not (tmp_path / "ran").exists()
