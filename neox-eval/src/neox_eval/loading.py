# SPDX-License-Identifier: Apache-2.0
"""From a path to a model, its tokenizer and what identifies them."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from libneox.errors import InputMissing, UsageError
from neox_eval.tokens import HarnessTokens

if TYPE_CHECKING:
    from libneox.model import Transformer

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model ready to be asked."""

    model: Transformer
    tokens: HarnessTokens
    identity: str  # changes with the weights


def load(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
    local_rank: int = 0,
) -> Loaded:
    """Load a checkpoint or Hugging Face directory with its tokenizer.

    Args:
        device: cpu, cuda, cuda:N; None: a GPU if there is one.
        dtype: one of DTYPES; auto is the stored type.
        tokenizer: read it from here instead.
        local_rank: which of the machine's GPUs is this process's.
    Raises:
        InputMissing: no checkpoint or no tokenizer there.
    """
    import torch

    import libneox
    from libneox import run_directory

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    ref = run_directory.resolve_checkpoint(source)
    try:
        tokens = HarnessTokens.load(tokenizer or ref.path, beside=ref.path)
    except InputMissing as error:
        raise InputMissing(f"{source}: no tokenizer there ({error}); name one with --tokenizer") from error
    model = libneox.load_model(
        ref.path,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        device=choose_device(device, local_rank),
    )
    return Loaded(model, tokens, _identity(ref.path, tokens))


def choose_device(wanted: str | None, local_rank: int = 0) -> str:
    """A device that is there: the wanted one, else this process's GPU, else the CPU."""
    import torch

    if wanted is None or wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            if wanted is not None:
                print(f"neox-eval: no GPU here; {wanted} becomes cpu", file=sys.stderr)
            return "cpu"
        if wanted is None or wanted in ("cuda", "cuda:0"):  # the harness asks for cuda:0 on every rank
            return f"cuda:{local_rank % torch.cuda.device_count()}"
    return wanted or "cpu"


def _identity(path: Path, tokens: HarnessTokens) -> str:
    """A hash that changes with the weights: of a checkpoint's manifest, or of names, sizes and times of the files."""
    digest = hashlib.sha256(tokens.base.fingerprint.encode())
    manifest = path / "manifest.json"
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    else:
        for file in sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        if (path / "config.json").is_file():
            digest.update((path / "config.json").read_bytes())
    return digest.hexdigest()[:32]
