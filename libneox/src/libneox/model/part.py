# SPDX-License-Identifier: Apache-2.0
"""Consecutive layers of a model, for a pipeline whose ranks hold a part each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libneox.model.attention import Pattern
from libneox.model.cache import KVCache
from libneox.model.transformer import Context, Transformer
from libneox.model_config import ModelConfig


class Part(Transformer):
    """A model of which most is missing; what is there has its own name and place.

    Build it on the meta device, so that what is missing costs nothing, and give memory to the rest (`to_empty`).
    """

    def __init__(self, config: ModelConfig, pieces: range):
        """Keep some pieces: 0 is the embedding, 1 to L the blocks, L + 1 the final norm with the head."""
        super().__init__(config)
        last = config.num_layers + 1
        self.is_first, self.is_last = 0 in pieces, last in pieces
        self.has_blocks = any(piece in pieces for piece in range(1, last))
        for index in range(config.num_layers):
            if index + 1 not in pieces:
                self.layers[index] = Elsewhere()
        if not self.is_first:
            self.pos_embed = None  # type: ignore[assignment]
        if not (self.is_first or (self.is_last and config.tie_embeddings)):
            self.embed = None  # type: ignore[assignment]
        if not self.has_blocks:
            self.rpe = None  # type: ignore[assignment]
        if not self.is_last:
            self.final_norm = self.head = None  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        ids_BT: Tensor,
        x_BTD: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        cu_seqlens_E: Tensor | None = None,
    ) -> Tensor:
        """Run these layers; arguments as of `Transformer.hidden`.

        Args:
            x_BTD: what the part before gave; the first part takes the ids instead.
        Returns:
            What the next part takes, or, from the last, hidden states whose product with `head_weight` are logits.
        """
        if self.is_first:
            x_BTD = self.embedded(ids_BT, positions_BT=positions_BT)
        assert x_BTD is not None
        context = Context(Pattern())
        if self.has_blocks:
            context = self.context(
                ids_BT.shape[1], batch=ids_BT.shape[0], positions_BT=positions_BT, cu_seqlens_E=cu_seqlens_E
            )
        x_BTD = self.run_blocks(x_BTD, context, None)
        return self.normed(x_BTD) if self.is_last else x_BTD

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device


class Elsewhere(nn.Module):
    """Where a block of another part would be."""

    def forward(self, x_BTD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """Do nothing."""
        return x_BTD
