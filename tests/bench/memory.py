# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the training step beside transformers': `python -m tests.bench.memory [--shape pythia/410M]`.

Each side takes two steps (the optimiser's states are there from the second) in a process of its own; the figure is the
peak of the process (VmHWM), on a GPU of its allocator. Everything is float32 by default, so that both hold the same
weights, gradients and states: in bfloat16 we keep float32 masters, transformers' bare loop does not. Exits 1 if ours
is not below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys


def peak_gb(options: argparse.Namespace) -> float:
    """Peak of one side in this process."""
    import torch

    from libneox.config import load_config
    from neox_train import benchmark

    settings = {
        "precision": options.dtype, "seq_length": options.seq, "vocab_size": 50277, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "compile": options.compile,
    }  # fmt: skip
    config = load_config([options.shape, settings])
    task = benchmark.Task.of(benchmark.prepared(config, set(), options.batch, cpu_batch=options.batch))
    contender = benchmark.ours(task) if options.side == "neox" else benchmark.transformers(task)
    contender.settle()
    for _ in range(2):
        contender.step().item()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e9


def main() -> int:
    """Measure both, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia/410M")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bfloat16"))
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--side", choices=("neox", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.side:
        print(peak_gb(options))
        return 0
    peaks = {}
    for side in ("neox", "transformers"):
        command = [sys.executable, "-m", "tests.bench.memory", *sys.argv[1:], "--side", side]
        peaks[side] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    result = {
        "shape": options.shape, "dtype": options.dtype, "batch": options.batch, "seq_length": options.seq,
        "peak_gb": {side: round(gb, 3) for side, gb in peaks.items()},
        "neox_over_transformers": round(peaks["neox"] / peaks["transformers"], 3),
    }  # fmt: skip
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))
    return int(peaks["neox"] >= peaks["transformers"])


if __name__ == "__main__":
    sys.exit(main())
