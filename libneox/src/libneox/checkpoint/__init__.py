# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: our own step directories (`store`), loading a model (`load`), other formats (`hf`, `neox`)."""
