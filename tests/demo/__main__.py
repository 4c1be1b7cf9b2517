# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the main job on real text, through the commands a user types.

Corpus -> tokenizer -> token stream | dataset -> training -> evaluation -> samples -> export, and a report card.
Everything goes into one folder, which is made anew at each run.
"""

from __future__ import annotations

import argparse
import json
import keyword
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.demo import corpus, report

MARKER = ".neox-demo"
PROMPTS = ["import os\n\n\ndef ", "class Parser:\n    ", "    for item in ", "    if not isinstance(", "def test_"]


class Demo:
    """Runs the stages in order, and keeps what each one showed."""

    def __init__(self, out: Path):
        self.out = out
        self.facts: dict[str, Any] = {"commands": [], "seconds": {}, "checks": {}}
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TORCH_EXTENSIONS_DIR": str(out / "torch-extensions"),
            "HF_DATASETS_CACHE": str(out / "datasets-cache"),
            "HF_HUB_OFFLINE": "1",
        }

    def shell(self, stage: str, command: str) -> str:
        """Run a command line as typed, in the demo's folder; return its stdout."""
        print(f"\n$ {command}", file=sys.stderr, flush=True)
        self.facts["commands"].append(command)
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.out,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = self.facts["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started
        if done.returncode != 0:
            sys.exit(f"demo: {stage} failed with exit code {done.returncode}: {command}")
        return done.stdout

    def run(self) -> bool:
        """All stages; True if every check of the report card holds."""
        self.prepare_data()
        self.train()
        self.evaluate()
        self.sample()
        self.export()
        self.facts["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        report.write_report(self.facts, self.out)
        return all(self.facts["checks"].values())

    def prepare_data(self) -> None:
        """Corpus to JSONL.zst, a tokenizer from it, and the dataset through a real pipe."""
        started = time.monotonic()
        counts = corpus.write_corpus(self.out / "corpus.jsonl.zst", self.out / "held_out.jsonl")
        self.facts["seconds"]["corpus"] = time.monotonic() - started
        self.shell("tokenizer", "neox-tokenize train corpus.jsonl.zst --vocab-size 2048 -o tokenizer.json")
        self.shell(
            "dataset",
            "neox-tokenize corpus.jsonl.zst --tokenizer tokenizer.json --append-eod | neox-shard pack -o python",
        )
        self.shell("dataset", "neox-shard verify python")
        tokens, entropy = _unigram_entropy(self.out / "python")
        self.facts["corpus"] = {**counts, "tokens": tokens, "unigram_entropy": entropy}

    def train(self) -> None:
        """Train under DeepSpeed from the YAML beside this file."""
        shutil.copy(Path(__file__).with_name("python.yml"), self.out / "python.yml")
        printed = self.shell("training", "neox-train python.yml")
        metrics = [json.loads(line) for line in (self.out / "run" / "metrics.jsonl").read_text().splitlines()]
        plan = json.loads(self.shell("dry run", "neox-train python.yml --dry-run --json"))
        last = metrics[-10:]
        train = {
            "checkpoint": printed.splitlines()[-1],
            "parameters": plan["parameters"],
            "steps": metrics[-1]["step"],
            "tokens": metrics[-1]["tokens"],
            "final_loss": sum(row["loss"] for row in last) / len(last),
            "tokens_per_second": statistics.median(row["tokens_per_s"] for row in metrics),
        }
        self.facts["train"] = train
        entropy = self.facts["corpus"]["unigram_entropy"]
        print(f"demo: final loss {train['final_loss']:.4f}, unigram entropy {entropy:.4f}", file=sys.stderr)
        self.facts["checks"]["final loss at least 1.5 nats below unigram entropy"] = (
            train["final_loss"] <= entropy - 1.5
        )
        report.plot_loss(metrics, entropy, self.out / "loss.png")

    def evaluate(self) -> None:
        """Bits per byte and next-line choice on held-out files, through the harness."""
        tasks = corpus.write_tasks(self.out / "held_out.jsonl", self.out)
        names = ",".join(path.name for path in tasks)
        results = json.loads(self.shell("evaluation", f"neox-eval run/latest --tasks {names}"))["results"]
        self.facts["eval"] = {
            "bits per byte (python_bits)": results["python_bits"]["bits_per_byte,none"],
            "accuracy (python_next_line, chance 0.25)": results["python_next_line"]["acc,none"],
            "length-normalised accuracy (python_next_line)": results["python_next_line"]["acc_norm,none"],
        }

    def sample(self) -> None:
        """Continue five prompts."""
        prompts = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
        (self.out / "prompts.jsonl").write_text(prompts)
        options = "--max-tokens 160 --temperature 0.7 --top-p 0.9 --seed 1"
        lines = self.shell("samples", f"neox-gen run/latest {options} < prompts.jsonl").splitlines()
        texts = [record["context"] + record["text"] for record in map(json.loads, lines)]
        self.facts["samples"] = texts
        good = sum(_looks_like_python(text) for text in texts)
        self.facts["checks"]["3 of 5 samples hold a Python keyword and an indented line"] = good >= 3

    def export(self) -> None:
        """Export to Hugging Face and compare logits with transformers, loaded as its users load it."""
        self.shell("export", "neox-convert to-hf run/latest hf")
        compare = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('compare.py')))}"
        difference = float(self.shell("comparison", f"{compare} run/latest hf held_out.jsonl"))
        self.facts["logit_difference"] = difference
        self.facts["checks"]["exported logits within 1e-4 of ours"] = difference < 1e-4


def _unigram_entropy(prefix: Path) -> tuple[int, float]:
    import numpy

    from libneox.data.mmap import MMapDataset

    dataset = MMapDataset(prefix)
    counts = numpy.bincount(numpy.fromfile(f"{prefix}.bin", dtype=dataset.dtype))
    share = counts[counts > 0] / counts.sum()
    return int(counts.sum()), float(-(share * numpy.log(share)).sum())


def _looks_like_python(text: str) -> bool:
    words = set(re.findall(r"[a-z]+", text))
    indented = any(line.startswith(("    ", "\t")) and line.strip() for line in text.splitlines())
    return indented and not words.isdisjoint(keyword.kwlist)


def _fresh_folder(out: Path) -> Path:
    """An empty folder at `out`. Only a folder this demo made before is removed."""
    if out.exists():
        if not (out / MARKER).exists():
            sys.exit(f"demo: {out}: exists and was not made by the demo; remove it or choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    return out.resolve()


def main() -> None:
    """Entry point of `python -m tests.demo`."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder to make, default demo-run")
    started = time.monotonic()
    demo = Demo(_fresh_folder(parser.parse_args().out))
    held = demo.run()
    for check, ok in demo.facts["checks"].items():
        print(f"demo: {'holds' if ok else 'FAILS'}: {check}", file=sys.stderr)
    print(f"demo: {time.monotonic() - started:.0f} s; report card in {demo.out}/report.md", file=sys.stderr)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
