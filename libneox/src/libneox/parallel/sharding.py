# SPDX-License-Identifier: Apache-2.0
"""How each logical tensor is cut over tensor-parallel ranks: one table, for building, loading, saving and gathering.

    embed.weight, head.weight     rows: a share of the vocabulary
    attn.qkv                      rows: a share of the query heads, of the key heads and of the value heads
    mlp.up                        rows: a share of the width (gated: of the up projection and of the gate)
    attn.out, mlp.down            columns; the bias is whole on every rank
    attn.qk_norm (joint), rpe     by heads
    everything else               whole on every rank

The cut of GPT-NeoX and Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from libneox.checkpoint.lazy import group_rows, ungroup_rows
from libneox.errors import UsageError
from libneox.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A tensor that is cut into equal pieces.

    Attributes:
        dim: dimension along which it is cut.
        blocks: sizes of the blocks that stand below each other along dimension 0, each of which is cut; () is one.
    """

    dim: int = 0
    blocks: tuple[int, ...] = ()

    def shape(self, whole: Sequence[int], ranks: int) -> tuple[int, ...]:
        """Shape of a piece."""
        return tuple(size // ranks if dim == self.dim else size for dim, size in enumerate(whole))

    def piece(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What one of `ranks` ranks holds; may be a view."""
        if self.blocks:
            whole = group_rows(whole, self.blocks, ranks)
        return whole.chunk(ranks, self.dim)[rank]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor out of the pieces of all ranks."""
        whole = torch.cat(list(pieces), self.dim)
        return ungroup_rows(whole, self.blocks, len(pieces)) if self.blocks else whole


def split_of(config: ModelConfig, name: str) -> Split | None:
    """The table: how the logical tensor `name` is cut; None if every rank holds all of it."""
    leaf = name.split(".", 2)[-1] if name.startswith("layers.") else name
    match leaf:
        case "embed.weight" | "head.weight" | "attn.qk_norm.weight" | "attn.qk_norm.bias":
            return Split()
        case "attn.qkv.weight" | "attn.qkv.bias":
            return Split(blocks=config.qkv_sizes)
        case "mlp.up.weight" | "mlp.up.bias":
            return Split(blocks=(config.ffn_size, config.ffn_size) if config.gated else ())
        case "attn.out.weight" | "mlp.down.weight" | "rpe.weight":
            return Split(dim=1)
    return None


def sums_gradient(name: str, *, sequence: bool) -> bool:
    """Whether each rank sees a part only of the gradient of a tensor that all of them hold.

    A norm of single heads works on the heads of its rank; with sequence parallelism, norms and the biases of
    row-parallel matrices work on the positions of their rank.
    """
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
        return True
    module = name.rpartition(".")[0]
    return sequence and (
        module.endswith(("attn_norm", "mlp_norm", "final_norm")) or name.endswith(("attn.out.bias", "mlp.down.bias"))
    )


def check_divides(config: ModelConfig, ranks: int) -> None:
    """Raise UsageError, naming everything that does not divide, unless the model can be cut over `ranks` ranks."""
    counts = {
        "heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "neurons of the MLP": config.ffn_size,
        "rows of the embedding (padded_vocab_size)": config.padded_vocab_size,
    }
    if config.qk_norm == "joint":
        counts["groups of QK-norm"] = config.qk_norm_groups
    bad = [f"{count} {what}" for what, count in counts.items() if count % ranks]
    if bad:
        raise UsageError(f"model_parallel_size: {ranks} ranks cannot share {', '.join(bad)} equally; set a divisor")
