# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints to and from Hugging Face and GPT-NeoX."""
