# SPDX-License-Identifier: Apache-2.0
"""The families, in the order in which `--arch auto` tries them. transformers' classes are the numerical reference.

Differences that decide exactness: GPTNeoX rotates a share of each head and has a bias in every norm; Llama, Mistral
and Qwen rotate whole heads and have RMSNorm and a gated MLP; Phi and parallel StableLM share one norm between
attention and MLP; Falcon (new decoder) is the parallel form with grouped queries; GPT-2 has learned positions.
"""

from libneox.checkpoint.hf.families.falcon import FALCON
from libneox.checkpoint.hf.families.gpt2 import GPT2
from libneox.checkpoint.hf.families.gpt_neox import GPT_NEOX
from libneox.checkpoint.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from libneox.checkpoint.hf.families.phi import PHI, STABLELM
from libneox.checkpoint.hf.families.starcoder2 import STARCODER2

FAMILIES = (GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, PHI, STARCODER2, FALCON, STABLELM, GPT2)
