# SPDX-License-Identifier: Apache-2.0
"""Datasets on disk and the order in which their samples are trained on. Nothing here imports torch.

mapping.py    a file as a read-only array, without holding a file descriptor
mmap.py       reading PREFIX.bin/PREFIX.idx (the byte table is there)
writer.py     writing them so that they appear whole or not at all
manifest.py   PREFIX.json and the tokenizer beside a pair
order.py      which tokens are sample i: the order of GPT-NeoX, and a keyed one
documents.py  the same for samples made of whole documents
blend.py      which dataset serves position i of a mixture
samples.py    sample sets: positions to arrays
splits.py     a configuration to the train, valid and test sets
"""

from __future__ import annotations

from libneox.data.manifest import tokenizer_of as tokenizer_of
