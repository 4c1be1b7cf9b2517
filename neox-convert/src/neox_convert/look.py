# SPDX-License-Identifier: Apache-2.0
"""Look into checkpoints: `inspect` and `diff`, on any format that can be read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from libneox.errors import DataError, IntegrityError
from libneox.files import human_bytes
from neox_convert.source import Source, find_source, open_source

if TYPE_CHECKING:
    import torch

    from libneox.checkpoint.lazy import LazyTensor

KINDS = {
    "native": "a checkpoint of neox-train",
    "hf": "a Hugging Face model",
    "neox": "a checkpoint of GPT-NeoX",
    "meta": "Meta's files",
    "file": "a single file",
}


def inspect(path: str, *, hashes: bool, as_json: bool, stdout: BinaryIO) -> None:
    """Print what a checkpoint, or one file of tensors, holds."""
    kind, tensors, source = _open(path)
    rows = [_row(name, tensor, hashes) for name, tensor in tensors.items()]
    total = {
        "path": path,
        "kind": kind,
        "tensors": len(rows),
        "parameters": sum(math.prod(row["shape"]) for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }
    if source is not None:
        total |= {"step": source.step, "config": _config(source), "notes": list(source.notes)}
    if as_json:
        stdout.write(json.dumps(total | {"entries": rows}).encode() + b"\n")
        return
    head = f"{path}: {KINDS[kind]}, {total['parameters']:,} parameters in {len(rows)} tensors"
    lines = [f"{head}, {human_bytes(total['bytes'])}", *(f"note: {note}" for note in total.get("notes", []))]
    lines += [_line(row, max((len(row["name"]) for row in rows), default=0)) for row in rows]
    stdout.write("\n".join(lines).encode(errors="surrogateescape") + b"\n")


def diff(first: str, second: str, *, as_json: bool, stdout: BinaryIO) -> None:
    """Compare two checkpoints of any formats tensor by tensor, and print what differs.

    Raises:
        IntegrityError: they differ; the table is printed first.
    """
    mine, theirs = _open(first)[1], _open(second)[1]
    changes = [
        _change(name, mine.get(name), theirs.get(name)) for name in [*mine, *(n for n in theirs if n not in mine)]
    ]
    changes = [change for change in changes if change]
    equal = len(set(mine) & set(theirs)) - sum("max_abs_diff" in change for change in changes)
    if as_json:
        stdout.write(
            json.dumps({"first": first, "second": second, "equal": equal, "changes": changes}).encode() + b"\n"
        )
    else:
        lines = [f"{change['name']}: {change['what']}" for change in changes]
        stdout.write("\n".join([*lines, f"{equal} tensors equal, {len(changes)} differ"]).encode() + b"\n")
    stdout.flush()
    if changes:
        raise IntegrityError(f"{first} and {second} differ in {len(changes)} tensors, first {changes[0]['name']}")


def _open(path: str) -> tuple[str, Mapping[str, LazyTensor], Source | None]:
    if Path(path).is_file():
        return "file", _one_file(Path(path)), None
    where = find_source(path)
    source = open_source(where)
    return where.kind, source.tensors, source


def _one_file(path: Path) -> dict[str, LazyTensor]:
    from libneox.checkpoint.hf.reader import safetensors_of
    from libneox.checkpoint.neox.torchfile import TorchFile

    if path.suffix == ".safetensors":
        return safetensors_of(path)
    found: dict[str, LazyTensor] = {}
    _flatten(TorchFile(path).read(), "", found)
    if not found:
        raise DataError(f"{path}: holds no tensors")
    return found


def _flatten(value: Any, at: str, found: dict[str, LazyTensor]) -> None:
    from libneox.checkpoint.lazy import LazyTensor

    if isinstance(value, LazyTensor):
        found[at] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{at}/{key}" if at else str(key), found)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _flatten(item, f"{at}/{i}" if at else str(i), found)


def _row(name: str, tensor: LazyTensor, hashes: bool) -> dict[str, Any]:
    row = {"name": name, "dtype": _dtype(tensor), "shape": list(tensor.shape), "bytes": tensor.nbytes}
    if hashes:
        row["sha256"] = tensor_sha256(tensor.load())
    return row


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hex sha256 of a tensor's values as they stand in memory, row by row."""
    import torch

    return hashlib.sha256(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())).hexdigest()


def _line(row: Mapping[str, Any], width: int) -> str:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    size = human_bytes(row["bytes"])
    return f"{row['name']:<{width}}  {row['dtype']:<8}  {shape:<16}  {size:>9}  {row.get('sha256', '')}".rstrip()


def _dtype(tensor: LazyTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(source: Source) -> dict[str, Any]:
    from libneox.checkpoint.hf.neox_keys import neox_keys_of

    return neox_keys_of(source.config)


def _change(name: str, mine: LazyTensor | None, theirs: LazyTensor | None) -> dict[str, Any] | None:
    if mine is None or theirs is None:
        return {"name": name, "what": "only in the second" if mine is None else "only in the first"}
    if mine.shape != theirs.shape:
        return {"name": name, "what": f"shape {mine.shape} against {theirs.shape}", "max_abs_diff": None}
    a, b = mine.load(), theirs.load()
    if mine.dtype == theirs.dtype and tensor_sha256(a) == tensor_sha256(b):
        return None
    worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    dtypes = f" ({_dtype(mine)} against {_dtype(theirs)})" if mine.dtype != theirs.dtype else ""
    number = worst if math.isfinite(worst) else None  # JSON has no NaN
    return {"name": name, "what": f"differs by at most {worst:.3g}{dtypes}", "max_abs_diff": number}
