# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of neox-train beside transformers, and what the command costs over a bare loop of its own model.

    python -m tests.bench.train [--shape pythia/70M] [--dtype fp32] [--batch 4] [--seq 256] [--stage 0] [--json]

In one run, alternating so that a busy machine disturbs all alike, with one batch, dtype and number of threads:
`neox` (neox-train as a command: its metrics.jsonl), `loop` (our model, our loss, torch's fused AdamW, nothing else),
`transformers` (GPTNeoXForCausalLM with its own loss and the same AdamW). Each figure is the best of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from libneox.config import load_config
from libneox.data.writer import DatasetWriter
from libneox.model import Transformer, init_weights
from libneox.model.loss import linear_cross_entropy
from neox_train.report import measured_tflops

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}


def make_data(prefix: Path, vocab: int, tokens: int) -> None:
    """Random ids: speed does not depend on them."""
    values = np.random.default_rng(0).integers(0, vocab, tokens, dtype=np.uint16)
    with DatasetWriter(prefix, "uint16") as writer:
        writer.add(values, np.full(tokens // 1000, 1000))
        writer.commit(command=["bench"])


def settings_of(options: argparse.Namespace, prefix: Path) -> dict[str, object]:
    """The configuration of every contender, on top of the preset."""
    return {
        "data_path": str(prefix), "train_iters": options.steps, "precision": options.dtype, "seq_length": options.seq,
        "train_batch_size": options.batch, "train_micro_batch_size_per_gpu": options.batch, "eval_iters": 0,
        "gradient_accumulation_steps": 1, "vocab_size": 50277, "extra_save_iters": None, "checkpoint_factor": 10**6,
        "no_save_optim": True, "zero_optimization": {"stage": options.stage}, "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }  # fmt: skip


def run_command(options: argparse.Namespace, prefix: Path, folder: Path) -> list[float]:
    """Seconds of each step of neox-train, the first left out."""
    settings = settings_of(options, prefix) | {"save": str(folder / f"run{time.monotonic_ns()}")}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    subprocess.run([sys.executable, "-m", "neox_train", options.shape, *words, "-q"], check=True, stdout=sys.stderr)
    lines = (Path(str(settings["save"])) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step_s"] for line in lines][1:]


def own_loop(options: argparse.Namespace, prefix: Path) -> Callable[[], list[float]]:
    """Our model without the command."""
    config = load_config([options.shape, settings_of(options, prefix)]).model_config(50277)
    model = init_weights(Transformer(config), 0).to(DTYPES[options.dtype])

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(model.hidden(ids), model.head_weight, targets)

    return bare(model, loss, options)


def transformers_loop(options: argparse.Namespace, prefix: Path) -> Callable[[], list[float]]:
    """The same shape in transformers."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = load_config([options.shape, settings_of(options, prefix)]).model_config(50277)
    config = GPTNeoXConfig(
        vocab_size=shape.padded_vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.ffn_size, use_cache=False,
        max_position_embeddings=shape.max_position_embeddings, rotary_pct=shape.rotary_pct,
        use_parallel_residual=shape.residual == "parallel",
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).to(DTYPES[options.dtype])

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # as many positions as ours predicts: transformers shifts labels itself
        return model(input_ids=ids, labels=torch.cat((ids[:, :1], targets[:, :-1]), 1)).loss

    return bare(model, loss, options)


def bare(
    model: torch.nn.Module, loss: Callable[..., torch.Tensor], options: argparse.Namespace
) -> Callable[[], list[float]]:
    """A training loop with nothing in it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)

    def steps() -> list[float]:
        seconds = []
        for _ in range(options.steps):
            batch = torch.randint(0, 50277, (options.batch, options.seq + 1), generator=generator)
            started = time.perf_counter()
            value = loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value.item()
            seconds.append(time.perf_counter() - started)
        return seconds[1:]

    return steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia/70M")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    for name, value in (("batch", 4), ("seq", 256), ("stage", 0), ("steps", 6), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        make_data(prefix, 50277, max(200_000, 2 * options.steps * options.batch * options.seq // 1000 * 1000))
        contenders: dict[str, Callable[[], list[float]]] = {
            "neox": lambda: run_command(options, prefix, Path(folder)),
            "loop": own_loop(options, prefix),
            "transformers": transformers_loop(options, prefix),
        }
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, measure in contenders.items():
                found[name] += measure()
    report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[float]]) -> None:
    """Best and median step, tokens/s, and the ratios that matter."""
    tokens = options.batch * options.seq
    config = load_config([options.shape, {"vocab_size": 50277}]).model_config()
    best = {name: min(seconds) for name, seconds in found.items()}
    ceiling = measured_tflops(DTYPES[options.dtype], torch.device("cpu"))
    flops = config.flops_per_token(options.seq).palm
    result = {
        "shape": options.shape, "dtype": options.dtype, "tokens_per_step": tokens, "threads": torch.get_num_threads(),
        "tokens_per_s": {name: round(tokens / seconds, 1) for name, seconds in best.items()},
        "median_step_s": {name: round(statistics.median(seconds), 4) for name, seconds in found.items()},
        "neox_over_transformers": round(best["transformers"] / best["neox"], 3),
        "command_overhead": round(best["neox"] / best["loop"] - 1, 4),
        "matmul_tflops": round(ceiling, 3),
        "share_of_matmul_rate": round(tokens / best["neox"] * flops / 1e12 / ceiling, 3),
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
