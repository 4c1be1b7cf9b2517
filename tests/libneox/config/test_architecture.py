# SPDX-License-Identifier: Apache-2.0
"""From keys to the resolved model (C-06), and the legacy arithmetic of MLP widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libneox.config import NeoxConfig, load_config
from libneox.config.architecture import legacy_widths
from libneox.config.support import check_supported
from libneox.errors import UsageError

Load = Callable[..., NeoxConfig]
Error = Callable[..., str]


@pytest.mark.parametrize(
    ("base", "multiple", "gated", "widths"),
    [
        (16384, 1, False, (16384, 16384)),
        (16384, 256, True, (11264, 5632)),
        (32768, 256, True, (22016, 11008)),
        (14336, 1, True, (9558, 4778)),
        (14336, 14336, True, (28672, 14336)),
        (43008, 1, True, (28672, 14336)),
    ],
)
def test_legacy_widths(base: int, multiple: int, gated: bool, widths: tuple[int, int]) -> None:
    assert legacy_widths(base, multiple, gated) == widths


def test_gated_width_is_reported(load_text: Load) -> None:
    config = load_text("activation: swiglu\nintermediate_size: 384\nmlp_multiple_of: 16\n", shape=True)
    assert config.model_config(500).ffn_size == 128
    assert "true width 128" in " ".join(config.warnings)
    assert not load_text("activation: swiglu\nffn_hidden_size: 128\n", shape=True).warnings


def test_widths_that_do_not_fit_are_refused(error_of: Error) -> None:
    message = error_of("activation: swiglu\nintermediate_size: 14336\n", shape=True)
    assert "c.yml:6: intermediate_size: " in message
    assert "9558 rows and a second of 4778" in message
    assert "set ffn_hidden_size to the true width" in message


@pytest.mark.parametrize(
    ("vocab", "divisor", "tensor", "padded"),
    [
        (50257, 128, 1, 50304),
        (50277, 128, 2, 50432),
        (50277, 128, 4, 50688),
        (50277, 128, 8, 51200),
        (32000, 1, 8, 32000),
    ],
)
def test_vocabulary_padding(vocab: int, divisor: int, tensor: int, padded: int) -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 64}
    config = load_config([shape | {"make_vocab_size_divisible_by": divisor, "model_parallel_size": tensor}])
    assert config.model_config(vocab).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("num_kv_heads: 1\n", "num_kv_heads: 1 heads cannot be split over model_parallel_size 2"),
        ("ffn_hidden_size: 99\n", "ffn_hidden_size: an MLP of width 99 cannot be split over model_parallel_size 2"),
        ("padded_vocab_size: 511\n", "padded_vocab_size: 511 rows cannot be split over model_parallel_size 2"),
        ("sequence_parallel: true\nseq_length: 33\n", "sequence_parallel: 33 positions cannot be split"),
        ("use_qk_layernorm: true\nqk_norm_groups: 1\n", "2 ranks cannot hold whole QK-norm groups"),
    ],
)
def test_what_tensor_parallel_ranks_cannot_share_is_refused(error_of: Error, lines: str, message: str) -> None:
    text = "model_parallel_size: 2\nvocab_size: 500\n" + lines
    assert message in error_of(text, shape=True)


def test_padded_vocabulary_is_kept() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 64}
    config = load_config([shape | {"padded_vocab_size": 510, "model_parallel_size": 2}])
    assert config.model_config(500).padded_vocab_size == 510
    with pytest.raises(UsageError, match="510 rows are too few for a vocabulary of 511; --set padded_vocab_size=null"):
        config.model_config(511)
    with pytest.raises(UsageError, match="510 rows cannot be split over model_parallel_size 4"):
        config.replace(model_parallel_size=4)
    with pytest.raises(UsageError, match="vocab_size: is unknown; name a tokenizer"):
        load_config([shape]).model_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_size: 63", "num_attention_heads: 4 does not divide hidden_size 63"),
        ("seq_length: 65", "seq_length: is 65, more than max_position_embeddings 64"),
        ("num_kv_heads: 3", "num_kv_heads: 3 does not divide num_attention_heads 4"),
        ("num_kv_heads: 1\nmodel_parallel_size: 2", "num_kv_heads: 1 heads cannot be split over model_parallel_size 2"),
        ("pipe_parallel_size: 3", "3 stages need 3 layers; num_layers is 2"),
        ("attention_config: [[[flsh], 2]]", "'flsh' is no kind of attention; did you mean flash?"),
        ("attention_config: [[[flash], 3]]", "gives 3 layers but num_layers is 2"),
        ("attention_config: [flash, 2, 3]", "is not of the form"),
        ("pos_emb: rotary\nrotary_pct: 0.05", "rotates 0 of 16 dimensions"),
        ("rope_scaling: {type: linear}", "rope_scaling: needs factor"),
        ("rope_scaling: {type: dynamic, factor: 2}", "rope_scaling.type: expected one of linear, ntk, yarn, llama3"),
        ("rope_scaling: {type: yarn, factor: 2}", "yarn needs original_max_position_embeddings"),
        ("use_qk_layernorm: true\nnum_kv_heads: 2", "needs as many keys as queries; use qk_norm: head"),
        ("ffn_hidden_size: 64\nintermediate_size: 64", "intermediate_size: contradicts ffn_hidden_size"),
        ("ffn_hidden_size: 65\nmlp_multiple_of: 2", "65 is no multiple of mlp_multiple_of 2"),
        ("qk_norm: joint\nqk_norm_groups: 3", "3 groups do not divide num_attention_heads 4"),
        ("qk_norm: joint\nqk_norm_groups: 1\nmodel_parallel_size: 2", "cannot hold whole QK-norm groups"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    shape = {"num_layers": "2", "hidden_size": "64", "num_attention_heads": "4", "max_position_embeddings": "64"}
    own = {line.split(":")[0] for line in text.splitlines()}
    lines = [f"{name}: {value}" for name, value in shape.items() if name not in own]
    (tmp_path / "c.yml").write_text("\n".join([*lines, text]))
    with pytest.raises(UsageError) as caught:
        load_config([tmp_path / "c.yml"])
    assert message in str(caught.value)


def test_required_keys_are_named_together(error_of: Error) -> None:
    message = error_of("num_layers: 2\n")
    assert all(f"{name}: is required" in message for name in ("hidden_size", "num_attention_heads"))


def fields(load_text: Load, text: str) -> dict[str, Any]:
    model = load_text(text, shape=True).model_config(500)
    return {name: getattr(model, name) for name in model.__slots__}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"tie_embeddings": True, "pos_emb": "learned", "residual": "sequential", "activation": "gelu"}),
        ("bias_gelu_fusion: true", {"activation": "gelu_tanh"}),
        ("gpt_j_residual: true", {"residual": "parallel"}),
        ("gpt_j_residual: true\ngpt_j_tied: true", {"residual": "parallel_tied"}),
        ("norm: rmsnorm\nrms_norm_epsilon: 1e-6", {"norm": "rmsnorm", "norm_eps": 1e-6}),
        ("norm: scalenorm", {"norm_eps": 1e-8}),
        ("sliding_window_width: 16", {"sliding_window": 17}),
        ("use_qk_layernorm: true\nmodel_parallel_size: 2", {"qk_norm": "joint", "qk_norm_groups": 2}),
        ("use_bias_in_attn_linear: false\nuse_bias_in_qkv: true", {"qkv_bias": True, "attn_out_bias": False}),
        ("head_dim: 32", {"head_dim": 32}),
        ("expansion_factor: 2", {"ffn_size": 128}),
        ("mup_attn_temp: 4", {"mup_attn_mult": 0.25}),
        ("use_bias_in_norms: false", {"norm_bias": False}),
        ("attention_config: [[[global, flash], all]]", {"num_layers": 2}),
    ],
)
def test_keys_reach_the_model(load_text: Load, text: str, expected: dict[str, Any]) -> None:
    found = fields(load_text, text)
    assert {name: found[name] for name in expected} == expected


def test_golden_configs_load_unchanged(golden: Path) -> None:
    paths = sorted((golden / "model").rglob("*.yml"))
    assert len(paths) > 50
    widths = {}
    for path in paths:
        config = load_config([path])
        model = config.model_config(500)
        assert load_config([config.to_dict()]) == config
        if path.parent.parent.name == "train" and config.tensor_parallel == config.pipeline_stages == 1:
            check_supported(config, world_size=2)
        widths[path.parent.name] = (model.ffn_size, model.padded_vocab_size)
    assert widths["llama_pp0_tp1"] == (128, 512)
    assert widths["x_padvocab_pp0_tp1"] == (128, 768)
    assert widths["x_geglu_pp0_tp1"] == (48, 512)
