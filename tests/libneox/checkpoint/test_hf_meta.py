# SPDX-License-Identifier: Apache-2.0
"""Raw Llama and Mistral files: the same model as its Hugging Face form, whose rows stand in the other order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox.checkpoint.hf.meta import interleaved_to_halves, open_meta
from libneox.checkpoint.lazy import LazyTensors
from libneox.checkpoint.load import build_model
from libneox.errors import DataError

LAYERS, DIM, HEADS, KV_HEADS, FFN, VOCABULARY = 2, 32, 4, 2, 48, 96


def raw_weights() -> dict[str, torch.Tensor]:
    """Random weights under Meta's names, rotary pairs interleaved."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    kv = KV_HEADS * DIM // HEADS
    found = {
        "tok_embeddings.weight": noise(VOCABULARY, DIM),
        "norm.weight": noise(DIM) + 1,
        "output.weight": noise(VOCABULARY, DIM),
        "rope.freqs": torch.ones(4),
    }
    for i in range(LAYERS):
        for name, shape in {
            "attention.wq": (DIM, DIM),
            "attention.wk": (kv, DIM),
            "attention.wv": (kv, DIM),
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (FFN, DIM),
            "feed_forward.w2": (DIM, FFN),
            "feed_forward.w3": (FFN, DIM),
        }.items():
            found[f"layers.{i}.{name}.weight"] = noise(*shape)
        found[f"layers.{i}.attention_norm.weight"] = noise(DIM) + 1
        found[f"layers.{i}.ffn_norm.weight"] = noise(DIM) + 1
    return found


def save(folder: Path, weights: dict[str, torch.Tensor], files: int, embedding_dim: int, **params: Any) -> Path:
    columns = ("attention.wo.weight", "feed_forward.w2.weight")
    for rank in range(files):
        piece = {}
        for name, tensor in weights.items():
            dim = embedding_dim if name.startswith("tok_") else 1 if name.endswith(columns) else 0
            whole = "norm" in name or name == "rope.freqs"
            piece[name] = tensor if whole else tensor.chunk(files, dim)[rank].clone()
        torch.save(piece, folder / f"consolidated.{rank:02d}.pth")
    base = {
        "dim": DIM,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(base | params))
    return folder


def meta_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The published forward pass: neighbouring pairs are complex numbers, turned by e^(i * position * frequency)."""
    head = DIM // HEADS
    x = weights["tok_embeddings.weight"][ids]
    length = ids.shape[1]
    angles = torch.outer(torch.arange(length).float(), 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rms(value: torch.Tensor, name: str) -> torch.Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5) * weights[name]

    def rotate(value: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for i in range(LAYERS):
        w = {name: weights[f"layers.{i}.{name}.weight"] for name in ("attention.wq", "attention.wk", "attention.wv")}
        h = rms(x, f"layers.{i}.attention_norm.weight")
        q, k, v = ((h @ matrix.T).unflatten(-1, (-1, head)) for matrix in w.values())
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 2) for part in (k, v))
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / head**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
        mixed = torch.einsum("bnqk,bknh->bqnh", scores, v).flatten(-2)
        x = x + mixed @ weights[f"layers.{i}.attention.wo.weight"].T
        h = rms(x, f"layers.{i}.ffn_norm.weight")
        w1, w2, w3 = (weights[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return rms(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize(("files", "embedding_dim"), [(1, 0), (2, 1), (2, 0)], ids=["one", "llama2", "llama3"])
def test_logits_are_those_of_the_published_forward_pass(tmp_path: Path, files: int, embedding_dim: int) -> None:
    weights = raw_weights()
    tensors, config = open_meta(save(tmp_path, weights, files, embedding_dim), seq_length=64)
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    model = build_model(config, LazyTensors(tensors), source=tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), meta_logits(weights, ids), rtol=0, atol=2e-5)


def test_rows_move_from_neighbours_to_halves() -> None:
    rows = torch.arange(8.0).unsqueeze(1)
    assert interleaved_to_halves(rows, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_generations_differ_in_length_and_rotary(tmp_path: Path) -> None:
    weights = raw_weights()
    assert open_meta(save(tmp_path, weights, 1, 0))[1].seq_length == 4096
    assert open_meta(save(tmp_path, weights, 1, 0, norm_eps=1e-6))[1].seq_length == 2048
    mistral = open_meta(save(tmp_path, weights, 1, 0, hidden_dim=FFN, sliding_window=16))[1]
    assert (mistral.seq_length, mistral.sliding_window) == (32768, 16)
    scaled = open_meta(save(tmp_path, weights, 1, 0, use_scaled_rope=True, rope_theta=500000.0))[1]
    assert scaled.rope_scaling is not None
    assert scaled.rope_scaling.factor == 8.0
    assert scaled.rotary_base == 500000.0


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, raw_weights(), 2, 1)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(DataError):
        open_meta(tmp_path)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": "4"}, "n_heads"),
        ({"dim": 32.0}, "dim"),
        ({"n_layers": 10**9}, "1000000000 layers"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight"),
        ({"norm_eps": None}, "norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
    ],
)
def test_params_that_do_not_fit(tmp_path: Path, params: dict[str, Any], word: str) -> None:
    save(tmp_path, raw_weights(), 1, 0, **params)
    with pytest.raises(DataError, match=re.escape(word)):
        open_meta(tmp_path)


@pytest.mark.parametrize("name", ["norm.weight", "output.weight", "layers.1.ffn_norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = raw_weights()
    del weights[name]
    with pytest.raises(DataError, match=re.escape(name)):
        open_meta(save(tmp_path, weights, 1, 0))


def test_a_vector_for_a_matrix_is_bad_data(tmp_path: Path) -> None:
    weights = raw_weights() | {"output.weight": torch.tensor(1.0)}
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": DIM, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}))
    with pytest.raises(DataError, match="dimensions"):
        open_meta(tmp_path)
