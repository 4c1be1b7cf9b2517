# SPDX-License-Identifier: Apache-2.0
"""Prove a conversion before it is committed: by logits against transformers, or else by the tensors themselves.

Logits are compared in a child process, so that the converter itself never imports transformers and its memory stays
small. The child runs our model of one side and transformers' of the other in float32, on random tokens and, if there
is a tokenizer, on text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.errors import IntegrityError
from neox_convert.source import Where

if TYPE_CHECKING:
    from libneox.checkpoint.lazy import LazyTensor

TOLERANCE = 1e-4  # on logits up to 10, where float32 in another order of operations stays below 1e-5
RELATIVE_TOLERANCE = 1e-5  # of the largest logit, beyond
CHILD_TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the child compares.

    Attributes:
        ours: what our model reads: the source of to-hf, the result of from-hf.
        dtype: to which its tensors are rounded first, as the export was; None for none.
        theirs: the Hugging Face directory that transformers reads.
        tokenizer: the one used instead of that found with `ours`, if any.
        check_tokenizer: whether AutoTokenizer on `theirs` must give the ids of this tokenizer.
        rows: vocabulary entries to compare.
        length: longest sequence.
        parameters: their number, for an estimate of the memory needed.
    """

    ours: Where
    dtype: str | None
    theirs: str
    tokenizer: str | None
    check_tokenizer: bool
    rows: int
    length: int
    parameters: int


def verify(
    source: Mapping[str, LazyTensor],
    result: Callable[[], Mapping[str, LazyTensor]],
    job: Job | None,
) -> str:
    """Check a result, and return a sentence that says how it was done and what came out.

    Args:
        source: tensors that were to be written, by name.
        result: gives the tensors of the result under the same names.
        job: the comparison of logits, or None where no other program can read either side.
    Raises:
        IntegrityError: it differs.
    """
    reason = "no other program reads either side" if job is None else _why_no_logits(job)
    if job is None or reason:
        count = compare_tensors(source, result())
        return f"verified: {count} tensors read back equal, bit by bit ({reason})"
    # -P: the current directory may be the model's, and hold a torch.py
    command = [sys.executable, "-P", "-m", "neox_convert.verify_child"]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(job)).encode(),
            capture_output=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
    except subprocess.TimeoutExpired as error:
        hours = CHILD_TIMEOUT_S / 3600
        raise IntegrityError(f"{job.theirs}: not compared within {hours:.0f} h; --no-verify keeps it anyway") from error
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise IntegrityError(f"{job.theirs}: the check of the result failed (code {child.returncode}): {last}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if not answer["equal"]:
        raise IntegrityError(f"{job.theirs}: {answer['what']}; nothing was kept")
    return f"verified: {answer['what']}"


def _why_no_logits(job: Job) -> str:
    """Why logits are not compared; empty if they are."""
    if importlib.util.find_spec("transformers") is None:
        return "logits not compared: transformers is not installed"
    wanted, free = int(1.3 * 4 * job.parameters) + 500_000_000, available_bytes()
    if wanted > free:
        return f"logits not compared: {wanted / 1e9:.1f} GB of memory needed, {free / 1e9:.1f} GB free"
    return ""


def available_bytes(root: Path = Path("/")) -> int:
    """Memory this process may still take: what the machine has free, and what its control group allows.

    Cached pages of files count as free in both: those just written here fill the group's, and go when room is needed.
    """
    free = _figures(root / "proc/meminfo")["MemAvailable:"] * 1024
    for folder, limit, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = root / folder
        try:
            taken = int((group / used).read_text()) - _figures(group / "memory.stat")[cached]
            free = min(free, int((group / limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            continue
    return max(free, 0)


def _figures(path: Path) -> dict[str, int]:
    """Lines `NAME NUMBER ...` of a file of the kernel's."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}


def compare_tensors(source: Mapping[str, LazyTensor], result: Mapping[str, LazyTensor]) -> int:
    """Read every tensor of `source` and its counterpart, and compare bit by bit; returns how many.

    The result may hold more: zero biases and copies of shared norms that its format calls for.

    Raises:
        IntegrityError: names the first that differs.
    """
    import torch

    if lost := set(source) - set(result):
        raise IntegrityError(f"{min(lost)} is missing in the result; nothing was kept")
    for name, spec in source.items():
        mine, theirs = spec.load(), result[name].load()
        same = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        # bytes, not values: NaN equals itself, and -0.0 is not 0.0
        if not same or not torch.equal(_bytes(mine), _bytes(theirs)):
            raise IntegrityError(f"{name} was written differently from what was read; nothing was kept")
    return len(source)


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
