# SPDX-License-Identifier: Apache-2.0
"""What makes a run fast without changing what it computes; each part has its key (`libneox.config.keys.speed`).

Nothing here is chosen with a clock where the choice could change a digit on a CPU: a run that continues must make the
same choices as the run that stopped.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from libneox import host_memory
from libneox.config import NeoxConfig
from libneox.errors import UsageError
from libneox.model import Transformer, attention, cpu_attention, loss, products
from libneox.model.transformer import Block
from libneox.model_config import ModelConfig
from neox_train.observers import Observer
from neox_train.recompute import policy_of
from neox_train.signals import sparing_children

COMPILE_FROM = {"cuda": 200, "cpu": 2000}  # steps that repay the seconds of a compilation
COMPILER = {
    "fallback_random": True,  # as in eager mode: dropout is the same either way
    "cpp.use_decompose_tanh": True,  # by exp, in half the time; good to 1e-7, and activations add 1 to it
}
COLLECT_EVERY = 1000
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_preferred = contextlib.ExitStack()  # torch's order of kernels comes back when this is closed, or gone


def set_up(config: NeoxConfig, device: torch.device) -> None:
    """Settings of the process, before the model is built."""
    loss.limit_chunks(device.type, config.speed.loss_chunk_mb)
    if device.type != "cpu":
        return
    asked = config.speed.cpu_products
    wanted = [] if asked == "torch" else [torch.bfloat16]
    if asked == "onednn" or (asked == "auto" and products.mkl_is_slow()):
        wanted.append(torch.float32)
    had = products.use_onednn(*wanted)
    if asked == "onednn" and torch.float32 not in had:
        raise UsageError("cpu_products: this torch was built without oneDNN; set cpu_products: torch")
    if config.speed.keep_host_memory:
        host_memory.keep()


def compiles(config: NeoxConfig, device: torch.device) -> bool:
    """Whether blocks are compiled.

    It depends on the length of the whole run: one that continues near its end computes as it did before.

    Raises:
        UsageError: `compile: on`, and it cannot be.
    """
    asked = config.speed.compile
    if asked == "off":
        return False
    why = _cannot_compile(config, device)
    if asked == "on" and why:
        raise UsageError(f"compile: {why}; set compile: auto")
    return asked == "on" or (not why and (config.train.train_iters or 0) >= COMPILE_FROM[device.type])


def _cannot_compile(config: NeoxConfig, device: torch.device) -> str:
    if config.tensor_parallel > 1 or config.pipeline_stages > 1:
        return "tensor and pipeline parallelism cannot be compiled through"
    if config.zero_stage == 3:
        return "ZeRO stage 3 gathers weights in the midst of a block"
    if config.recompute.checkpoint_policy == "selective":
        return "selective recomputation has to see each operator"
    if (config.get("curriculum_learning") or {}).get("enabled"):
        return "a curriculum changes the shapes"
    onednn = config.speed.cpu_products != "torch" and products.has_onednn(torch.bfloat16)
    if device.type == "cpu" and config.compute_precision == "bfloat16" and not onednn:
        return "the C++ that torch writes for its own products in bfloat16 is not valid, and oneDNN's are not in use"
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "there is no C++ compiler"
    return _no_triton(device) if device.type == "cuda" else ""


def _no_triton(device: torch.device) -> str:
    """Why nothing can be compiled for a GPU, or an empty text."""
    from torch.utils._triton import has_triton

    if torch.cuda.get_device_capability(device) < (7, 0) or not has_triton():
        return "there is no Triton for this GPU"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "there is no C compiler"
    return ""


def check_graphs(config: NeoxConfig, device: torch.device, *, plain: bool) -> None:
    """Raise UsageError if micro-batches are to be recorded and cannot be.

    Args:
        plain: whether the plain engine runs this.
    """
    why = remedy = ""
    if device.type != "cuda":
        why = "there is no GPU to record on"
    elif not plain:
        why, remedy = "DeepSpeed looks at gradients in the midst", "engine: plain and zero_optimization.stage: 0"
    elif config.tensor_parallel > 1:
        why, remedy = "ranks that share a model meet in the midst", "model_parallel_size: 1"
    elif policy_of(config) != "none":
        why, remedy = "what is computed again asks for the random state in the midst", "checkpoint_policy: none"
    elif (config.get("curriculum_learning") or {}).get("enabled"):
        why = "a curriculum changes the shapes"
    if config.speed.cuda_graphs and why:
        raise UsageError(f"cuda_graphs: {why}; set {remedy and remedy + ', or '}cuda_graphs: false")


def runs_ahead(config: NeoxConfig, device: torch.device) -> bool:
    """Whether a step is queued before the outcome of the one before is read: where there is a queue, and if wanted."""
    return config.speed.run_ahead and device.type == "cuda"


def compile_blocks(model: Transformer) -> None:
    """Compile every block on its first call. They are alike, so this is one compilation, forward and backward.

    Whole models take minutes, and do not compile together with the loss in bfloat16 on a CPU.
    """
    for module in model.modules():
        if isinstance(module, Block):
            compiled = torch.compile(module.forward, dynamic=False, options=COMPILER)
            module.forward = functools.partial(_without_harm, compiled)  # type: ignore[method-assign]


def _without_harm(compiled: Callable[..., torch.Tensor], *args: object, **keywords: object) -> torch.Tensor:
    """Call it; a run that is asked to stop while the compiler works still takes its step and saves it."""
    with sparing_children():
        return compiled(*args, **keywords)


def kernel_of(config: NeoxConfig, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> str:
    """`attention_kernel`; `auto` on a GPU is settled by a trial, which may end otherwise the next time.

    Args:
        batch: sequences of a micro-batch.
    """
    if config.speed.attention_kernel != "auto" or device.type != "cuda":
        return config.speed.attention_kernel
    kernel = fastest_kernel(model, batch, dtype, device)
    torch.cuda.empty_cache()  # what is chosen by free memory comes later
    return kernel


def prefer_kernel(kernel: str, device: torch.device) -> None:
    """Set how this process computes attention; `kernel` as in `attention_kernel`.

    Raises:
        UsageError: the device has no such kernel.
    """
    if kernel == "tiles" and device.type != "cpu":
        raise UsageError("attention_kernel: tiles are for CPUs; set attention_kernel: auto")
    cpu_attention.use_tiles(device.type == "cpu" and kernel in ("auto", "tiles"))
    attention.use_varlen(kernel not in ("torch", "efficient", "math"))
    put_first(kernel)


def put_first(kernel: str) -> None:
    """Have SDPA try one of `KERNELS` first in this process; of another name: torch's own order."""
    _preferred.close()
    if kernel in KERNELS:
        rest = [other for name, other in KERNELS.items() if name != kernel]
        _preferred.enter_context(sdpa_kernel([KERNELS[kernel], *rest], set_priority=True))


def fastest_kernel(model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel with the shortest forward and backward pass at the model's shape, by trial."""
    shape = (batch, model.seq_length, model.num_heads, model.head_dim)
    keys = (batch, model.seq_length, model.num_kv_heads, model.head_dim)
    q, k, v = (torch.randn(s, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for s in (shape, keys, keys))
    grouped = model.num_heads != model.num_kv_heads
    seconds = {}
    for name, kernel in KERNELS.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel([kernel]):  # it says so where it cannot
            for attempt in range(4):
                started = time.perf_counter()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                took = time.perf_counter() - started
                seconds[name] = min(seconds.get(name, took), took) if attempt else float("inf")
    return min(seconds, key=seconds.__getitem__, default="torch")


class QuietCollector(Observer):
    """Python's garbage collector at fixed places: what lives before the first step is never looked at again."""

    def __init__(self, every: int = COLLECT_EVERY):
        self._every, self._frozen = every, False

    def begin_step(self, step: int) -> None:
        """See the class."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._frozen = True
        elif step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """As it was."""
        if self._frozen:
            gc.enable()
            gc.unfreeze()
            self._frozen = False
