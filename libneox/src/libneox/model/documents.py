# SPDX-License-Identifier: Apache-2.0
"""Documents packed into one sequence: their numbers for the attention mask, and positions that start anew."""

from __future__ import annotations

import torch
from torch import Tensor


def document_numbers(ids_BT: Tensor, eod_id: int) -> Tensor:
    """Number the documents of each row from 0; an end-of-document token belongs to the document it ends.

    Args:
        ids_BT: int64 token ids.
    Returns:
        int64 [B, T].
    """
    ends_BT = (ids_BT == eod_id).long()
    return ends_BT.cumsum(dim=1) - ends_BT


def restarted_positions(documents_BT: Tensor) -> Tensor:
    """Positions that count from 0 within each document: int64 [B, T]."""
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT = torch.where(first_BT, columns_T, 0).cummax(dim=1).values
    return columns_T - starts_BT
