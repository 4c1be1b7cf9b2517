# SPDX-License-Identifier: Apache-2.0
"""The dry run's activation memory against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest

from libneox.config import load_config
from libneox.config.estimate import dry_run

BASE = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "seq_length": 512,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
    "padded_vocab_size": 1024,
    "precision": "fp32",
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpt_j_residual": False},
        {"num_kv_heads": 2},
        {"activation": "swiglu", "bias_gelu_fusion": False, "ffn_hidden_size": 512, "norm": "rmsnorm"},
        {"pos_emb": "learned"},
    ],
    ids=["pythia", "sequential", "grouped", "llama", "learned"],
)
def test_activations_are_within_a_fifth_of_what_autograd_keeps(changes: dict[str, Any]) -> None:
    import torch

    from libneox.model import Transformer, init_weights
    from libneox.model.loss import linear_cross_entropy

    config = load_config(["pythia/70M", BASE | changes])
    model = Transformer(config.model_config())
    init_weights(model, 1)
    ids = torch.randint(0, 1000, (2, 512), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor is held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_cross_entropy(model.hidden(ids), model.head_weight, ids)
    measured = sum(size for size, _ in kept.values())
    estimated = dry_run(config, world_size=1)["memory_per_rank"][0]["activations"]
    assert 0.8 < measured / estimated < 1.2, f"{measured / 1e6:.1f} MB kept, {estimated / 1e6:.1f} MB estimated"
