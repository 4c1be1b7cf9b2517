# SPDX-License-Identifier: Apache-2.0
"""The model as a list of layers, as pipeline engines want it: Embedding, Block x L, FinalNorm, Head.

Each layer takes and gives one tensor (token ids, then hidden states, at last logits), can be built alone, so that a
rank holds only its own, and names its parameters as the whole model does behind a known prefix. Leave the Head out and
give the last hidden states to `libneox.model.loss`, which owns the head then.

What all blocks share but no tensor carries (rotary angles, the causal mask) depends on the length alone, and is worked
out in each block. Relative position biases (`pos_emb: rpe`) are one parameter used by all blocks and documents need the
ids: neither fits a one-tensor pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from libneox.errors import UsageError
from libneox.model.attention import Visibility, make_pattern
from libneox.model.positions import alibi_slopes, rotary_table
from libneox.model.transformer import Block, Context, Embedding, Linear, Norm, Transformer, check_config, embed_ids
from libneox.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """One layer of the list.

    Attributes:
        prefix: of its parameters' logical names: local `NAME` is logical `prefix + NAME`.
        build: makes the module, its parameters uninitialised.
        tied_to: index of the layer whose `embed.weight` this one must share, if it has any.
    """

    prefix: str
    build: Callable[[], nn.Module]
    tied_to: int | None = None


def stages(config: ModelConfig, *, head: bool = True) -> list[Stage]:
    """The layers of a model in order.

    Args:
        head: end with the layer that makes logits; without it the last layer gives normalised hidden states.
    Raises:
        UsageError: the model cannot be cut into layers.
    """
    check_config(config)
    if config.pos_emb == "rpe":
        raise UsageError("pos_emb rpe shares one parameter among all layers and cannot be cut into stages")
    layers = [Stage("", lambda: EmbeddingStage(config))]
    layers += [Stage(f"layers.{i}.", lambda i=i: BlockStage(config, i)) for i in range(config.num_layers)]
    layers.append(Stage("final_norm.", lambda: NormStage(config)))
    if head:
        layers.append(Stage("", lambda: HeadStage(config), tied_to=0 if config.tie_embeddings else None))
    return layers


def logical_name(stage: Stage, local_name: str) -> str:
    """The name in the whole model, and in checkpoints, of a stage's parameter."""
    return stage.prefix + local_name


def share_parameters(model: Transformer, *, head: bool = True) -> Iterator[nn.Module]:
    """The layers of `stages`, holding the very parameters of `model`."""
    parameters = dict(model.named_parameters())
    for stage in stages(model.config, head=head):
        with torch.device("meta"):
            module = stage.build()
        for name, _ in list(module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, parameters[logical_name(stage, name)])
        yield module


class EmbeddingStage(nn.Module):
    """ids [B, T] int64 -> [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.padded_vocab_size, config.hidden_size)
        if config.pos_emb == "learned":
            rows = config.max_position_embeddings + config.learned_position_offset
            self.pos_embed = Embedding(rows, config.hidden_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed tokens and positions."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        table = self.pos_embed if self.config.pos_emb == "learned" else None
        return embed_ids(self.config, self.embed, table, ids_BT, positions_T, training=self.training)


class BlockStage(Block):
    """[B, T, D] -> [B, T, D]: a block that works out its own context."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config, index)
        self.config = config
        self.slopes = alibi_slopes(config.num_heads) if config.pos_emb == "alibi" else ()
        self.backend = "sdpa"
        self.shares = 1  # into so many the positions are cut outside of attention and MLP; x is one of them

    def forward(self, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        """Run the layer on whole sequences from position 0."""
        length, device, dtype = x_BTD.shape[1] * self.shares, x_BTD.device, x_BTD.dtype
        slopes = torch.tensor(self.slopes, device=device) if self.slopes else None
        seen = Visibility(length, length, window=self.config.sliding_window, slopes_N=slopes)
        rotary = None
        if self.config.rotary_dims:
            cos, sin = rotary_table(self.config, torch.arange(length, device=device), dtype)
            rotary = cos.unsqueeze(-2), sin.unsqueeze(-2)
        pattern = make_pattern(self.backend, seen, device=device, dtype=dtype)
        return super().forward(x_BTD, Context(pattern, rotary))


class NormStage(Norm):
    """[B, T, D] -> [B, T, D]: the final norm, scaled for the head."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.scale = config.output_scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise."""
        hidden_BTD = super().forward(x_BTD)
        return hidden_BTD if self.scale == 1.0 else hidden_BTD * self.scale


class HeadStage(nn.Module):
    """[B, T, D] -> float32 logits [B, T, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.tie_embeddings:
            self.embed = Embedding(config.padded_vocab_size, config.hidden_size)
        else:
            self.head = Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Score every token."""
        weight_VD = self.embed.weight if hasattr(self, "embed") else self.head.weight
        return nn.functional.linear(hidden_BTD, weight_VD).float()
