# SPDX-License-Identifier: Apache-2.0
"""From a micro-batch to one number: the model and its loss as a single module, which is what an engine runs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from libneox.config import NeoxConfig
from libneox.model import Transformer
from libneox.model.loss import ALL, Vocabulary, linear_cross_entropy
from libneox.parallel.shard import WHOLE, Shard
from libneox.parallel.vocabulary import SharedVocabulary
from neox_train.recompute import policy_of, recompute_blocks


class MicroBatch(NamedTuple):
    """What one rank computes at once. B samples of T positions.

    Attributes:
        ids: int64 [B, T], inputs.
        targets: int64 [B, T], what is predicted at each position.
        mask: float32 [B, T], weight of each position in the loss; None is all ones.
        cu_seqlens: int32 [E], bounds of documents (`libneox.model.documents`); None: attention is not bounded by them.
        positions: int64 [B, T]; None is 0..T-1.
        divisor: float32 scalar, what the weighted sum of losses is divided by; None is the sum of the weights.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    positions: Tensor | None = None
    divisor: Tensor | None = None


class LanguageModeling(nn.Module):
    """Mean next-token loss of a micro-batch: sum(ce * mask) / sum(mask), in float32.

    A micro-batch whose mask is empty has loss 0 (the original divides 0 by 0).

    Args:
        vocabulary: what the rows of the model's head stand for.
    """

    def __init__(self, model: Transformer, *, z_loss: float = 0.0, vocabulary: Vocabulary = ALL):
        super().__init__()
        self.model = model
        self.z_loss = z_loss
        self.vocabulary = vocabulary

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """The fields of a MicroBatch, one by one (engines look into the arguments) -> float32 scalar."""
        hidden_BTD = self.model.hidden(ids, positions_BT=positions, cu_seqlens_E=cu_seqlens)
        return self.loss(hidden_BTD, MicroBatch(ids, targets, mask, divisor=divisor))

    def loss(self, hidden_BTD: Tensor, batch: MicroBatch) -> Tensor:
        """The head and what comes after it."""
        z_loss = self.z_loss if self.training else 0.0
        return linear_cross_entropy(
            hidden_BTD,
            self.model.head_weight,
            batch.targets,
            batch.mask,
            divisor=batch.divisor,
            z_loss=z_loss,
            vocabulary=self.vocabulary,
        )


def build_objective(config: NeoxConfig, model: Transformer, shard: Shard = WHOLE) -> LanguageModeling:
    """The configured objective over a model, with recomputation of activations where the config asks for it.

    Args:
        shard: which part of the model `model` is.
    """
    recompute_blocks(model, config.recompute.checkpoint_num_layers, policy_of(config))
    vocabulary = ALL if shard.size == 1 else SharedVocabulary(shard, model.config.padded_vocab_size // shard.size)
    return LanguageModeling(model, z_loss=config.optim.z_loss, vocabulary=vocabulary)
