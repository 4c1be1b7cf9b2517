# SPDX-License-Identifier: Apache-2.0
"""Print the largest absolute difference between our logits and transformers' on held-out text.

usage: compare.py CKPT HF_DIR JSONL
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import libneox

ours = libneox.load_model(sys.argv[1])
theirs = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
with Path(sys.argv[3]).open(encoding="utf-8") as lines:
    text = json.loads(next(lines))["text"]
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :128]
assert ids[0].tolist() == libneox.load_tokenizer(sys.argv[1]).encode(text)[:128], (
    "the exported tokenizer gives other ids"
)
with torch.inference_mode():
    print((ours(ids).float() - theirs(ids).logits).abs().max().item())
