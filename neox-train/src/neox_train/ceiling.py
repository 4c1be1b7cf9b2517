# SPDX-License-Identifier: Apache-2.0
"""What this machine could do at best, measured here and now: matrix products, memory copies, attention.

The roofline of a training step adds up what each token must cost, nothing overlapping:

    6 N / G  +  attention FLOPs / A  +  60 h L b / W  +  12 v / W  +  28 P / (W tokens)

N parameters in products (with the head), G FLOP/s of the model's products, A of attention forward and backward, W bytes
a second of a copy (read and write), about 60 elements of b bytes that pass each layer's norms and activations, 12 bytes
a vocabulary entry of a chunked cross-entropy, and 28 bytes a parameter of AdamW in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from libneox.model import cpu_attention, products
from libneox.model_config import ModelConfig
from neox_train.report import measured_tflops

ROWS = {"cuda": 8192, "cpu": 1024}  # of activations in a trial product
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
REPEATS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Ceiling:
    """Rates in FLOP/s and bytes/s.

    Attributes:
        square: torch.mm of one large square product, what `mfu` is a share of.
        products: forward, and both backward products of every matrix of the model, weighted as they occur.
    """

    square: float
    products: float
    attention: float
    copy: float

    def seconds_per_token(self, model: ModelConfig, seq_length: int, dtype: torch.dtype, tokens: int) -> float:
        """The roofline of a training step of `tokens` tokens; see the module."""
        flops = model.flops_per_token(seq_length)
        in_products = 6 * model.num_parameters_matmul()
        elements = 60 * model.hidden_size * model.num_layers * dtype.itemsize
        moved = elements + 12 * model.padded_vocab_size + 28 * model.num_parameters() / tokens
        return in_products / self.products + (flops.causal - in_products) / self.attention + moved / self.copy


def measure(model: ModelConfig, batch: int, seq_length: int, dtype: torch.dtype, device: torch.device) -> Ceiling:
    """Measure on `device`; takes seconds.

    Args:
        batch: sequences at once in attention.
    """
    return Ceiling(
        measured_tflops(dtype, device) * 1e12,
        _products(model, dtype, device),
        _attention(model, batch, seq_length, dtype, device),
        _copy(device),
    )


def _products(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    rows, flops, seconds = ROWS.get(device.type, ROWS["cuda"]), 0.0, 0.0
    for (out, width), count in _matrices(model).items():
        x, w, d = (torch.randn(s, dtype=dtype, device=device) for s in ((rows, width), (out, width), (rows, out)))
        for a, b in ((x, w), (d, w.T), (d.T, x.T)):
            flops += count * 2 * rows * out * width
            seconds += count * min(best_of(work, device) for work in _ways(a, b))
    return flops / seconds


def _ways(a: torch.Tensor, b: torch.Tensor) -> Iterator[Callable[[], object]]:
    yield lambda: a @ b.T
    if a.device.type == "cpu" and a.dtype == torch.float32:
        yield lambda: products.product(a, b)


def _matrices(model: ModelConfig) -> dict[tuple[int, int], int]:
    """Shapes of the matrices that activations are multiplied with, and how many there are of each."""
    found: dict[tuple[int, int], int] = {}
    for name, shape in model.parameter_shapes().items():
        head = name == ("embed.weight" if model.tie_embeddings else "head.weight")
        if len(shape) == 2 and (head or ".attn.qkv." in name or ".attn.out." in name or ".mlp." in name):
            found[shape[0], shape[1]] = found.get((shape[0], shape[1]), 0) + 1
    return found


def _attention(model: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> float:
    def random(heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, model.head_dim, dtype=dtype, device=device, requires_grad=True)

    q, k, v = random(model.num_heads), random(model.num_kv_heads), random(model.num_kv_heads)
    grouped = model.num_heads != model.num_kv_heads

    def by_torch() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def by_tiles() -> Tensor:
        return cpu_attention.attention(*(x.transpose(1, 2) for x in (q, k, v)), model.head_dim**-0.5)

    def work(way: Callable[[], Tensor]) -> None:
        out = way()
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    ways = [by_torch] if device.type != "cpu" else [by_torch, by_tiles]
    forward = 4 * batch * model.num_heads * length * length * model.head_dim / 2  # half of it is masked
    return 3 * forward / min(best_of(functools.partial(work, way), device) for way in ways)


def _copy(device: torch.device) -> float:
    size = COPY_BYTES.get(device.type, COPY_BYTES["cuda"])
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / best_of(lambda: target.copy_(source), device)


def best_of(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    best = math.inf
    for attempt in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best


def wait(device: torch.device) -> None:
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
