# SPDX-License-Identifier: Apache-2.0
"""Evaluate checkpoints with the lm-evaluation-harness."""
