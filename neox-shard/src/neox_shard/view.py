# SPDX-License-Identifier: Apache-2.0
"""The samples a training run sees, as text or numbers: the batch viewer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from libneox.cli import refuse_terminal
from libneox.config import NeoxConfig, load_config
from libneox.data.manifest import load_tokenizer_of
from libneox.data.samples import Sample, SampleSet
from libneox.data.splits import NAMES, DataSpec, Splits, build_splits, samples_wanted
from libneox.errors import UsageError
from libneox.files import atomic_write, check_output
from libneox.run_directory import TRAINER, resolve_checkpoint
from libneox.tokenizer import Tokenizer, load_tokenizer
from neox_shard.cat import parse_range

PROG = "neox-shard"
BATCH = 64


def view_samples(
    sources: Sequence[str],
    stdout: BinaryIO,
    *,
    split: str,
    samples: str | None,
    steps: str | None,
    overrides: Sequence[str],
    out: Path | None,
    as_json: bool,
    checkpoint: str | None,
    tokenizer: str | None,
    force: bool,
) -> None:
    """Show samples of the run that a configuration describes.

    Args:
        samples, steps: `A:B`; one of them. A step is one global batch.
        checkpoint: whose stored epochs to use; None for those of a new run.
        out: a .npy file for the tokens, int64 [n, seq_length + 1]; `-` is stdout. None: decoded text on stdout.

    Raises:
        UsageError: no such split, a range outside the run, or no tokenizer to decode with.
    """
    if split not in NAMES:
        raise UsageError(f"--split {split}: is one of {', '.join(NAMES)}")
    if (samples is None) == (steps is None):
        raise UsageError("give either --samples A:B or --steps A:B")
    if out is not None and (as_json or tokenizer is not None):
        raise UsageError("--json and --tokenizer are for text; an array (-o) holds the tokens alone")
    if out is not None and str(out) != "-":
        check_output(out, force=force)
    config = load_config(list(sources), overrides=list(overrides))
    splits, batch = run_splits(config, stored_epochs(checkpoint) if checkpoint else None)
    found: SampleSet | None = getattr(splits, split)
    if found is None:
        raise UsageError(f"--split {split}: this run has no {split} data")
    lo, hi = _bounds(samples, steps, batch, len(found))
    if out is None:
        decoder = load_tokenizer(tokenizer) if tokenizer else _tokenizer(splits, config)
        _print_text(found, lo, hi, decoder, stdout, as_json)
    elif str(out) == "-":
        refuse_terminal(stdout, "a .npy file")
        _write_npy(found, lo, hi, stdout)
    else:
        with atomic_write(out) as file:
            _write_npy(found, lo, hi, file)


def stored_epochs(checkpoint: str) -> dict[str, Any]:
    """The plan that a checkpoint keeps, `Splits.epochs`.

    Raises:
        InputMissing, IntegrityError: there is no sound checkpoint.
        UsageError: it was not written by a training run.
    """
    path = resolve_checkpoint(checkpoint).path / TRAINER
    try:
        epochs: dict[str, Any] = json.loads(path.read_text())["epochs"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--checkpoint {checkpoint}: keeps no order of data; name one that training wrote") from error
    return epochs


def run_splits(config: NeoxConfig, epochs: dict[str, Any] | None = None) -> tuple[Splits, int]:
    """The sets of a run from its beginning, and its global batch.

    The number of epochs that GPT-NeoX's order depends on follows from the run's length, so the configuration must give
    it: train_iters and the batch size.
    """
    batch = config.batch_plan(1).global_batch
    iterations = config.get("train_iters")
    eval_iters, interval = config.get("eval_iters") or 0, config.get("eval_interval") or 0
    if iterations is None:
        splits = build_splits(DataSpec.from_config(config), train_samples=None)
        iterations = len(splits.train or ()) // batch
    train, valid, test = samples_wanted(iterations, batch, interval, eval_iters)
    wanted = None if config.get("train_epochs") else train
    splits = build_splits(config, train_samples=wanted, valid_samples=valid, test_samples=test, epochs=epochs)
    return splits, batch


def _bounds(samples: str | None, steps: str | None, batch: int, length: int) -> tuple[int, int]:
    if samples is not None:
        return parse_range(samples, length, "samples")
    lo, hi = parse_range(steps or "", length // batch, "steps")
    return lo * batch, hi * batch


def _tokenizer(splits: Splits, config: NeoxConfig) -> Tokenizer:
    for prefix in splits.prefixes:
        found = load_tokenizer_of(prefix)
        if found is not None:
            return found
    if config.tokenizer_source:
        return load_tokenizer(config.tokenizer_source)
    raise UsageError(f"{splits.prefixes[0]}: no tokenizer beside it to decode with; name one with --tokenizer FILE")


def _print_text(found: SampleSet, lo: int, hi: int, tokenizer: Tokenizer, stdout: BinaryIO, as_json: bool) -> None:
    for first in range(lo, hi, BATCH):
        read = found.read(range(first, min(first + BATCH, hi)))
        for row in range(len(read.tokens)):
            line = (
                _as_json(first + row, read, row, tokenizer) if as_json else _as_text(first + row, read, row, tokenizer)
            )
            stdout.write(line.encode(errors="replace"))
        stdout.flush()


def _as_text(number: int, read: Sample, row: int, tokenizer: Tokenizer) -> str:
    text = f"--- sample {number}: {read.tokens.shape[1]} tokens"
    if read.labels is not None:
        text += f", {int((read.labels[row, 1:] >= 0).sum())} trained on"
    text += f"\n{tokenizer.decode(read.tokens[row])}\n"
    if read.rejected is not None:
        text += f"--- sample {number}, rejected\n{tokenizer.decode(read.rejected.tokens[row])}\n"
    return text


def _as_json(number: int, read: Sample, row: int, tokenizer: Tokenizer) -> str:
    entry: dict[str, Any] = {
        "sample": number,
        "tokens": read.tokens[row].tolist(),
        "text": tokenizer.decode(read.tokens[row]),
    }
    if read.labels is not None:
        entry["labels"] = read.labels[row].tolist()
    if read.rewards is not None:
        entry["rewards"] = read.rewards[row].tolist()
    if read.rejected is not None:
        entry["rejected"] = {"tokens": read.rejected.tokens[row].tolist()}
    return json.dumps(entry) + "\n"


def _write_npy(found: SampleSet, lo: int, hi: int, file: BinaryIO) -> None:
    """Rows as they are read; the header first, so that memory does not grow with the range."""
    width = found.batch([lo] if hi > lo else []).shape[1]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (hi - lo, width)})
    file.write(header.getvalue())
    for first in range(lo, hi, BATCH):
        file.write(found.batch(range(first, min(first + BATCH, hi))).astype("<i8").tobytes())
