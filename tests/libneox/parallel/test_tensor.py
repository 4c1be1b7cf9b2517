# SPDX-License-Identifier: Apache-2.0
"""Two ranks that share a model's matrices compute what one rank computes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from libneox.errors import UsageError
from libneox.model import Transformer, init_weights
from libneox.model.loss import linear_cross_entropy, token_losses
from libneox.model_config import ModelConfig
from libneox.parallel.mesh import Mesh
from libneox.parallel.shard import Shard
from libneox.parallel.sharding import check_divides, split_of
from libneox.parallel.tensor import sharded_model, sharded_part
from libneox.parallel.vocabulary import SharedVocabulary

RANKS = 2
LENGTH = 12


def tiny(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "ffn_size": 24,
        "vocab_size": 50, "padded_vocab_size": 56, "seq_length": LENGTH, "max_position_embeddings": LENGTH,
        "init_method_std": 0.2,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


SHAPES = {
    "pythia": tiny(residual="parallel", rotary_pct=0.5),
    "tied": tiny(pos_emb="learned", tie_embeddings=True, activation="gelu_tanh"),
    "llama": tiny(norm="rmsnorm", activation="swiglu", num_kv_heads=2, qkv_bias=False, mlp_bias=False),
    "alibi": tiny(pos_emb="alibi", sliding_window=5, residual="parallel_tied"),
    "rpe": tiny(pos_emb="rpe", rpe_num_buckets=8, rpe_max_distance=16),
    "qk_joint": tiny(qk_norm="joint", qk_norm_groups=2, norm="scalenorm"),
    "qk_head": tiny(qk_norm="head", num_kv_heads=2, pos_emb="sinusoidal", norm="non_parametric_layernorm"),
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and a mask with gaps."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, LENGTH + 1), generator=generator)
    mask = (torch.rand(3, LENGTH, generator=generator) < 0.8).float()
    return ids[:, :-1], ids[:, 1:].contiguous(), mask


def noise(config: ModelConfig, model: torch.nn.Module) -> None:
    """Initial values, and something in the biases and norms, which would hide mistakes as zeros and ones."""
    init_weights(model, 3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "qk_norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def reference(config: ModelConfig) -> tuple[Transformer, Tensor, Tensor]:
    """A whole model after a backward pass, its loss, and the loss of each token."""
    model = Transformer(config)
    noise(config, model)
    ids, targets, mask = batch()
    hidden = model.hidden(ids)
    tokens = token_losses(hidden, model.head_weight, targets)
    loss = linear_cross_entropy(hidden, model.head_weight, targets, mask, z_loss=1e-2)
    (loss + (tokens * mask).sum() * 1e-3).backward()
    return model, loss.detach(), tokens.detach()


def in_group(rank: int, store: Path, work: Callable[[Mesh], None]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    try:
        work(Mesh(rank, tensor_size=RANKS).connected())
        store.with_name(f"agreed-{rank}").touch()
    finally:
        dist.destroy_process_group()


def close(ours: Tensor, reference: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6, msg=lambda text: f"{what}: {text}")


def compare(model: Transformer, config: ModelConfig, shard: Shard) -> None:
    whole, wanted, wanted_tokens = reference(config)
    shared = SharedVocabulary(shard, config.padded_vocab_size // shard.size)
    ids, targets, mask = batch()
    hidden = model.hidden(ids)
    tokens = token_losses(hidden, model.head_weight, targets, vocabulary=shared)
    loss = linear_cross_entropy(hidden, model.head_weight, targets, mask, z_loss=1e-2, vocabulary=shared)
    (loss + (tokens * mask).sum() * 1e-3).backward()
    close(loss.detach(), wanted, "loss")
    close(tokens.detach(), wanted_tokens, "token losses")
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        split = split_of(config, name)
        assert parameter.grad is not None
        assert getattr(parameter, "model_parallel", False) == (split is not None)
        close(shard.joined(split, parameter.grad), gradients[name], name)


def all_shapes(mesh: Mesh) -> None:
    """Every rank holds about half of the model."""
    for name, config in SHAPES.items():
        for sequence in (False, True):
            shard = Shard.of(mesh, sequence=sequence)
            whole, _, _ = reference(config)
            model = sharded_model(config, shard)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(shard.piece(split_of(config, key), whole.get_parameter(key)))
            assert sum(p.numel() for p in model.parameters()) < 0.62 * config.num_parameters(), name
            compare(model, config, shard)


def parts_in_a_row(mesh: Mesh) -> None:
    """The parts that a pipeline runs, with a whole model's values."""
    config = SHAPES["llama"]
    whole, wanted, _ = reference(config)
    for sequence in (False, True):
        shard = Shard.of(mesh, sequence=sequence)
        ids, targets, mask = batch()
        x = None
        for piece in range(4):
            part = sharded_part(config, range(piece, piece + 1), shard)
            with torch.no_grad():
                for name, parameter in part.named_parameters():
                    parameter.copy_(shard.piece(split_of(config, name), whole.get_parameter(name)))
            x = part(ids, x)
            inside = sequence and not part.is_last
            assert x.shape == (3, LENGTH // 2 if inside else LENGTH, config.hidden_size)
        shared = SharedVocabulary(shard, config.padded_vocab_size // 2)
        head = shard.piece(split_of(config, "head.weight"), whole.head_weight.detach())
        close(linear_cross_entropy(x, head, targets, mask, z_loss=1e-2, vocabulary=shared), wanted, "loss")


def dropouts(mesh: Mesh) -> None:
    """Replicated regions draw the same numbers on both ranks, sharded ones others; recomputing draws them again."""
    for sequence in (False, True):
        shard = Shard.of(mesh, sequence=sequence)
        config = tiny(attention_dropout=0.3, hidden_dropout=0.3)
        model = sharded_model(config, shard)
        noise_of_rank(model, config, shard)
        with torch.no_grad():  # attention that ignores the input: what differs is dropout
            seen = attended(model)
        others = shard.collected(seen.detach())
        assert not torch.equal(others[0], others[1])
        gradients = []
        for run in RUNS:
            torch.manual_seed(5)
            model.zero_grad()
            loss_of(model, config, shard, run).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        for name, gradient in gradients[0].items():
            assert all(torch.equal(gradient, others[name]) for others in gradients[1:]), name
            if split_of(config, name) is None:
                both = shard.collected(gradient)
                assert torch.equal(both[0], both[1]), name


def noise_of_rank(model: Transformer, config: ModelConfig, shard: Shard) -> None:
    whole = Transformer(config)
    noise(config, whole)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard.piece(split_of(config, name), whole.get_parameter(name)))


def attended(model: Transformer) -> Tensor:
    """What the attention of the first layer passes to its output matrix, for heads that are all alike."""
    found: list[Tensor] = []
    block = model.layers[0]
    handle = block.attn.out.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    block.attn.qkv.weight.zero_()
    block.attn.qkv.bias.fill_(1.0)
    torch.manual_seed(4)
    model.hidden(batch()[0])
    handle.remove()
    return found[0]


def kept() -> Any:
    """Selective checkpointing that keeps the results of products."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


RUNS: tuple[Callable[..., Tensor], ...] = (
    lambda block, *inputs: block(*inputs),
    functools.partial(checkpoint, use_reentrant=False),
    functools.partial(checkpoint, use_reentrant=False, context_fn=kept),
)


def loss_of(model: Transformer, config: ModelConfig, shard: Shard, run: Callable[..., Tensor]) -> Tensor:
    ids, targets, mask = batch()
    context = model.context(LENGTH)
    x = model.embedded(ids)
    for block in model.layers:
        x = run(block, x, context)
    shared = SharedVocabulary(shard, config.padded_vocab_size // shard.size)
    return linear_cross_entropy(model.normed(x), model.head_weight, targets, mask, vocabulary=shared)


def everything(mesh: Mesh) -> None:
    all_shapes(mesh)
    parts_in_a_row(mesh)
    dropouts(mesh)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Losses and gradients of every shape, with sequence parallelism too; layers of a pipeline; random numbers."""
    mp.spawn(in_group, (tmp_path / "store", everything), nprocs=RANKS)
    assert sorted(path.name for path in tmp_path.glob("agreed-*")) == [f"agreed-{rank}" for rank in range(RANKS)]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_pieces_of_every_tensor_make_it_whole_again(name: str) -> None:
    config = SHAPES[name]
    for key, shape in config.parameter_shapes().items():
        whole = torch.randn(shape)
        split = split_of(config, key)
        if split is not None:
            pieces = [split.piece(whole, rank, RANKS) for rank in range(RANKS)]
            assert all(tuple(piece.shape) == split.shape(shape, RANKS) for piece in pieces)
            assert torch.equal(split.joined(pieces), whole), key


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1 key/value heads, 57 rows"):
        check_divides(tiny(num_kv_heads=1, padded_vocab_size=57), RANKS)
    with pytest.raises(UsageError, match="1 groups of QK-norm"):
        check_divides(tiny(qk_norm="joint"), RANKS)


def test_one_rank_is_left_alone() -> None:
    config = SHAPES["pythia"]
    model = sharded_model(config, Shard())
    assert type(model.embed).__name__ == "Embedding"
    assert not any(hasattr(parameter, "model_parallel") for parameter in model.parameters())
