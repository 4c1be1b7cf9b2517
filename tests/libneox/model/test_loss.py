# SPDX-License-Identifier: Apache-2.0
"""The chunked loss equals plain cross-entropy in value and gradients, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from libneox.model import loss as loss_module
from libneox.model import products
from libneox.model.loss import equal_parts, linear_cross_entropy, token_losses


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8).to(dtype).requires_grad_()
    weight = torch.randn(11, 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 7))
    labels[1, 2:4] = -100
    return hidden, weight, labels, torch.rand(3, 7)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, z_loss: float
) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    each = each + z_loss * logits.logsumexp(-1).square().flatten()
    mask = (mask * (labels != -100)).flatten()
    return (each * mask).sum() / mask.sum()


def limit(monkeypatch: pytest.MonkeyPatch, rows: int, block: int = 100) -> None:
    """Chunks of so many float32 rows, blocks of so many."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cuda": rows * 4 * 11})
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", {"cuda": block * 4 * 11})


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "block"), [(1, 1), (4, 100), (4, 2), (100, 100), (100, 4)])
def test_value_and_gradients(rows: int, block: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, rows, block)
    hidden, weight, labels, mask = inputs()
    expected = plain(hidden, weight, labels, mask, z_loss)
    expected_grads = torch.autograd.grad(expected * 3, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, mask, z_loss=z_loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (hidden, weight)), expected_grads)


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**20])
def test_small_gradients_survive_in_half_precision(scale: float) -> None:
    """Those of the tokens that were not meant are far below what float16 holds, until the loss is scaled."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 16).half(), (torch.randn(8192, 16) / 16).half()
    labels = torch.randint(0, 8192, (1, 4096))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy((exact[0] @ exact[1].T)[0], labels[0]).backward()
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    (linear_cross_entropy(ours[0], ours[1], labels) * scale).backward()
    for mine, wanted in zip(ours, exact, strict=True):
        got = mine.grad.double() / scale  # type: ignore[union-attr]
        limit = 0.002 if scale > 1 else 0.2  # unscaled, the result itself is below what float16 holds
        assert (got - wanted.grad).norm() <= limit * wanted.grad.norm()  # type: ignore[union-attr,operator]


def test_gradients_of_the_frozen_are_not_made() -> None:
    hidden, weight, labels, mask = inputs()
    linear_cross_entropy(hidden, weight.detach(), labels, mask).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, mask).requires_grad


def test_nothing_to_learn_is_zero_and_not_nan() -> None:
    hidden, weight, labels, mask = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), mask)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (4, 2), (100, 100)])
def test_token_losses(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, rows, block)
    hidden, weight, labels, mask = inputs()
    each = token_losses(hidden, weight, labels)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(each, expected)
    grads = torch.autograd.grad((each * mask).sum(), (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad((expected * mask).sum(), (hidden, weight)))


def test_bfloat16_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 2)
    monkeypatch.setattr(loss_module, "SUM_ROWS", 4)
    hidden, weight, labels, mask = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, mask)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (hidden, weight))
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = plain(*exact, labels, mask, 0.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.float(), wanted, atol=5e-3, rtol=5e-2)


def test_same_bits_twice() -> None:
    hidden, weight, labels, mask = inputs()
    grads = [torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, mask), weight)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_parts_are_bounded_and_level() -> None:
    sizes = [part.stop - part.start for part in equal_parts(16384, 300)]
    assert sum(sizes) == 16384
    assert max(sizes) <= 300
    assert len(set(sizes[:-1])) == 1
    assert sizes[0] - sizes[-1] < len(sizes)
    assert [part.stop for part in equal_parts(3, 0)] == [1, 2, 3]
    assert list(equal_parts(0, 5)) == []


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
def test_onednn_products_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    hidden, weight, labels, mask = inputs()
    expected = linear_cross_entropy(hidden, weight, labels, mask)
    grads = torch.autograd.grad(expected, (hidden, weight))
    try:
        assert products.use_onednn(torch.float32)
        loss = linear_cross_entropy(hidden, weight, labels, mask)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), grads)
    finally:
        assert not products.use_onednn()
