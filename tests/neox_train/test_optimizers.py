# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, and the update rules written here against their formulas."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from libneox.config import load_config
from libneox.errors import UsageError
from neox_train.optimizers import build_optimizer, decay_groups, lr_scale, set_lr
from neox_train.own_optimizers import SM3, Lion, MadGradWd

NAMES = {
    "embed.weight": True,
    "layers.0.attn_norm.weight": False,
    "layers.0.attn_norm.bias": False,
    "layers.0.attn.qkv.weight": True,
    "layers.0.attn.qkv.bias": False,
    "layers.0.attn.qk_norm.weight": False,
    "layers.0.attn.q_norm.weight": False,
    "layers.0.mlp.down.weight": True,
    "final_norm.weight": False,
    "head.weight": True,
}


def test_what_decays() -> None:
    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in NAMES]
    groups = decay_groups(0.1, named)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    assert [name for name, decays in NAMES.items() if decays] == groups[0]["names"]
    assert len(decay_groups(0.0, named)) == 1


def test_mup_divides_the_rate_of_hidden_matrices() -> None:
    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in NAMES]
    groups = decay_groups(0.1, named, rates=functools.partial(lr_scale, width_mult=4.0))
    slow = [name for group in groups if group["lr_scale"] == 0.25 for name in group["names"]]
    assert [group.get("weight_decay") for group in groups] == [None, 0.4, 0.0]
    assert slow == ["layers.0.attn.qkv.weight", "layers.0.mlp.down.weight"]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_lr(optimizer, 0.8)
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 0.2}


def test_mup_of_sgd_speeds_up_what_is_wide_in_one_dimension() -> None:
    fast = {name for name in NAMES if lr_scale(name, width_mult=4.0, sgd=True) == 4.0}
    slow = {name for name in NAMES if lr_scale(name, width_mult=4.0, sgd=True) == 1.0}
    assert slow == {"layers.0.attn.qkv.weight", "layers.0.mlp.down.weight", "layers.0.attn.q_norm.weight"}
    assert fast == set(NAMES) - slow
    assert lr_scale("final_norm.weight", width_mult=4.0, sgd=True, scalar_norms=True) == 1.0


def test_lion() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    for gradient in ([3.0, -1.0], [-9.0, -1.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    # momentum 0.03, -0.01 after the first; the second interpolates 0.9 m + 0.1 g to -0.873, -0.109
    expected = torch.tensor([1.0, -2.0]) * 0.95 - 0.1 * torch.tensor([1.0, -1.0])
    expected = expected * 0.95 - 0.1 * torch.tensor([-1.0, -1.0])
    torch.testing.assert_close(p.data, expected)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("adam", {"lr": 0.1, "betas": [0.9, 1.5]}),
        ("sgd", {"lr": 0.1, "nesterov": True}),
        ("lion", {"lr": 0.1, "betas": [0.9, 0.99]}),
        ("adafactor", {"lr": 0.1, "eps": [None, 0.001]}),
    ],
)
def test_arguments_out_of_range_are_the_users(kind: str, params: dict[str, Any]) -> None:
    config = load_config([{"optimizer": {"type": kind, "params": params}}])
    named = [("embed.weight", torch.nn.Parameter(torch.zeros(2, 2)))]
    if kind in ("lion", "adafactor"):
        assert build_optimizer(config, named).param_groups
        return
    with pytest.raises(UsageError, match=r"optimizer\.params: .*(beta|Nesterov)"):
        build_optimizer(config, named)


def test_madgrad() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = MadGradWd([p], lr=0.1, momentum=0.5, weight_decay=0.1, eps=0.0)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    target = 1.0 - 0.2 / 0.4 ** (1 / 3)
    torch.testing.assert_close(p.data, torch.tensor([0.5 * (1 - 0.01) + 0.5 * target]))


def test_sm3_shares_accumulators_along_rows_and_columns() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = SM3([p], lr=1.0, eps=0.0)
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    torch.testing.assert_close(p.data, -torch.ones(2, 2))
    rows, columns = (optimizer.state[p][f"accumulator_{dim}"].flatten().tolist() for dim in (0, 1))
    assert (rows, columns) == ([4.0, 16.0], [9.0, 16.0])
