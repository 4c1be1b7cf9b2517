# SPDX-License-Identifier: Apache-2.0
"""Pretrain GPT-NeoX style language models from NeoX YAML files."""
