# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the original GPT-NeoX, read without executing anything in them."""

from libneox.checkpoint.neox.reader import LegacyCheckpoint, open_neox

__all__ = ["LegacyCheckpoint", "open_neox"]
