# SPDX-License-Identifier: Apache-2.0
"""Documents packed into sequences: their bounds, and attention that is kept within them by a kernel without a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from libneox.model import Transformer, attention
from libneox.model.attention import Visibility, make_pattern
from libneox.model.documents import LEAST_BOUNDS, cu_seqlens_of, document_numbers, document_starts, restarted_positions

Build = Callable[..., Transformer]
IDS = torch.tensor([[5, 0, 0, 7, 8, 9], [0, 4, 4, 4, 4, 0]])  # 0 ends a document


def test_bounds_numbers_and_positions() -> None:
    starts = document_starts(IDS, eod_id=0)
    assert starts.int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    bounds = cu_seqlens_of(starts)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 2, 3, 6, 7] + [12] * (LEAST_BOUNDS - 5)
    assert document_numbers(bounds, 2, 6).tolist() == [[1, 1, 2, 3, 3, 3], [4, 5, 5, 5, 5, 5]]
    assert restarted_positions(starts).tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("documents", "size"), [(1, 64), (63, 64), (64, 128), (100, 128), (128, 256)])
def test_bounds_come_in_few_sizes_and_end_with_the_last_position(documents: int, size: int) -> None:
    starts = torch.zeros(1, 200, dtype=torch.bool)
    starts[:, :documents] = True
    bounds = cu_seqlens_of(starts)
    assert len(bounds) == size
    assert bounds[documents:].eq(200).all()


def per_document(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch documents of varlen_attn, one sequence after the other: [positions, heads, H] in and out."""
    assert cu_q.equal(cu_k)
    assert window_size[1] == 0, "causal"
    parts = []
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        assert end - begin <= max_q == max_k
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        inputs = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*inputs, seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("keys", [{}, {"num_kv_heads": 1, "norm": "rmsnorm"}, {"sliding_window": 3}])
def test_kernel_without_a_mask_equals_the_mask(
    keys: dict[str, Any], tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**keys)
    ids = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = ids[0, 4] = ids[1, 11] = 0
    bounds = cu_seqlens_of(document_starts(ids, eod_id=0))

    def outcome() -> list[Tensor]:
        logits = model(ids, cu_seqlens_E=bounds)
        return [logits, *torch.autograd.grad(logits.square().mean(), model.parameters())]

    masked, calls = outcome(), []

    def kernel(*tensors: Any, **more: Any) -> Tensor:
        calls.append(1)
        return per_document(*tensors, **more, enable_gqa=True)

    monkeypatch.setattr(attention, "_takes_varlen", lambda seen, *_: seen.cu_seqlens_E is not None)
    monkeypatch.setattr(attention, "_varlen_function", lambda: kernel)
    for mine, expected in zip(outcome(), masked, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-5)
    assert len(calls) == model.config.num_layers


def test_who_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has it: a recent GPU in half precision, and nothing that the kernel cannot do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bounds, gpu = cu_seqlens_of(document_starts(IDS, eod_id=0)), torch.device("cuda")
    seen = Visibility(6, 6, cu_seqlens_E=bounds, batch=2, head_dim=64)

    def takes(seen: Visibility, device: torch.device = gpu, dtype: torch.dtype = torch.bfloat16) -> bool:
        return attention._takes_varlen(seen, device, dtype)

    assert takes(seen)
    assert make_pattern("sdpa", seen._replace(window=4), device=gpu, dtype=torch.float16) == attention.Pattern(
        "varlen", window=4, cu_seqlens_E=bounds, kernel=attention._varlen_function()
    )
    assert not takes(seen, torch.device("cpu"))
    assert not takes(seen, dtype=torch.float32)
    slopes = torch.ones(2)
    for other in ({"cu_seqlens_E": None}, {"slopes_N": slopes}, {"dropout": 0.1}, {"head_dim": 512}, {"head_dim": 20}):
        assert not takes(seen._replace(**other)), other
    attention.use_varlen(False)
    try:
        assert not takes(seen)
    finally:
        attention.use_varlen(True)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"num_kv_heads": 1}, {"sliding_window": 33}])
def test_torch_s_kernel_equals_the_mask(keys: dict[str, Any], tiny_model: Build) -> None:
    model = tiny_model(hidden_size=128, head_dim=32, max_position_embeddings=256, **keys).to("cuda", torch.bfloat16)
    ids = torch.randint(1, 90, (2, 256), generator=torch.Generator().manual_seed(0))
    ids[0, 100] = ids[1, 7] = ids[1, 200] = 0
    bounds, ids = cu_seqlens_of(document_starts(ids, eod_id=0)).cuda(), ids.cuda()
    found = []
    for on in (True, False):
        attention.use_varlen(on)
        logits = model(ids, cu_seqlens_E=bounds)
        found.append([logits, *torch.autograd.grad(logits.square().mean(), model.parameters())])
    attention.use_varlen(True)
    for mine, masked in zip(*found, strict=True):
        assert (mine - masked).float().norm() <= 0.03 * masked.float().norm() + 1e-6
