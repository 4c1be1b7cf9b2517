# SPDX-License-Identifier: Apache-2.0
"""Attention by tiles on a CPU beside plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from libneox.model import cpu_attention
from libneox.model.attention import Pattern, attend

SHAPES = [(2, 4, 4, 40), (2, 6, 2, 300), (1, 4, 1, 129), (3, 2, 2, 1)]  # B, N, K, T


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    cpu_attention.use_tiles(True)
    yield
    cpu_attention.use_tiles(False)


def inputs(batch: int, heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values as the model has them: views of one tensor [B, T, N + 2K, H]."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, 8).to(dtype)
    return [part.requires_grad_() for part in qkv.split([heads, kv_heads, kv_heads], dim=2)]


def outcome(inputs: list[Tensor], backend: str) -> list[Tensor]:
    """The mixed values and the gradients of all three."""
    q, k, v = inputs
    mixed = attend(q, k.transpose(1, 2), v.transpose(1, 2), Pattern(backend), scale=0.3)  # type: ignore[arg-type]
    torch.manual_seed(1)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, torch.randn(mixed.shape).to(mixed.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1, 1 << 19])
def test_equals_plain_arithmetic(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "TILE", tile)
    given = inputs(*shape, torch.float32)
    assert cpu_attention.takes(given[0], given[1].transpose(1, 2), 0.0)
    for ours, plain in zip(outcome(given, "sdpa"), outcome(given, "reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 1 << 19])
def test_kept_probabilities_change_nothing(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences keep them for the backward pass, longer ones make them again."""
    monkeypatch.setattr(cpu_attention, "TILE", tile)
    given = inputs(2, 6, 2, 300, dtype)
    found = []
    for short, held in ((300, 2 * 6 * (44 * 300 + 128 * (256 + 128))), (299, 0)):
        monkeypatch.setattr(cpu_attention, "SHORT", short)
        q, k, v = given
        _, *saved = cpu_attention.attention(q, k, v, 0.3).grad_fn.saved_tensors  # type: ignore[union-attr]
        assert saved[-1].numel() == held
        found.append(outcome(given, "sdpa"))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)


def unfused(inputs: list[Tensor]) -> list[Tensor]:
    """As GPT-NeoX and transformers compute it operator by operator: scores and probabilities in the queries' dtype."""
    q, k, v = (part.transpose(1, 2) for part in inputs)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    unseen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    mixed = (q @ k.mT * 0.3).masked_fill(unseen, float("-inf")).softmax(-1) @ v
    mixed = mixed.transpose(1, 2)
    torch.manual_seed(1)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, torch.randn(mixed.shape).to(mixed.dtype))]


def test_bfloat16_rounds_no_more_than_unfused_operators() -> None:
    given = inputs(2, 6, 2, 300, torch.bfloat16)
    exact = unfused([part.detach().double().requires_grad_() for part in given])

    def errors(found: list[Tensor]) -> list[float]:
        return [((a.double() - b).abs().mean() / b.abs().mean()).item() for a, b in zip(found, exact, strict=True)]

    for tiles, plain in zip(errors(outcome(given, "sdpa")), errors(unfused(given)), strict=True):
        assert 0 < tiles < 1.1 * plain


def test_takes_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else goes to torch: more keys than queries, dropout, masks, other dtypes."""
    calls: list[int] = []
    monkeypatch.setattr(cpu_attention, "attention", lambda *a: calls.append(1) or a[0])
    q, k, v = (part.detach() for part in inputs(1, 2, 2, 20, torch.float32))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()

    def run(q: Tensor = q, mask: Tensor | None = None, **more: float) -> int:
        calls.clear()
        keys = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
        attend(q, *keys, Pattern(mask=mask), scale=1.0, **more)
        return len(calls)

    assert run() == 1
    assert run(q[:, -1:]) == run(dropout=0.1) == run(q.double()) == run(mask=mask) == 0
    cpu_attention.use_tiles(False)
    assert run() == 0


def test_is_an_operator_that_compilers_understand() -> None:
    for keep in (True, False):
        torch.library.opcheck(torch.ops.neox.causal_attention, (*inputs(1, 4, 2, 10, torch.float32), 0.5, keep))
