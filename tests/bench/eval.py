# SPDX-License-Identifier: Apache-2.0
"""Questions a second of `neox-eval` beside the harness's own `hf` model, in one process, taking turns.

    python tests/bench/eval.py [--shape pythia-70m|llama-60m] [--questions N] [--rounds N] [--device cuda]

Three workloads, all loglikelihood requests as the harness makes them: four choices behind a shared question
(HellaSwag's shape), one continuation behind a paragraph (LAMBADA's), and one-token choices (MMLU's). The model is
random; both sides get the same weights and texts, and their answers are compared. A first round warms both up and is
not counted. Target: 1.5x in wall time; processor time is printed too, which says more on a busy machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TARGET = 1.5


class Request(NamedTuple):
    """What the harness hands to a model, as far as a model looks at it."""

    args: tuple[str, str]


def make_model(folder: Path, shape: str) -> None:
    """A random model of a known shape with a byte-level tokenizer (a token a byte) and a 50k vocabulary."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    from libneox.tokenizer import byte_tokenizer

    torch.manual_seed(1)
    common: dict[str, Any] = {
        "vocab_size": 50304,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if shape == "pythia-70m":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=6, intermediate_size=2048, **common))
    else:
        config = LlamaConfig(num_hidden_layers=8, num_key_value_heads=4, intermediate_size=1408, **common)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().data)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def workloads(questions: int) -> dict[str, list[Request]]:
    """Texts of the lengths of three well-known tasks, in tokens (here: bytes)."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=rng.randint(low, high) - 1)) + "x"

    choices, last_word, one_token = [], [], []
    for _ in range(questions // 4):
        question = text(50, 110)
        choices += [Request((question, " " + text(15, 45))) for _ in range(4)]
        question = text(200, 500)
        one_token += [Request((question, letter)) for letter in "ABCD"]
    for _ in range(questions):
        last_word.append(Request((text(60, 110), " " + text(2, 6))))
    return {"choices": choices, "last word": last_word, "one token": one_token}


def measure(models: dict[str, Any], requests: list[Request], rounds: int) -> dict[str, Any]:
    """Let the models take turns; compare their answers, and give the median time of each."""
    wall: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, list[tuple[float, bool]]] = {}
    for _ in range(rounds + 1):
        for name, model in models.items():
            gc.collect()
            started, used = time.perf_counter(), time.process_time()
            answers[name] = model.loglikelihood(requests, disable_tqdm=True)
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    ours, theirs = answers["neox"], answers["hf"]
    median = {name: statistics.median(values[1:]) for name, values in wall.items()}
    return {
        "questions": len(requests),
        "per_second": {name: len(requests) / value for name, value in median.items()},
        "ratio": median["hf"] / median["neox"],
        "ratios": [b / a for a, b in zip(wall["neox"][1:], wall["hf"][1:], strict=True)],
        "processor_ratio": statistics.median(processor["hf"][1:]) / statistics.median(processor["neox"][1:]),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)),
    }


def describe(name: str, row: dict[str, Any]) -> str:
    """A line for a person."""
    rates = ", ".join(f"{who} {rate:.1f}/s" for who, rate in row["per_second"].items())
    spread = f"rounds {min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
    rest = f"processor time {row['processor_ratio']:.2f}x; largest difference {row['largest_difference']:.1e}"
    return f"{name:10s} {row['ratio']:5.2f}x ({rates}; {spread}; {rest})"


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["pythia-70m", "llama-60m"], default="pythia-70m")
    parser.add_argument("--questions", type=int, default=64, help="of each workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", default="16", help="of hf, and of ours unless --ours says otherwise")
    parser.add_argument("--ours", default="auto", help="batch size of ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    from neox_eval.lm import NeoxLM

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.shape)
        models = {
            "neox": NeoxLM(folder, batch_size=options.ours, device=options.device, quiet=True),
            "hf": HFLM(folder, batch_size=int(options.batch_size), device=options.device, dtype="float32"),
        }
        figures = {
            name: measure(models, requests, options.rounds) for name, requests in workloads(options.questions).items()
        }
    if options.json:
        print(json.dumps(figures))
    else:
        for name, row in figures.items():
            print(options.shape, describe(name, row))
    return int(min(row["ratio"] for row in figures.values()) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
