# SPDX-License-Identifier: Apache-2.0
"""Keys of what makes a run fast and changes no number beyond rounding. All are new, each can be switched off."""

from dataclasses import dataclass
from typing import Literal

from libneox.config.key import key


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How a step is computed, not what."""

    compile: Literal["auto", "on", "off"] = key(
        "auto",
        "torch.compile of the blocks, with static shapes. auto: if a compiler is there and train_iters is at least 200 "
        "(on a CPU 2000), with one rank to a model, ZeRO up to stage 2, no curriculum; on: or an error.",
        synonyms={"true": "on", "false": "off"},
    )
    cpu_threads: int | None = key(
        None,
        "Threads of a rank on a CPU. Default: OMP_NUM_THREADS if it is set (torchrun sets it to 1), else torch's own "
        "number, within a container's share of time, divided among the ranks on the same cores.",
        minimum=1,
    )
    cpu_products: Literal["auto", "onednn", "torch"] = key(
        "auto",
        "Who multiplies in blocks on a CPU. auto: oneDNN in bfloat16, and in float32 where MKL is slow (x86 not made "
        "by Intel); onednn: in both; torch: whoever torch asks.",
    )
    loss_chunk_mb: int | None = key(
        None,
        "Megabytes of logits that the loss works off at a time; 0: all at once. Default: 256, on a GPU 512.",
        minimum=0,
    )
    keep_host_memory: bool = key(
        True,
        "On a CPU the process keeps freed memory for itself, in huge pages if it can: to ask for it again costs up to "
        "a third of a step.",
    )
    attention_kernel: Literal["auto", "torch", "tiles", "cudnn", "flash", "efficient", "math"] = key(
        "auto",
        "Kernel of attention. auto: the fastest of a timed trial on a GPU, which a run keeps, tiles on a CPU (whose "
        "scores are rounded in bfloat16, as GPT-NeoX's); torch: what SDPA chooses.",
    )
    cuda_graphs: bool = key(
        False,
        "Forward and backward pass of a micro-batch are recorded once and replayed: for models so small that launching "
        "kernels takes longer than they do. Opt-in, on a GPU, with the plain engine and nothing checkpointed.",
    )
    run_ahead: bool = key(
        True,
        "On a GPU with the plain engine and fused Adam a step is queued before the outcome of the one before is read, "
        "so that the device never waits; records of a step, errors in it and stops come one step later.",
    )
    freeze_gc: bool = key(
        True, "Python's garbage collector runs between steps, every 1000 of them, instead of anywhere in the midst."
    )
    prefetch: bool = key(True, "A thread makes the next step's batches while this one is computed.")
