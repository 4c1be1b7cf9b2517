# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: the source of Python's standard library, and evaluation tasks cut from it."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 0.03
SKIP = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip"}


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every UTF-8 module of the standard library, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIP.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes().decode("utf-8", errors="replace")
            if text.strip():
                yield str(path.relative_to(root)), text


def is_held_out(name: str) -> bool:
    """Whether a file is kept for evaluation: decided by its name alone, so the same on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return digest / 2**32 < HELD_OUT_SHARE


def write_corpus(train: Path, held_out: Path) -> dict[str, int]:
    """Write the training documents as JSONL.zst and the held-out ones as JSONL; return counts of files and bytes."""
    import zstandard

    counts = {"train_files": 0, "train_bytes": 0, "held_out_files": 0, "held_out_bytes": 0}
    with train.open("wb") as raw, zstandard.ZstdCompressor(write_checksum=True).stream_writer(raw) as packed:
        kept = io.TextIOWrapper(packed, encoding="utf-8", write_through=True)
        with held_out.open("w", encoding="utf-8") as held:
            for name, text in stdlib_sources():
                part = "held_out" if is_held_out(name) else "train"
                line = json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n"
                (held if part == "held_out" else kept).write(line)
                counts[f"{part}_files"] += 1
                counts[f"{part}_bytes"] += len(text.encode("utf-8", errors="replace"))
        kept.flush()
    return counts


def write_tasks(held_out: Path, folder: Path) -> list[Path]:
    """Write two lm-eval tasks over the held-out files: bits per byte, and which of four lines comes next."""
    texts = [json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    excerpts = [text[start : start + 1500] for text in texts for start in (len(text) // 3,) if len(text) > 2000]
    _write_jsonl(folder / "bits.jsonl", [{"text": text} for text in rng.sample(excerpts, min(24, len(excerpts)))])
    _write_jsonl(folder / "next_line.jsonl", list(_next_line_questions(texts, rng, 60)))
    return [_bits_task(folder), _next_line_task(folder)]


def _next_line_questions(texts: list[str], rng: random.Random, count: int) -> Iterator[dict[str, object]]:
    lines_of = [[line for line in text.splitlines() if len(line.strip()) > 12] for text in texts]
    lines_of = [lines for lines in lines_of if len(lines) > 40]
    for _ in range(count):
        lines = rng.choice(lines_of)
        at = rng.randrange(8, len(lines) - 1)
        others = [rng.choice(rng.choice(lines_of)) for _ in range(3)]
        answer = rng.randrange(4)
        choices = [*others[:answer], lines[at], *others[answer:]]
        yield {"context": "\n".join(lines[at - 8 : at]) + "\n", "choices": choices, "answer": answer}


def _bits_task(folder: Path) -> Path:
    aggregations = {"bits_per_byte": "bits_per_byte", "byte_perplexity": "weighted_perplexity"}
    metrics = "".join(
        f"  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: false}}\n"
        for metric, aggregation in aggregations.items()
    )
    kind = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    return _write_task(folder, "python_bits", "bits.jsonl", f"{kind}metric_list:\n{metrics}")


def _next_line_task(folder: Path) -> Path:
    metrics = "\n".join(f"  - {{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in ("acc", "acc_norm"))
    return _write_task(
        folder,
        "python_next_line",
        "next_line.jsonl",
        'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\n'
        f'doc_to_target: answer\ntarget_delimiter: ""\nmetric_list:\n{metrics}\n',
    )


def _write_task(folder: Path, name: str, data: str, body: str) -> Path:
    path = folder / f"{name}.yaml"
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder.resolve() / data}\n"
    path.write_text(head + f"test_split: test\n{body}metadata:\n  version: 1.0\n", encoding="utf-8")
    return path


def _write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
