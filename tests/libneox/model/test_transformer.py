# SPDX-License-Identifier: Apache-2.0
"""The model: names, cache, padding, documents, windows, attention backends, dropout, shards, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from libneox.errors import UsageError
from libneox.model import KVCache, Transformer, init_weights
from libneox.model.attention import Visibility, make_pattern
from libneox.model.documents import cu_seqlens_of, document_starts, restarted_positions
from libneox.model.transformer import activate
from libneox.model_config import GATED, PLAIN

Build = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids_of(model: Transformer, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def test_parameters_are_those_of_the_config(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == model.config.parameter_shapes()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]  # nothing else is stored


@pytest.mark.parametrize("whole", [False, True])
def test_cache_equals_no_cache(whole: bool, shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    ids = ids_of(model, 2, 20)
    cache = KVCache(model.config, 2, 24, dtype=model.dtype, whole=whole)
    pieces = [model(part, cache=cache) for part in ids.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=0)
    assert cache.length == int(cache.start) == 20


def test_left_padding_changes_nothing(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    lengths, longest = [9, 4, 1], 9
    texts = [ids_of(model, 1, n + 3, seed=n) for n in lengths]
    pad = torch.tensor([longest - n for n in lengths])
    batch = torch.stack([F.pad(text[0, :n], (longest - n, 0)) for text, n in zip(texts, lengths, strict=True)])
    cache = KVCache(model.config, 3, 16, dtype=model.dtype, pad_B=pad)
    logits = [model(batch, cache=cache)[:, -1]]
    for step in range(3):
        column = torch.stack([text[0, n + step] for text, n in zip(texts, lengths, strict=True)])
        logits.append(model(column[:, None], cache=cache)[:, -1])
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        alone = model(text)[0, n - 1 :]
        torch.testing.assert_close(torch.stack([x[row] for x in logits]), alone, atol=1e-5, rtol=0)


def test_cache_truncates_and_selects(tiny_model: Build) -> None:
    model = tiny_model()
    ids = ids_of(model, 2, 10)
    cache = KVCache(model.config, 2, 12, dtype=model.dtype)
    model(ids, cache=cache)
    cache.truncate(6)
    cache.select(torch.tensor([1]))
    torch.testing.assert_close(model(ids[1:, 6:], cache=cache), model(ids)[1:, 6:], atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="12 positions"):
        model(ids[1:], cache=cache)


def test_cache_may_be_wider_than_the_model(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    ids = ids_of(model, 2, 9)
    exact, model = model(ids), model.bfloat16()
    for whole in (False, True):
        cache = KVCache(model.config, 2, 12, dtype=torch.float32, whole=whole, pad_B=torch.tensor([0, 0]))
        rough = torch.cat([model(part, cache=cache) for part in ids.split([6, 1, 2], dim=1)], dim=1)
        assert cache.keys[0].dtype == torch.float32
        assert (rough - exact).abs().max() < 0.06 * exact.abs().max()


def test_window_keeps_that_many_keys_itself_included(tiny_model: Build) -> None:
    model = tiny_model(sliding_window=3, num_layers=1)
    ids = ids_of(model, 1, 10)
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 90
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_documents_do_not_see_each_other(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    first, second = ids_of(model, 1, 6, seed=1).clamp(min=1), ids_of(model, 1, 8, seed=2).clamp(min=1)
    first[0, -1] = 0
    packed = torch.cat((first, second), dim=1)
    starts = document_starts(packed, eod_id=0)
    positions = restarted_positions(starts)
    assert positions.tolist() == [[*range(6), *range(8)]]
    logits = model(packed, cu_seqlens_E=cu_seqlens_of(starts), positions_BT=positions)
    torch.testing.assert_close(logits[:, :6], model(first), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[:, 6:], model(second), atol=1e-5, rtol=0)


def test_reference_attention_equals_sdpa(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    ids = ids_of(model, 2, 17)
    expected = model(ids)
    model.attention = "reference"
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=0)


def test_plain_causal_attention_needs_no_mask() -> None:
    device = torch.device("cpu")
    plain = [Visibility(8, 8), Visibility(1, 5, start=4), Visibility(8, 8, window=8)]
    masked = [Visibility(2, 5, start=3), Visibility(8, 8, window=7), Visibility(1, 9, start=4)]
    masks = [make_pattern("sdpa", seen, device=device, dtype=torch.float32).mask for seen in plain + masked]
    assert [mask is None for mask in masks] == [True] * 3 + [False] * 3


def test_unknown_or_missing_attention_is_refused(tiny_model: Build) -> None:
    model = tiny_model(pos_emb="rpe")
    for name, fact in (("fast", "unknown"), ("flash", "relative biases")):
        model.attention = name  # type: ignore[assignment]
        with pytest.raises(UsageError, match=fact):
            model(ids_of(model, 1, 4))


def test_bfloat16_runs_and_scores_in_float32(shape: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(**shape)
    ids = ids_of(model, 2, 12)
    exact = model(ids)
    rough = model.bfloat16()(ids)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_activations(name: str, tiny_model: Build) -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    formulas = {
        "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: max(v, 0.0),
        "softsign": lambda v: v / (1 + abs(v)),
        "swish": lambda v: v / (1 + math.exp(-v)),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "mish": lambda v: v * math.tanh(math.log1p(math.exp(v))),
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "identity": lambda v: v,
    }
    inner = GATED.get(name, name)
    expected = torch.tensor([formulas[inner](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activate(x, inner), expected)
    model = tiny_model(activation=name)
    assert model(ids_of(model, 1, 4)).isfinite().all()


def test_gate_is_the_second_half_of_up(tiny_model: Build) -> None:
    mlp = tiny_model(activation="swiglu").layers[0].mlp
    x = torch.randn(1, 3, 32)
    up, gate = mlp.up.weight.chunk(2)
    up_bias, gate_bias = mlp.up.bias.chunk(2)
    hidden = F.silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_tied"])
def test_dropout_only_in_training(residual: str, tiny_model: Build) -> None:
    model = tiny_model(hidden_dropout=0.3, attention_dropout=0.3, residual=residual)
    ids = ids_of(model, 1, 12)
    assert torch.equal(model(ids), model(ids))
    model.train()
    torch.manual_seed(0)
    first, second = model(ids), model(ids)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids), first)


def test_attention_dropout_acts_alone(tiny_model: Build) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    ids = ids_of(model, 1, 12)
    assert not torch.equal(model(ids), model(ids))


def test_query_key_layer_scaling_is_exact_arithmetic(tiny_model: Build) -> None:
    plain, scaled = tiny_model(num_layers=4), tiny_model(num_layers=4, apply_query_key_layer_scaling=True)
    ids = ids_of(plain, 1, 12)
    torch.testing.assert_close(plain(ids), scaled(ids), atol=1e-5, rtol=0)


def test_sharded_layers_add_up(tiny_model: Build) -> None:
    """Forward on a half of the heads and of the MLP: the parts of a layer's output add up to the whole."""
    model = tiny_model(num_kv_heads=2, activation="swiglu", attn_out_bias=False, mlp_bias=False)
    block, context = model.layers[1], model.context(9)
    x = torch.randn(1, 9, 32)
    parts = []
    for rank in range(2):
        half = tiny_model(num_kv_heads=2, activation="swiglu", attn_out_bias=False, mlp_bias=False).layers[1]
        for name in ("weight", "bias"):
            whole = getattr(block.attn.qkv, name)
            rows = [part.chunk(2)[rank] for part in whole.split([32, 16, 16])]
            setattr(half.attn.qkv, name, torch.nn.Parameter(torch.cat(rows)))
        half.attn.out.weight = torch.nn.Parameter(block.attn.out.weight.chunk(2, dim=1)[rank])
        up = torch.cat([part.chunk(2)[rank] for part in block.mlp.up.weight.chunk(2)])
        half.mlp.up.weight = torch.nn.Parameter(up)
        half.mlp.down.weight = torch.nn.Parameter(block.mlp.down.weight.chunk(2, dim=1)[rank])
        parts.append((half.attn(x, context), half.mlp(x)))
    torch.testing.assert_close(parts[0][0] + parts[1][0], block.attn(x, context), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[0][1] + parts[1][1], block.mlp(x), atol=1e-5, rtol=0)


def test_impossible_configs_are_refused_with_every_fault(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config(num_kv_heads=3, activation="gellu", rotary_pct=0.4, qk_norm="joint", qk_norm_groups=3)
    with pytest.raises(UsageError) as raised:
        Transformer(config)
    for fact in ("3 key/value heads", "'gellu'", "odd number", "joint QK-norm", "3 QK-norm groups"):
        assert fact in str(raised.value)


def test_mup_keeps_activations_level_over_width(tiny_config: Callable[..., Any]) -> None:
    """The coordinate check at step 0: hidden states do not grow with width, and logits do not either."""
    sizes = []
    for width in (32, 512):
        config = tiny_config(
            hidden_size=width, head_dim=width // 4, ffn_size=4 * width, use_mup=True, mup_base_hidden_size=32,
            init_method="small_init", output_layer_init_method="wang_init",
        )  # fmt: skip
        model = init_weights(Transformer(config), seed=1)
        hidden = model.embedded(ids_of(model, 4, 32))
        for block in model.layers:
            hidden = block(hidden, model.context(32))
        sizes.append((hidden.std().item(), model(ids_of(model, 4, 32)).std().item()))
    assert sizes[1][0] == pytest.approx(sizes[0][0], rel=0.25)
    assert sizes[1][1] < sizes[0][1]


@pytest.mark.slow
def test_a_block_compiles_whole(tiny_model: Build) -> None:
    model = tiny_model(residual="parallel", rotary_pct=0.25)
    ids = ids_of(model, 2, 16)
    expected = model(ids)
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pos_emb", ["alibi", "rpe"])
def test_flex_attention_equals_sdpa(pos_emb: str, tiny_model: Build) -> None:
    model = tiny_model(pos_emb=pos_emb, hidden_size=64, head_dim=16, sliding_window=90, max_position_embeddings=256)
    ids = ids_of(model, 2, 256).clamp(min=1)
    ids[:, 100] = 0
    cu_seqlens = cu_seqlens_of(document_starts(ids, eod_id=0))
    expected = model(ids, cu_seqlens_E=cu_seqlens)
    model.attention = "flex"
    torch.testing.assert_close(model(ids, cu_seqlens_E=cu_seqlens), expected, atol=1e-5, rtol=0)
