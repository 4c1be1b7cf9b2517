# SPDX-License-Identifier: Apache-2.0
"""What a run reads: its samples, its tokenizer, and the model those and the checkpoint ask for."""

from __future__ import annotations

import contextlib
import dataclasses

from libneox.config import NeoxConfig
from libneox.data.manifest import load_tokenizer_of, read_manifest
from libneox.data.splits import Splits, build_splits, samples_wanted
from libneox.errors import InputMissing, UsageError
from libneox.model_config import ModelConfig
from libneox.run_directory import CheckpointRef
from libneox.tokenizer import Tokenizer, load_tokenizer
from neox_train.resume import Start, check_same_model, stored_config
from neox_train.state import TrainState


def open_data(config: NeoxConfig, state: TrainState, global_batch: int) -> tuple[Splits, int]:
    """The sample sets and the length of the run in steps."""
    keys = config.train
    if keys.train_iters is None and keys.train_epochs is None:
        raise UsageError("train_iters: is not set; set it, or train_epochs")
    iters = keys.train_iters or 0
    train, valid, test = samples_wanted(iters, global_batch, keys.eval_interval, keys.eval_iters)
    left = max(0, iters - state.step) * global_batch
    wanted = max(train, state.samples + left)  # after a change of the global batch the two differ
    splits = build_splits(
        config,
        train_samples=None if keys.train_iters is None else max(1, wanted),
        valid_samples=valid,
        test_samples=test,
        epochs=state.epochs or None,
    )
    assert splits.train is not None
    if keys.train_iters is None:
        iters = len(splits.train) // global_batch
    return splits, iters


def check_same_data(state: TrainState, splits: Splits, start: Start) -> None:
    """Raise UsageError if a run goes on over data that is not what it began with, under whatever name."""
    assert splits.train is not None
    found = splits.train.fingerprint
    if start.own and state.data_fingerprint not in (None, found):
        raise UsageError(
            f"{', '.join(map(str, splits.prefixes))}: the training data, its order or seq_length changed since step "
            f"{state.step}; put it back, or begin another run with `save` elsewhere and `load`, finetune: true"
        )
    state.data_fingerprint = found


def find_tokenizer(config: NeoxConfig, splits: Splits, source: CheckpointRef | None) -> Tokenizer | None:
    """The configured tokenizer, else the one beside the data, else the checkpoint's.

    Raises:
        UsageError: it is not the one that made the data.
    """
    tokenizer = None
    if config.tokenizer_source:
        tokenizer = load_tokenizer(config.tokenizer_source)
    for prefix in splits.prefixes:
        if tokenizer is None:
            tokenizer = load_tokenizer_of(prefix)
        manifest = read_manifest(prefix)
        recorded = manifest.tokenizer if manifest is not None else None
        if tokenizer is not None and recorded is not None and recorded.sha256 != tokenizer.fingerprint:
            raise UsageError(
                f"{prefix}: made with tokenizer {recorded.sha256[:16]}, not with {tokenizer.fingerprint[:16]} "
                f"({config.tokenizer_source or 'of the other data'}); tokenize it again, or leave the tokenizer out"
            )
    if tokenizer is None and source is not None:
        with contextlib.suppress(InputMissing):
            tokenizer = load_tokenizer(source.path)
    return tokenizer


def resolve_model(config: NeoxConfig, tokenizer: Tokenizer | None, source: CheckpointRef | None) -> ModelConfig:
    """The model: its vocabulary from the tokenizer, its padding from the checkpoint if it comes from one."""
    if tokenizer is None and config.get("vocab_size") is None and config.get("padded_vocab_size") is None:
        raise UsageError("vocab_file: no tokenizer beside the data; name it with vocab_file, or set vocab_size")
    vocab_size = config.get("vocab_size") or (tokenizer.vocab_size if tokenizer is not None else None)
    ours = config.model_config(vocab_size)
    if source is None:
        return ours
    if source.kind == "hf":
        from libneox.checkpoint.hf import open_hf

        stored = open_hf(source.path).config
    else:
        stored = stored_config(source.path).model_config()
    if config.get("padded_vocab_size") is None:
        ours = dataclasses.replace(ours, padded_vocab_size=stored.padded_vocab_size)
    if config.get("qk_norm_groups") is None:
        ours = dataclasses.replace(ours, qk_norm_groups=stored.qk_norm_groups)
    if ours.vocab_size > ours.padded_vocab_size:
        raise UsageError(
            f"{source.path}: its embedding has {ours.padded_vocab_size} rows, the tokenizer {ours.vocab_size} ids"
        )
    check_same_model(ours, stored, source.path)
    return ours
