# SPDX-License-Identifier: Apache-2.0
"""Documents packed into sequences: where each begins, their numbers for a mask, positions that start anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_BOUNDS = 64


def document_starts(ids_BT: Tensor, eod_id: int) -> Tensor:
    """Whether a document begins at a position: bool [B, T]. Each row begins one; so does what follows an `eod_id`."""
    return F.pad(ids_BT[:, :-1] == eod_id, (1, 0), value=True)


def cu_seqlens_of(starts_BT: Tensor) -> Tensor:
    """Bounds of the documents in the positions of all rows, one row behind the other, as flash-attn takes them.

    Padded with empty documents at the end, to a power of two: what is compiled or recorded for one batch fits others.

    Args:
        starts_BT: bool, in host memory (their number decides a shape).
    Returns:
        int32 [E]: 0, ascending, B * T as often as needed.
    """
    begins = starts_BT.flatten().nonzero().flatten()
    size = max(LEAST_BOUNDS, 1 << len(begins).bit_length())  # of two, more than there are documents
    return F.pad(begins, (0, size - len(begins)), value=starts_BT.numel()).int()


def document_numbers(cu_seqlens_E: Tensor, batch: int, length: int) -> Tensor:
    """The number of each position's document, counted through all rows: int64 [B, T]."""
    positions = torch.arange(batch * length, dtype=torch.int32, device=cu_seqlens_E.device)
    return torch.searchsorted(cu_seqlens_E, positions, right=True).view(batch, length)


def restarted_positions(starts_BT: Tensor) -> Tensor:
    """Positions that count from 0 within each document: int64 [B, T]."""
    columns_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return columns_T - torch.where(starts_BT, columns_T, 0).cummax(dim=1).values
