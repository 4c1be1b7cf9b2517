# SPDX-License-Identifier: Apache-2.0
"""The training step beside transformers, and what the command costs over its own bare step.

    python -m tests.bench.train [--shape pythia/70M] [--dtype fp32] [--batch 4] [--seq 512] [--json]

First `neox-train bench --vs hf`: both in one process, in rounds that take turns. Then, in turns again, `neox-train` on
a dataset of random tokens (the steps of its metrics.jsonl) and the bare step of `neox-train bench` alone; each figure
of these is the best of its steps. Blocks are compiled, as they are by default in runs of 2000 steps and more. Exits 1
if a limit is not met: 1.1 (fp32) or 1.3 (bfloat16) times transformers' tokens a second, and 3 % of overhead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from libneox.data.writer import DatasetWriter

LIMITS = {"fp32": 1.1, "bfloat16": 1.3}
OVERHEAD = 0.03
VOCABULARY = 50277


def make_data(prefix: Path, tokens: int) -> None:
    """Random ids: speed does not depend on them."""
    values = np.random.default_rng(0).integers(0, VOCABULARY, tokens, dtype=np.uint16)
    with DatasetWriter(prefix, "uint16") as writer:
        writer.add(values, np.full(tokens // 1000, 1000))
        writer.commit(command=["bench"])


def settings_of(options: argparse.Namespace) -> dict[str, object]:
    """What all runs share, on top of the preset. Whether blocks are compiled is part of it."""
    return {
        "precision": options.dtype, "seq_length": options.seq, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": options.batch, "vocab_size": VOCABULARY,
        "zero_optimization": {"stage": options.stage}, "compile": options.compile,
    }  # fmt: skip


def neox_train(options: argparse.Namespace, *words: str, **settings: object) -> str:
    """Run it; what it printed."""
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in (settings_of(options) | settings).items()]
    command = [sys.executable, "-m", "neox_train", *words[:-1], options.shape, *pairs]
    return subprocess.run([*command, words[-1]], check=True, stdout=subprocess.PIPE, text=True).stdout


def bench(options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """`neox-train bench`."""
    return json.loads(neox_train(options, "bench", *words, "--json"))


def best_step(options: argparse.Namespace, folder: Path) -> float:
    """Seconds of the fastest step of neox-train itself, the first left out."""
    save = folder / f"run{time.monotonic_ns()}"
    neox_train(
        options, "-q", save=str(save), data_path=str(folder / "data"), train_iters=options.steps + 1, eval_iters=0,
        extra_save_iters=None, checkpoint_factor=10**6, no_save_optim=True, train_batch_size=options.batch,
    )  # fmt: skip
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return min(json.loads(line)["step_s"] for line in lines[1:])


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia/70M")
    parser.add_argument("--dtype", default="fp32", choices=LIMITS)
    parser.add_argument("--compile", default="on", choices=("on", "off"))
    for name, value in (("batch", 4), ("seq", 512), ("stage", 0), ("steps", 3), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = bench(options, "--vs=hf", f"--steps={options.steps}", f"--rounds={options.rounds}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data", max(200_000, 2 * options.steps * options.batch * options.seq // 1000 * 1000))
        command, bare = float("inf"), float("inf")
        for _ in range(options.rounds):
            command = min(command, best_step(options, folder))
            bare = min(bare, bench(options, "--rounds=1", f"--steps={options.steps}")["neox"]["best_step_s"])
    result |= {"command_step_s": command, "bare_step_s": bare, "command_overhead": round(command / bare - 1, 4)}
    result |= {"shape": options.shape, "limit": LIMITS[options.dtype], "limit_overhead": OVERHEAD}
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:24} {value}")
    return int(result["neox_over_transformers"] < LIMITS[options.dtype] or result["command_overhead"] > OVERHEAD)


if __name__ == "__main__":
    sys.exit(main())
