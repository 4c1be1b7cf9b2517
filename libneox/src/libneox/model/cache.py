# SPDX-License-Identifier: Apache-2.0
"""The keys and values of a text already read. One object per request, made and dropped by the caller.

Memory is taken once, for `capacity` columns. A column is a position in the padded batch; with left padding of p
columns the position of a row's token is column - p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libneox.errors import UsageError
from libneox.model.positions import rotary_table
from libneox.model_config import ModelConfig


class KVCache:
    """Keys and values of every layer, each [B, K, capacity, H].

    Args:
        rows: batch size B.
        capacity: columns there will be at most.
        dtype: of keys and values, and so of attention; may be wider than the model's.
        pad_B: int64, columns of padding on the left of each row.
        kv_heads: heads held here; all of the model's if None (a tensor-parallel rank holds fewer).
        whole: `update` returns all columns instead of those filled, and writes at a position held in a tensor. Every
            step then has the same shapes and addresses, as CUDA graphs need; unfilled columns have to be masked.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        pad_B: Tensor | None = None,
        kv_heads: int | None = None,
        whole: bool = False,
    ):
        shape = (rows, kv_heads or config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.capacity, self.whole, self.dtype = capacity, whole, dtype
        self.length = 0  # columns filled
        self.start = torch.zeros((), dtype=torch.int64, device=device)  # the same, where `whole` needs it
        self.pad_B = pad_B
        self.rotary: tuple[Tensor, Tensor] | None = None
        if config.rotary_dims:
            self.rotary = rotary_table(config, torch.arange(capacity, device=device), dtype)

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's T new columns behind those filled, and return all that its queries may see."""
        keys, values = self.keys[layer], self.values[layer]
        if self.whole:
            columns = self.start + torch.arange(k_BKTH.shape[2], device=keys.device)
            k_BKTH, v_BKTH = k_BKTH.to(self.dtype), v_BKTH.to(self.dtype)
            return keys.index_copy_(2, columns, k_BKTH), values.index_copy_(2, columns, v_BKTH)
        count = k_BKTH.shape[2]
        keys.narrow(2, self.length, count).copy_(k_BKTH)
        values.narrow(2, self.length, count).copy_(v_BKTH)
        end = self.length + count
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    @property
    def bytes_per_column(self) -> int:
        """Bytes of one position of all rows, over all layers."""
        return sum(2 * keys[:, :, :1].numel() * keys.element_size() for keys in self.keys)

    def room_for(self, columns: int) -> None:
        """Raise UsageError unless `columns` more fit."""
        if self.length + columns > self.capacity:
            raise UsageError(f"the text grew past the {self.capacity} positions its cache was made for")

    def advance(self, columns: int) -> None:
        """Count T new columns as filled, once every layer has stored them."""
        self.length += columns
        self.start += columns

    def truncate(self, length: int) -> None:
        """Forget the columns from `length` on: speculation that was not accepted."""
        self.length = length
        self.start.fill_(length)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (int64 indices), in this order; a row may be taken several times."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.pad_B = None if self.pad_B is None else self.pad_B[rows]
