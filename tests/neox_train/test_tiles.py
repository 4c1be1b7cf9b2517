# SPDX-License-Identifier: Apache-2.0
"""An update in tiles is the optimiser's own step, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neox_train import tiles


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_step(kind: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 64)
    torch.manual_seed(0)
    values = [torch.randn(10, 13), torch.randn(5)]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
        return kind(groups, lr=0.01, weight_decay=0.1, fused=True)

    mine, reference = optimizer(ours), optimizer(theirs)
    assert tiles.takes(mine, torch.device("cpu"))
    weights = ours if dtype == torch.float32 else [p.detach().to(dtype) for p in ours]
    for coefficient in (None, torch.tensor(0.3), torch.tensor(1.0)):
        gradients = [torch.randn_like(v).to(dtype) for v in values]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.float() if coefficient is None else gradient.float() * coefficient
        reference.step()
        gradients[0] = gradients[0].T.contiguous().T  # memory in another order
        leaves = [tiles.Leaf(*each) for each in zip(ours, weights, gradients, strict=True)]
        tiles.update(mine, leaves, coefficient)
        for a, b, weight in zip(ours, theirs, weights, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(weight, a.to(dtype))
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine.state[a][key], reference.state[b][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 64)
    gradient = torch.randn(13, 10, generator=torch.Generator().manual_seed(0)).to(dtype).T
    torch.testing.assert_close(tiles.norm(gradient), torch.linalg.vector_norm(gradient.double()).float())


def test_takes_only_what_it_does_alike() -> None:
    parameter = [nn.Parameter(torch.zeros(2))]
    cpu = torch.device("cpu")
    assert not tiles.takes(torch.optim.SGD(parameter, lr=0.1), cpu)
    assert not tiles.takes(torch.optim.AdamW(parameter), cpu)
    assert not tiles.takes(torch.optim.AdamW(parameter, fused=True, amsgrad=True), cpu)
    assert not tiles.takes(torch.optim.AdamW(parameter, fused=True), torch.device("cuda"))
