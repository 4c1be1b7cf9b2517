# SPDX-License-Identifier: Apache-2.0
"""From a path to a model, its tokenizer and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from libneox.errors import InputMissing
from libneox.run_directory import MANIFEST
from neox_eval.tokens import HarnessTokens

if TYPE_CHECKING:
    from libneox.model import Transformer
    from libneox.run_directory import CheckpointRef
    from neox_eval.ranks import Ranks


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
    ranks: Ranks | None = None,
) -> Loaded:
    """Load a checkpoint of ours or of GPT-NeoX, or a Hugging Face directory, with its tokenizer.

    Args:
        device: cpu, cuda, cuda:N; None: a GPU if there is one.
        dtype: see `load_packed`.
        tokenizer: read it from here instead.
        ranks: the processes of the evaluation, which may hold the model together.
    Raises:
        InputMissing: no checkpoint or no tokenizer there.
        UsageError: no such device or dtype.
    """
    from libneox import cli, run_directory
    from libneox.generation.prepack import load_packed

    def warn(message: str) -> None:
        cli.warn("neox-eval", message)

    ref = run_directory.resolve_checkpoint(source, warn=warn)
    try:
        tokens = HarnessTokens.load(tokenizer or ref.path, beside=ref.path)
    except InputMissing as error:
        raise InputMissing(f"{source}: no tokenizer there ({error}); name one with --tokenizer") from error
    where = choose_device(device, 0 if ranks is None else ranks.local_rank)
    shard = None if ranks is None else ranks.shard(where)
    model = load_packed(ref, device=where, dtype=dtype, vocab_size=tokens.base.vocab_size, warn=warn, shard=shard)
    return Loaded(model, tokens, _identity(ref, tokens))


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


def _identity(ref: CheckpointRef, tokens: HarnessTokens) -> str:
    """A hash that changes with the tokenizer, its settings, and the weights.

    Of those: of a checkpoint's manifest, or of names, sizes and times of the files.
    """
    from libneox.legacy import find_step, stored_configs

    said = [tokens.base.fingerprint, tokens.bos_token, tokens.eos_token, tokens.templates]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    if ref.manifest is not None:
        digest.update((ref.path / MANIFEST).read_bytes())
    elif ref.kind == "hf":
        _add_status(digest, sorted(ref.path.glob("*.safetensors")) or sorted(ref.path.glob("*.bin")))
        digest.update((ref.path / "config.json").read_bytes())
    else:
        step = find_step(ref.path)
        _add_status(digest, sorted(step.glob("*_model_states.pt")))
        for file in stored_configs(step):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _add_status(digest: Any, files: Sequence[Path]) -> None:
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
