# SPDX-License-Identifier: Apache-2.0
"""How long conversions take beside `cp`, and how much memory: `python tests/bench/convert.py [--gigabytes 2]`.

A random model in fp16 is converted by to-hf, from-hf and from-neox without comparing logits, in turns with the
yardstick: `cp` of the same bytes, `sync -f`, and one sha256 pass over the result, all with a warm file cache. Each
conversion is a process of its own that has imported everything before the clock starts. Memory is anonymous memory
above what the imports took; pages of mapped files are not counted.

Limits: 1.3x the yardstick's time; twice the largest tensor + 150 MB. Exits 1 if a median is over a limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIME_LIMIT = 1.3
MEMORY_ALLOWANCE = 150_000_000
VOCABULARY = 50_304

WORKER = """
import json, sys, threading, time
import torch, safetensors
import libneox.checkpoint.hf, libneox.checkpoint.neox, libneox.checkpoint.store, libneox.config, libneox.tokenizer
from neox_convert import convert, source, verify, writing
from neox_convert.convert import Options
from neox_convert.source import Where
torch.nn.functional.pad(torch.ones(2), (1, 1)) + torch.cat([torch.ones(2).half()] * 2).sum().float()

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

verb, path, output = sys.argv[1:]
options = Options(verify=False, quiet=True)
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
if verb == "to-hf":
    convert.to_hf(path, output, arch="auto", trim_vocab=False, options=options)
else:
    kind = {"from-hf": "hf", "from-neox": "neox"}[verb]
    convert.to_native(Where(kind=kind, path=path), output, step=None, options=options)
seconds = time.perf_counter() - started
done.set()
print(json.dumps({"seconds": seconds, "private_bytes": max(peak[0], anonymous()) - before}))
"""


def make_sources(folder: Path, gigabytes: float) -> tuple[dict[str, Path], int]:
    """A run, a Hugging Face directory and a GPT-NeoX checkpoint of one random model; and its largest tensor's bytes."""
    import torch

    from libneox.checkpoint.hf.neox_keys import neox_keys_of
    from libneox.checkpoint.store import TensorSpec, write_checkpoint
    from libneox.config import load_config
    from libneox.model_config import ModelConfig
    from libneox.tokenizer import load_tokenizer
    from neox_convert import convert
    from neox_convert.convert import Options

    hidden = 2048
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * hidden) / (12 * hidden**2)))
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        ffn_size=4 * hidden,
        vocab_size=258,
        padded_vocab_size=VOCABULARY,
        seq_length=2048,
        max_position_embeddings=2048,
        residual="parallel",
        rotary_pct=0.25,
    )
    noise = torch.randn(VOCABULARY * hidden).half()
    shapes = config.parameter_shapes()

    class Noise(dict[str, Any]):
        def __getitem__(self, name: str) -> torch.Tensor:
            shape = shapes[name]
            return noise[: torch.Size(shape).numel()].reshape(shape)

    specs = [TensorSpec(name, torch.float16, shape) for name, shape in shapes.items()]
    yaml = load_config([neox_keys_of(config)]).to_yaml()
    tokenizer = load_tokenizer("bytes").data
    write_checkpoint(folder / "run/step_1", Noise(), specs=specs, config_yaml=yaml, tokenizer=tokenizer, step=1)
    options = Options(verify=False, quiet=True)
    convert.to_hf(str(folder / "run"), str(folder / "hf"), arch="auto", trim_vocab=False, options=options)
    convert.to_neox(str(folder / "run"), str(folder / "neox"), tensor_parallel=1, layout="pipeline", options=options)
    sources = {"to-hf": folder / "run", "from-hf": folder / "hf", "from-neox": folder / "neox"}
    return sources, max(spec.nbytes for spec in specs)


def convert_once(verb: str, source: Path, output: Path) -> dict[str, float]:
    """Run one conversion in a process of its own."""
    command = [sys.executable, "-c", WORKER, verb, str(source), str(output)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout)


def copy_once(source: Path, output: Path) -> float:
    """Seconds of the yardstick."""
    started = time.perf_counter()
    subprocess.run(["cp", "-rL", source, output], check=True)
    subprocess.run(["sync", "-f", output], check=True)
    for path in output.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
    return time.perf_counter() - started


def warm(folder: Path) -> None:
    """Read everything once, and let writes of the last round finish."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default a temporary directory")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sources, largest = make_sources(folder, arguments.gigabytes)
        output = folder / "output"
        limit = 2 * largest + MEMORY_ALLOWANCE
        for verb, source in sources.items():
            times: dict[str, list[float]] = {"convert": [], "copy": []}
            memory = 0.0
            for _ in range(arguments.rounds):
                warm(source)
                times["copy"].append(copy_once(source, output))
                shutil.rmtree(output)
                warm(source)
                found = convert_once(verb, source, output)
                shutil.rmtree(output)
                times["convert"].append(found["seconds"])
                memory = max(memory, found["private_bytes"])
            seconds, copied = (statistics.median(times[key]) for key in ("convert", "copy"))
            figures[verb] = {
                "seconds": round(seconds, 3),
                "copy_seconds": round(copied, 3),
                "ratio": round(seconds / copied, 3),
                "private_mb": round(memory / 1e6, 1),
                "private_limit_mb": round(limit / 1e6, 1),
            }
            if not arguments.json:
                print(f"{verb}: {figures[verb]}", flush=True)
    if arguments.json:
        print(json.dumps(figures))
    over = [row["ratio"] > TIME_LIMIT or row["private_mb"] > row["private_limit_mb"] for row in figures.values()]
    return int(any(over))


if __name__ == "__main__":
    sys.exit(main())
