# SPDX-License-Identifier: Apache-2.0
"""Tokenizing speed: JSONL.zst to a committed dataset through the real pipe, beside the raw engines.

    python tests/bench/tokenize.py --tokenizer 20B_tokenizer.json [--mb 300] [--reference-mb 30] [--json]

The corpus is the standard library's source, repeated with a running number in front of each document. Measured in one
run on the same cores, whole processes, start-up included:

    ours        neox-tokenize CORPUS | neox-shard pack -o OUT
    fallback    the same with --engine tokenizers, on the first --reference-mb
    reference   tokenizers.encode_batch_fast in a loop, written as uint16, on the first --reference-mb
    gigatoken   gigatoken.encode_files of the same file, end-of-document ids inserted, written as uint16

The ids of all four are compared. Required: ours at least 8 times the reference and 0.6 of gigatoken, the fallback at
least 0.9 of the reference, no process of ours over 600 MB, the same bytes for 1, 2 and 16 workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.peak_memory import measured

REFERENCE = """
import json, sys, numpy, tokenizers, zstandard, io
source, tokenizer, out = sys.argv[1:]
backend = tokenizers.Tokenizer.from_file(tokenizer)
backend.encode_special_tokens = True
lines = io.BufferedReader(zstandard.open(source))
with open(out, "wb") as sink:
    while batch := [json.loads(line)["text"] for _, line in zip(range(1000), lines)]:
        for encoding in backend.encode_batch_fast(batch):
            numpy.array(encoding.ids + [0], dtype=numpy.uint16).tofile(sink)
"""
GIGATOKEN = """
import sys, numpy, gigatoken
source, tokenizer, out = sys.argv[1:]
encoded = gigatoken.Tokenizer(tokenizer).encode_files(gigatoken.JsonlFileSource([source], field="text"))
layout = encoded.layout
ends = numpy.asarray(layout.offsets.data)[1:]
numpy.insert(numpy.asarray(layout.content.data).astype(numpy.uint16), ends, 0).tofile(out)
"""


@dataclass
class Measured:
    """One contestant: wall seconds, peak memory of its largest process, and MB/s of text."""

    seconds: float
    peak_mb: float
    rate: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--mb", type=int, default=300, help="text of the corpus")
    parser.add_argument("--reference-mb", type=int, default=30, help="text given to the slow engines")
    parser.add_argument("--folder", help="where to work (default: a temporary directory)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(Path(folder), arguments.tokenizer, arguments.mb, arguments.reference_mb)
    print(json.dumps(results, indent=1) if arguments.json else report(results))
    return 0 if all(results["required"].values()) else 1


def measure(folder: Path, tokenizer: str, megabytes: int, reference_megabytes: int) -> dict:
    """Run all contestants; see the module's text."""
    corpus, small = folder / "corpus.jsonl.zst", folder / "small.jsonl.zst"
    size, small_size = write_corpus(corpus, megabytes), write_corpus(small, reference_megabytes)
    python = [sys.executable, "-c"]
    runs = {
        "ours": pipe(folder / "ours", corpus, tokenizer, size),
        "gigatoken": alone(folder / "gigatoken.u16", [*python, GIGATOKEN, corpus, tokenizer], size),
        "reference": alone(folder / "reference.u16", [*python, REFERENCE, small, tokenizer], small_size),
        "fallback": pipe(folder / "fallback", small, tokenizer, small_size, "--engine", "tokenizers"),
    }
    hashes = set()
    for workers in (1, 2, 16):
        out = folder / f"workers{workers}"
        pipe(out, small, tokenizer, small_size, "--workers", str(workers))
        hashes.add((sha256(Path(f"{out}.bin")), sha256(Path(f"{out}.idx"))))
    ours, reference = runs["ours"], runs["reference"]
    small_bytes = (folder / "reference.u16").read_bytes()
    required = {
        "ours >= 8 x reference": ours.rate >= 8 * reference.rate,
        "ours >= 0.6 x gigatoken": ours.rate >= 0.6 * runs["gigatoken"].rate,
        "fallback >= 0.9 x reference": runs["fallback"].rate >= 0.9 * reference.rate,
        "every process of ours < 600 MB": max(ours.peak_mb, runs["fallback"].peak_mb) < 600,
        "ids equal gigatoken's": sha256(folder / "ours.bin") == sha256(folder / "gigatoken.u16"),
        "ids equal the reference's": (folder / "ours.bin").read_bytes()[: len(small_bytes)] == small_bytes
        and (folder / "fallback.bin").read_bytes() == small_bytes,
        "workers 1, 2, 16 give the same bytes": len(hashes) == 1,
    }
    return {
        "text_mb": round(size / 1e6, 1),
        "reference_text_mb": round(small_size / 1e6, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "runs": {name: vars(run) for name, run in runs.items()},
        "ours_to_reference": round(ours.rate / reference.rate, 2),
        "ours_to_gigatoken": round(ours.rate / runs["gigatoken"].rate, 2),
        "fallback_to_reference": round(runs["fallback"].rate / reference.rate, 2),
        "required": required,
    }


def write_corpus(path: Path, megabytes: int) -> int:
    """Write at least this many MB of text as JSONL.zst, the same in each corpus as far as it goes; return its size."""
    import zstandard

    texts = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in source.parts:
            text = source.read_bytes().decode(errors="ignore")
            texts.append(text)
    size = number = 0
    with open(path, "wb") as file, zstandard.ZstdCompressor(3, write_checksum=True).stream_writer(file) as sink:
        while size < megabytes * 1_000_000:
            text = f"# {number}\n{texts[number % len(texts)]}"
            sink.write(json.dumps({"text": text, "meta": {"number": number}}).encode() + b"\n")
            size += len(text.encode())
            number += 1
    return size


def pipe(out: Path, corpus: Path, tokenizer: str, size: int, *options: str) -> Measured:
    """`neox-tokenize | neox-shard pack`, timed from start to the second one's end."""
    tokenize = [sys.executable, "-m", "neox_tokenize", corpus, "-t", tokenizer, "--append-eod", "-q", *options]
    shard = [sys.executable, "-m", "neox_shard", "pack", "-q", "-o", out]
    started = time.perf_counter()
    peaks = [out.with_name("peak-tokenize"), out.with_name("peak-shard")]
    with subprocess.Popen(measured(tokenize, peaks[0]), stdout=subprocess.PIPE) as first:
        second = subprocess.Popen(measured(shard, peaks[1]), stdin=first.stdout)
        assert first.stdout is not None
        first.stdout.close()
        finish(second)
        finish(first)
    return result(started, peaks, size)


def alone(out: Path, command: Sequence[object], size: int) -> Measured:
    """One process that writes `out`, timed from start to end."""
    started = time.perf_counter()
    peak = out.with_name("peak")
    finish(subprocess.Popen(measured([*command, out], peak)))
    return result(started, [peak], size)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process, which must succeed."""
    if process.wait():
        raise SystemExit(f"{process.args} ended with {process.returncode}")


def result(started: float, peaks: Sequence[Path], size: int) -> Measured:
    """What the clock says, and the files with the processes' peak memory."""
    seconds = time.perf_counter() - started
    peak = max(int(file.read_text()) for file in peaks) / 1e6
    return Measured(round(seconds, 2), round(peak, 1), round(size / seconds / 1e6, 2))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report(results: dict) -> str:
    """The results as a table."""
    lines = [f"{results['text_mb']} MB of text, {results['cores']} cores, load {results['load_average']:.1f}"]
    for name, run in results["runs"].items():
        lines.append(f"{name:10} {run['rate']:8.2f} MB/s  {run['seconds']:7.2f} s  {run['peak_mb']:6.0f} MB peak")
    for name in ("ours_to_reference", "ours_to_gigatoken", "fallback_to_reference"):
        lines.append(f"{name.replace('_', ' '):24} {results[name]}")
    lines += [f"{'ok ' if holds else 'NO '} {name}" for name, holds in results["required"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
