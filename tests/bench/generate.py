# SPDX-License-Identifier: Apache-2.0
"""Decoding speed beside transformers' `generate`, in one process on one set of weights.

    python tests/bench/generate.py [--shape 160M] [--dtype float32 bfloat16] [--batch 1 16] [--threads 2]
    python tests/bench/generate.py --device cuda --shape 1.4B --dtype bfloat16 --batch 1

Prints one JSON object a case: milliseconds a token in steady state of both (a long run less a short one, so that
prompt, packing and warm-up cancel), medians over rounds in which the two take turns; the ratio of these medians and of
every round; whether the greedy texts are the same; and the share of the memory bandwidth reached, which is the best of
a sum, a maximum and a packed matrix-vector product. `cpu_ratio` compares processor seconds, which other work on the
machine hardly changes (with one thread). Exits 1 if a limit is missed: of the ratio on a CPU, of the share on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

SHAPES = {  # layers, hidden size, heads
    "toy": (2, 64, 4),
    "70M": (6, 512, 8),
    "160M": (12, 768, 12),
    "410M": (24, 1024, 16),
    "1.4B": (24, 2048, 16),
    "6.9B": (32, 4096, 32),
}
PROMPT = 32
SHORT = 8
LEAST_RATIO = {("float32", 1): 1.5, ("bfloat16", 1): 2.0, ("bfloat16", 16): 1.5}
LEAST_SHARE = {("1.4B", "bfloat16", 1): 0.55, ("6.9B", "bfloat16", 1): 0.70}


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="160M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    # transformers asks DeepSpeed, where it is installed; left to look for itself it prints what it found on stdout
    os.environ.setdefault("DS_ACCELERATOR", options.device)

    import torch

    torch.set_num_threads(options.threads)
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(options.shape, folder, "float32" if "float32" in options.dtype else "bfloat16")
        for dtype in options.dtype:
            for batch in options.batch:
                case = compare(folder, dtype, batch, options)
                print(json.dumps(case), flush=True)
                missed |= misses(case, options)
    return int(missed)


def misses(case: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a limit is missed; the toy shape has none, it shows that the command runs."""
    differs = case["dtype"] == "float32" and not case["same_greedy_texts"]
    if options.device != "cpu":
        return differs or case["bandwidth_share"] < LEAST_SHARE.get((case["shape"], case["dtype"], case["batch"]), 0)
    slow = case["ratio"] < LEAST_RATIO.get((case["dtype"], case["batch"]), 0)
    return differs or (slow and case["shape"] != "toy")


def save_random_model(shape: str, folder: str, dtype: str) -> None:
    """A GPTNeoX model with random weights, in transformers' format."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, hidden, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def compare(folder: str, dtype: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time both on one case."""
    import torch
    import transformers

    import libneox
    from libneox.generation import Engine
    from libneox.generation.bandwidth import measure_bandwidth

    kind, device = getattr(torch, dtype), torch.device(options.device)
    reference = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=kind).to(device).eval()
    engine = Engine(libneox.load_model(folder, dtype=kind, device=options.device), Ids())  # type: ignore[arg-type]
    ids = torch.randint(0, 50000, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    mask, long = torch.ones_like(ids), SHORT + options.tokens

    def its(count: int) -> list[list[int]]:
        texts = reference.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return texts[:, PROMPT:].tolist()

    def ours(count: int) -> list[list[int]]:
        engine.max_tokens = count
        requests = [engine.request(row) for row in ids.tolist()]
        return [completion.tokens for completion in engine.run(requests)]

    its(SHORT), ours(SHORT)
    wall: dict[str, list[float]] = {"ours": [], "its": []}
    cpu: dict[str, list[float]] = {"ours": [], "its": []}
    texts, bandwidth = {}, 0.0
    for _ in range(options.rounds):
        for name, run in (("ours", ours), ("its", its)):
            short, short_cpu, _ = timed(run, SHORT)
            seconds, seconds_cpu, texts[name] = timed(run, long)
            wall[name].append((seconds - short) / options.tokens)
            cpu[name].append((seconds_cpu - short_cpu) / options.tokens)
        bandwidth = max(bandwidth, measure_bandwidth(device))
    median = {name: statistics.median(values) for name, values in wall.items()}
    cpu_median = {name: statistics.median(values) for name, values in cpu.items()}
    reached = engine.work.bytes_read / engine.work.steps / median["ours"]
    return {
        "shape": options.shape, "dtype": dtype, "batch": batch, "threads": options.threads,
        "ours_ms": round(median["ours"] * 1e3, 2), "transformers_ms": round(median["its"] * 1e3, 2),
        "ratio": round(median["its"] / median["ours"], 2),
        "ratios": [round(b / a, 2) for a, b in zip(wall["ours"], wall["its"], strict=True)],
        "cpu_ratio": round(cpu_median["its"] / cpu_median["ours"], 2),
        "tokens_per_second": round(batch / median["ours"], 1),
        "same_greedy_texts": texts["ours"] == texts["its"],
        "read_gb_s": round(reached / 1e9, 1), "memory_gb_s": round(bandwidth / 1e9, 1),
        "bandwidth_share": round(reached / bandwidth, 2), "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }  # fmt: skip


def timed(run: Callable[[int], list[list[int]]], count: int) -> tuple[float, float, list[list[int]]]:
    """Seconds, processor seconds and result of a run."""
    started, started_cpu = time.perf_counter(), time.process_time()
    result = run(count)
    return time.perf_counter() - started, time.process_time() - started_cpu, result


class Ids:
    """A tokenizer of nothing but ids: the benchmark makes no text."""

    vocab_size, eod_id = 50304, None

    def decode(self, ids: list[int]) -> str:
        """No text."""
        return ""


if __name__ == "__main__":
    sys.exit(main())
