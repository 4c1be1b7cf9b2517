# SPDX-License-Identifier: Apache-2.0
"""What info and verify say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.data.check import check_pair
from libneox.data.manifest import read_manifest, tokenizer_of
from libneox.data.mmap import MMapDataset, pair_paths
from libneox.files import human_bytes
from libneox.progress import Progress

PROG = "neox-shard"


def describe(prefix: Path) -> dict[str, Any]:
    """What is known of a dataset without reading its tokens. Documents are sequences where the index has no more."""
    with MMapDataset(prefix) as data:
        manifest = read_manifest(prefix)
        index_path, data_path = pair_paths(data.prefix)
        tokenizer = tokenizer_of(data.prefix)
        count = len(data)
        return {
            "prefix": str(data.prefix),
            "documents": len(data.doc_idx) - 1 if len(data.doc_idx) > 1 else count,
            "sequences": count,
            "tokens": data.num_tokens,
            "dtype": data.dtype.name,
            "shortest": int(data.sizes.min()) if count else None,
            "longest": int(data.sizes.max()) if count else None,
            "mean": round(data.num_tokens / count, 1) if count else None,
            "bytes": {"bin": data_path.stat().st_size, "idx": index_path.stat().st_size},
            "tokenizer": asdict(manifest.tokenizer) if manifest and manifest.tokenizer else None,
            "tokenizer_file": str(tokenizer) if tokenizer else None,
            "rejects": dict(manifest.rejects) if manifest else None,
            "command": list(manifest.command) if manifest else None,
            "multimodal": data.modes is not None,
            "fingerprint": data.fingerprint,
        }


def print_json(stdout: BinaryIO, value: Any) -> None:
    """One JSON document on one line, in ASCII: a file name may be no UTF-8."""
    stdout.write(json.dumps(value, default=_plain).encode() + b"\n")
    stdout.flush()


def print_table(stdout: BinaryIO, found: Sequence[dict[str, Any]]) -> None:
    """A few lines a dataset, for people."""
    for number, each in enumerate(found):
        tokenizer = each["tokenizer"]
        shown = {
            "documents": f"{each['documents']:,}",
            "sequences": f"{each['sequences']:,}" if each["sequences"] != each["documents"] else "",
            "tokens": f"{each['tokens']:,} ({each['dtype']})",
            "lengths": f"{each['shortest']:,} to {each['longest']:,}, mean {each['mean']:,}"
            if each["sequences"]
            else "",
            "files": f".bin {human_bytes(each['bytes']['bin'])}, .idx {human_bytes(each['bytes']['idx'])}",
            "tokenizer": f"{each['tokenizer_file']} (sha256 {tokenizer['sha256'][:12]}, {tokenizer['vocab_size']} ids)"
            if tokenizer
            else "unknown",
            "left out": ", ".join(f"{count:,} {reason}" for reason, count in (each["rejects"] or {}).items()),
            "made by": " ".join(each["command"] or []),
        }
        lines = [f"{each['prefix']}", *[f"  {name:<10} {text}" for name, text in shown.items() if text]]
        stdout.write(("\n" * (number > 0) + "\n".join(lines) + "\n").encode(errors="surrogateescape"))


def verify_datasets(
    prefixes: Sequence[Path], stdout: BinaryIO, *, vocab_size: int | None, as_json: bool, quiet: bool
) -> None:
    """Check each dataset and print a line for each that is right; the first that is not ends the command."""
    for prefix in prefixes:
        with Progress(PROG, "tokens", quiet=quiet) as progress:
            checked = check_pair(prefix, vocab_size=vocab_size, progress=progress.update)
        if as_json:
            print_json(stdout, {"prefix": str(prefix), "ok": True, **asdict(checked)})
            continue
        hashes = "files as written" if checked.hashed else "no manifest, hashes not checked"
        largest = "" if checked.largest is None else f", largest id {checked.largest}"
        if checked.largest is not None and checked.vocab_size is not None:
            largest += f" of {checked.vocab_size}"
        line = f"{prefix}: ok: {checked.documents:,} documents, {checked.tokens:,} tokens{largest}; {hashes}\n"
        stdout.write(line.encode(errors="surrogateescape"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")
