# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing changes no number, keeps less, and the policy that is chosen fits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from libneox.config import load_config
from libneox.errors import UsageError
from libneox.model import Transformer, init_weights
from neox_train import recompute

SHAPE: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "max_position_embeddings": 16,
    "pos_emb": "rotary", "gpt_j_residual": True, "train_batch_size": 2, "train_iters": 10, "vocab_size": 50,
    "hidden_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip


def config_of(**keys: Any) -> Any:
    return load_config([SHAPE | keys])


class Counting(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def gradients(policy: recompute.Policy, every: int = 1, **keys: Any) -> tuple[list[torch.Tensor], Counter[str]]:
    """Of all parameters, and the operators of the backward pass."""
    model = init_weights(Transformer(config_of(**keys).model_config(50)), 0).train()
    recompute.recompute_blocks(model, every, policy)
    torch.manual_seed(1)
    hidden = model.hidden(torch.arange(32).view(2, 16))
    with Counting() as counting:
        hidden.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counting.calls


@pytest.mark.parametrize(("policy", "every"), [("selective", 1), ("full", 1), ("full", 3)])
def test_changes_no_number(policy: recompute.Policy, every: int) -> None:
    for expected, found in zip(gradients("none")[0], gradients(policy, every)[0], strict=True):
        assert torch.equal(expected, found)


def test_selective_repeats_no_product() -> None:
    keys = {"attention_dropout": 0.0}
    calls = {policy: gradients(policy, **keys)[1] for policy in ("none", "selective", "full")}
    products = {policy: found["mm"] + found["addmm"] for policy, found in calls.items()}
    assert products["selective"] == products["none"]
    assert products["full"] == products["none"] + 4 * 4  # qkv, out, up, down
    assert calls["selective"]["gelu"] == calls["full"]["gelu"] == 4


def test_selective_works_block_by_block() -> None:
    with pytest.raises(UsageError, match="checkpoint_num_layers"):
        gradients("selective", 2)


def test_what_the_configuration_says() -> None:
    for keys, expected in (
        ({}, "none"),
        ({"checkpoint_activations": True}, "full"),
        ({"checkpoint_activations": True, "checkpoint_policy": "none"}, "none"),
        ({"checkpoint_policy": "selective"}, "selective"),
    ):
        config = config_of(**keys)
        assert recompute.policy_of(config) == expected
        model, cpu = config.model_config(50), torch.device("cpu")
        assert recompute.choose(config, model, torch.float32, cpu, world=1, compiled=False) == expected


def test_chosen_by_memory() -> None:
    kept: dict[recompute.Policy, int] = {"none": 100, "selective": 40, "full": 10}
    for room, expected in ((500, "none"), (499, "selective"), (260, "selective"), (259, "full"), (-5, "full")):
        assert recompute.first_that_fits(room, 4, kept) == expected
    assert recompute.first_that_fits(499, 4, kept, selective=False) == "full"


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the memory of a GPU given, and its block measured here."""
    config = config_of()
    model = config.model_config(50)
    kept = recompute.bytes_kept(model, 2, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(recompute, "bytes_kept", lambda *args: kept)

    def choice(free: int, **keys: Any) -> str:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        gpu = torch.device("cuda")
        return recompute.choose(config_of(**keys), model, torch.float32, gpu, world=1, compiled=False)

    assert choice(1 << 40) == "none"
    assert choice(0) == "full"
    assert choice(0, checkpoint_policy="none") == "none"


def test_bytes_kept() -> None:
    model = config_of(hidden_dropout=0.0, attention_dropout=0.0).model_config(50)
    kept = recompute.bytes_kept(model, 2, torch.float32, torch.device("cpu"))
    tokens, width = 2 * 16, 32
    assert kept["full"] == tokens * width * 4
    assert kept["full"] < kept["selective"] < kept["none"]
    # norms' inputs and outputs, qkv and its rotated copies, attention, the MLP before and after its activation
    assert 10 * kept["full"] < kept["none"] < 40 * kept["full"]
    half = recompute.bytes_kept(model, 1, torch.bfloat16, torch.device("cpu"))
    assert half["none"] < kept["none"] / 3
