# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: memory for time. None of it changes a number.

full keeps the input of each block and computes all of it again in the backward pass, a third more work. selective
keeps what matrix products and attention gave as well, and computes again only what is cheap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from libneox.config import NeoxConfig
from libneox.config.estimate import dry_run
from libneox.errors import UsageError
from libneox.model import Transformer
from libneox.model_config import ModelConfig

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")  # each saves more memory than the one before
RESERVE = 0.1  # of the free memory: fragments, communication, what a library holds for itself


def policy_of(config: NeoxConfig) -> Policy:
    """What the configuration says by itself; `auto` follows checkpoint_activations."""
    asked = config.recompute.checkpoint_policy
    if asked != "auto":
        return asked
    return "full" if config.recompute.checkpoint_activations else "none"


def choose(
    config: NeoxConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, *, world: int, compiled: bool
) -> Policy:
    """The policy of a run: `auto` on a GPU is the first of none, selective and full that fits its free memory.

    Args:
        world: ranks of the run.
        compiled: compiled blocks leave out what is cheap to compute again as it is, so selective is not for them.
    """
    told = policy_of(config)
    alone = config.tensor_parallel == config.pipeline_stages == 1
    if config.recompute.checkpoint_policy != "auto" or told != "none" or device.type != "cuda" or not alone:
        return told
    free, _ = torch.cuda.mem_get_info(device)
    rank = dry_run(config, world)["memory_per_rank"][0]
    fixed = rank["weights"] + rank["gradients"] + rank["optimizer"]
    batch = config.batch_plan(world).micro_batch
    kept = bytes_kept(model, batch, dtype, device)
    return first_that_fits(int(free * (1 - RESERVE)) - fixed, model.num_layers, kept, selective=not compiled)


def first_that_fits(room: int, layers: int, kept: dict[Policy, int], *, selective: bool = True) -> Policy:
    """The cheapest policy whose kept bytes, and one block in full while it is gone through backwards, fit in `room`."""
    ladder: list[Policy] = ["none", "selective"] if selective else ["none"]
    return next((policy for policy in ladder if layers * kept[policy] + kept["none"] <= room), "full")


def bytes_kept(model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> dict[Policy, int]:
    """Bytes that one block keeps for its backward pass under each policy, found by running one."""
    tokens = batch * model.seq_length
    with torch.device(device):
        one = Transformer(dataclasses.replace(model, num_layers=1, vocab_size=128, padded_vocab_size=128)).to(dtype)
        x_BTD = torch.zeros(batch, model.seq_length, model.hidden_size, dtype=dtype, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in one.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one.run_blocks(x_BTD, one.context(model.seq_length), None)
    none = sum(sizes.values())
    full = tokens * model.hidden_size * dtype.itemsize
    up = model.ffn_size * (2 if model.gated else 1)
    products = sum(model.qkv_sizes) + model.qkv_sizes[0] + up + 2 * model.hidden_size
    return {"none": none, "selective": full + tokens * products * dtype.itemsize, "full": full}


def recompute_blocks(model: Transformer, every: int, policy: Policy = "full") -> None:
    """Run each `every` blocks again in the backward pass.

    Raises:
        UsageError: selective, and more than one block at a time.
    """
    if policy == "none":
        return
    if policy == "selective" and every > 1:
        raise UsageError("checkpoint_num_layers: selective works block by block; set checkpoint_num_layers: 1")
    again = functools.partial(checkpoint, use_reentrant=False)
    if policy == "selective":
        again = functools.partial(again, context_fn=functools.partial(create_selective_checkpoint_contexts, _kept()))
    layers = list(model.layers)
    for first in range(0, len(layers), every):
        run = [layer.forward for layer in layers[first : first + every]]

        def chunk(x_BTD: Tensor, context: object, cache: object = None, run: list = run) -> Tensor:  # type: ignore[type-arg]
            for forward in run:
                x_BTD = forward(x_BTD, context, cache)
            return x_BTD

        def passed(x_BTD: Tensor, context: object, cache: object = None) -> Tensor:
            return x_BTD

        layers[first].forward = functools.partial(again, chunk)  # type: ignore[method-assign]
        for layer in layers[first + 1 : first + every]:
            layer.forward = passed  # type: ignore[method-assign]


def _kept() -> list[torch._ops.OpOverload]:
    """Operators whose results selective checkpointing keeps."""
    aten = torch.ops.aten
    attention = [getattr(aten, f"_scaled_dot_product_{name}", None) for name in (
        "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]  # fmt: skip
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.nn.attention.varlen")  # registers its operator
        attention.append(torch.ops.torch_attn._varlen_attn)
    kept = [aten.mm, aten.addmm, torch.ops.neox.linear, torch.ops.neox.causal_attention, *filter(None, attention)]
    return [operator.default for operator in kept]
