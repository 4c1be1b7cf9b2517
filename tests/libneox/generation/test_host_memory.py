# SPDX-License-Identifier: Apache-2.0
"""Where large blocks come from; each case in a process of its own, whose settings these are."""

from __future__ import annotations

import multiprocessing
import platform
from pathlib import Path

import pytest
import torch

from libneox import host_memory
from libneox.config import load_config
from libneox.generation.prepack import PackedTransformer, can_prepack, prepacked
from libneox.model import Transformer

MB = 1 << 20
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not OFFERED.exists() or "[madvise]" not in OFFERED.read_text() or "glibc" not in platform.libc_ver(),
    reason="huge pages are not left to programs here",
)


def huge_heap() -> int:
    """Bytes of this process's heap that are in huge pages."""
    parts = Path("/proc/self/smaps").read_text(encoding="ascii").split("[heap]")[1:]
    return sum(int(part.split("AnonHugePages:")[1].split()[0]) for part in parts) << 10


def elsewhere(work: str) -> int:
    """Do one of the things below in a fresh process; what it returned."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(globals()[work]).get(timeout=60)


def kept() -> int:
    host_memory.keep()
    tensor = torch.ones(32 * MB)
    return huge_heap() * bool(tensor[0])


def released() -> int:
    host_memory.keep()
    host_memory.release()
    tensor = torch.ones(32 * MB)
    return huge_heap() * bool(tensor[0])


def kept_around_a_block() -> int:
    host_memory.keep()
    with host_memory.in_huge_pages():
        pass
    tensor = torch.ones(32 * MB)
    return huge_heap() * bool(tensor[0])


def after_a_block() -> int:
    with host_memory.in_huge_pages():
        first = torch.ones(32 * MB)
    before = huge_heap()
    second = torch.ones(32 * MB)  # has pages of its own again
    return (huge_heap() - before) * bool(first[0] + second[0])


def transformer(width: int) -> Transformer:
    config = load_config(
        [{"num_layers": 2, "hidden_size": width, "num_attention_heads": 4, "seq_length": 16, "pos_emb": "rotary",
          "max_position_embeddings": 16, "no_weight_tying": True, "train_batch_size": 1}]
    )  # fmt: skip
    return Transformer(config.model_config(8 * width)).eval()


def packed() -> int:
    model = transformer(1024)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    made = prepacked(model)
    return huge_heap() * isinstance(made, PackedTransformer)


def test_memory_that_is_kept_comes_in_huge_pages() -> None:
    assert elsewhere("kept") > 120 * MB
    assert elsewhere("kept_around_a_block") > 120 * MB
    assert elsewhere("released") < 64 * MB


def test_a_block_leaves_the_process_as_it_was() -> None:
    assert elsewhere("after_a_block") < 16 * MB


def test_packed_weights_lie_in_huge_pages() -> None:
    """133 MB of linear maps."""
    if not can_prepack(transformer(8)):
        pytest.skip("no packed kernels here")
    assert elsewhere("packed") > 120 * MB
