# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model directories: families as data, read and written without transformers."""

from libneox.checkpoint.hf.families import FAMILIES
from libneox.checkpoint.hf.reader import HfModel, choose_family, config_from_hf, open_hf
from libneox.checkpoint.hf.writer import generation_config_of, hf_config_of, hf_tensors, tokenizer_config_of

__all__ = [
    "FAMILIES",
    "HfModel",
    "choose_family",
    "config_from_hf",
    "generation_config_of",
    "hf_config_of",
    "hf_tensors",
    "open_hf",
    "tokenizer_config_of",
]
