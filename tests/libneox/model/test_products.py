# SPDX-License-Identifier: Apache-2.0
"""oneDNN's products equal torch's, in value and gradients, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from libneox.model import products

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    assert torch.float32 in products.use_onednn(torch.float32, torch.bfloat16, torch.float64)
    yield
    assert not products.use_onednn()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_linear(shape: tuple[int, ...], with_bias: bool, onednn: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 24, requires_grad=True)
    bias = torch.randn(16, requires_grad=True) if with_bias else None
    wanted = [t for t in (x, weight, bias) if t is not None]
    y, expected = products.linear(x, weight, bias), F.linear(x, weight, bias)
    assert "neox" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y).transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, gradient), torch.autograd.grad(expected, wanted, gradient)
    )


def test_product_of_views(onednn: None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 24), torch.randn(24, 16)
    torch.testing.assert_close(products.product(a, b.T), a @ b)
    torch.testing.assert_close(products.product(b.T, a), b.T @ a.T)


@pytest.mark.skipif(not products.has_onednn(torch.bfloat16), reason="no bfloat16 in this CPU")
def test_bfloat16(onednn: None) -> None:
    """As torch's: products of the same factors, rounded once."""
    torch.manual_seed(0)
    x, weight, bias, gradient = (torch.randn(s).bfloat16() for s in ((5, 24), (16, 24), (16,), (5, 16)))
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    y, expected = products.linear(x, weight, bias), F.linear(x, weight, bias)
    assert "neox" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, gradient), torch.autograd.grad(expected, wanted, gradient)
    )


def test_other_dtypes_and_small_matrices_stay_with_torch(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 24), torch.randn(16, 24)
    assert not products.has_onednn(torch.float64)
    assert products.linear(x.double(), weight.double()).dtype == torch.double
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1 << 16)
    x = x.requires_grad_()
    assert "neox" not in type(products.linear(x, weight).grad_fn).__name__


def test_operator_is_well_formed(onednn: None) -> None:
    """Fake kernel, gradients and schema agree with what the operator does: what torch.compile relies on."""
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(16, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.neox.linear, (x, weight, torch.randn(16, requires_grad=True)))
    torch.library.opcheck(torch.ops.neox.linear, (x, weight, None))
