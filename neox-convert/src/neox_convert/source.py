# SPDX-License-Identifier: Apache-2.0
"""Whatever can be converted, opened in one form: configuration, lazy tensors, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from libneox.errors import InputMissing, NeoxError

if TYPE_CHECKING:
    from libneox.checkpoint.lazy import LazyTensor
    from libneox.config import NeoxConfig
    from libneox.model_config import ModelConfig
    from libneox.tokenizer import Tokenizer

Kind = Literal["native", "hf", "neox", "meta", "made"]  # made: by us from several


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """How to open a source, also in another process: plain values only.

    `verified` says that the hashes of a step directory have just been checked.
    """

    kind: Kind
    path: str
    config: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    qkv_layout: str = "auto"
    vocab_size: int | None = None
    seq_length: int | None = None
    verified: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened checkpoint.

    Attributes:
        where: how it was opened.
        config: what the model is.
        tensors: every parameter by logical name, read when loaded.
        neox: its NeoX configuration; None if it has none and `config` is all there is.
        step: of the run it came from.
        notes: facts worth telling.
        details: the object behind, for what only one kind has.
    """

    where: Where
    config: ModelConfig
    tensors: dict[str, LazyTensor]
    neox: NeoxConfig | None
    tokenizer: Tokenizer | None
    step: int
    notes: tuple[str, ...] = ()
    details: Any = None


def open_source(where: Where, tokenizer: str | None = None) -> Source:
    """Open a checkpoint of a known kind.

    Args:
        where: kind, path and options.
        tokenizer: a tokenizer file to use instead of the one found with the checkpoint.
    Raises:
        NeoxError: of the class that fits.
    """
    if where.kind == "native":
        return _open_native(where, tokenizer)
    if where.kind == "hf":
        return _open_hf(where, tokenizer)
    if where.kind == "meta":
        return _open_meta(where, tokenizer)
    return _open_neox(where, tokenizer)


def find_source(path: str) -> Where:
    """Find out what a path holds: a checkpoint of ours, a Hugging Face directory, GPT-NeoX's or Meta's files.

    Raises:
        InputMissing: none of them.
    """
    from libneox import run_directory

    folder = Path(path)
    if (folder / "params.json").is_file() and any(folder.glob("consolidated.*")):
        return Where(kind="meta", path=path)
    ref = run_directory.resolve_checkpoint(path)
    if ref.kind == "legacy":
        return Where(kind="neox", path=str(ref.path))
    if ref.kind == "hf":
        return Where(kind="hf", path=path)
    return Where(kind="native", path=str(ref.path), verified=True)


def _open_native(where: Where, tokenizer: str | None) -> Source:
    from libneox import run_directory
    from libneox.checkpoint.lazy import check_shapes
    from libneox.checkpoint.store import open_tensors
    from libneox.config import load_config

    if where.verified:
        manifest = run_directory.Manifest.read(where.path)
        ref = run_directory.CheckpointRef(Path(where.path), "neox", manifest.step, manifest)
    else:
        ref = run_directory.resolve_checkpoint(where.path)
    neox = load_config([ref.path / run_directory.CONFIG])
    config = neox.model_config()
    tensors = open_tensors(ref.path).lazy()
    check_shapes(str(ref.path), tensors, config.parameter_shapes())
    return Source(
        where=dataclasses.replace(where, path=str(ref.path), verified=True),
        config=config,
        tensors={name: tensors[name] for name in config.parameter_shapes()},
        neox=neox,
        tokenizer=_tokenizer(tokenizer, ref.path),
        step=ref.step or 0,
        details=ref,
    )


def _open_hf(where: Where, tokenizer: str | None) -> Source:
    from libneox.checkpoint.hf import open_hf

    model = open_hf(where.path)
    found = _tokenizer(tokenizer, Path(where.path))
    config, notes = model.config, []
    if found is not None:
        if found.vocab_size <= config.padded_vocab_size:
            config = dataclasses.replace(config, vocab_size=found.vocab_size)
        else:
            rows = config.padded_vocab_size
            notes.append(f"the tokenizer knows {found.vocab_size} ids, the model only {rows}: the last cannot be used")
    return Source(
        where=where,
        config=config,
        tensors=model.specs(),
        neox=None,
        tokenizer=found,
        step=0,
        notes=tuple(notes),
        details=model,
    )


def _open_neox(where: Where, tokenizer: str | None) -> Source:
    from libneox.checkpoint.neox import open_neox
    from libneox.config import load_config
    from libneox.legacy import find_step, named_tokenizer, stored_configs

    step = find_step(Path(where.path))
    configs: Sequence[Any] = where.config or stored_configs(step)
    neox = load_config(list(configs), overrides=where.overrides)
    named = tokenizer or named_tokenizer(neox, [Path(file).parent for file in configs])
    found = _tokenizer(None if named is None else str(named), None)
    vocab_size = where.vocab_size if where.vocab_size is not None else found and found.vocab_size
    legacy = open_neox(
        step,
        config=configs,
        overrides=where.overrides,
        qkv_layout=where.qkv_layout,  # type: ignore[arg-type]
        vocab_size=vocab_size,
    )
    return Source(
        where=dataclasses.replace(where, vocab_size=vocab_size),
        config=legacy.config,
        tensors=legacy.tensors.specs(),
        neox=legacy.neox,
        tokenizer=found,
        step=legacy.iteration or 0,
        notes=legacy.notes,
        details=legacy,
    )


def _open_meta(where: Where, tokenizer: str | None) -> Source:
    from libneox.checkpoint.hf.meta import open_meta

    tensors, config = open_meta(Path(where.path), seq_length=where.seq_length)
    notes: tuple[str, ...] = ()
    try:
        found = _tokenizer(tokenizer, Path(where.path))
    except NeoxError as error:  # Llama 3 comes with a rank file of tiktoken's that is called tokenizer.model
        if tokenizer is not None:
            raise
        found, notes = None, (f"without a tokenizer: {error}; --tokenizer FILE names one",)
    if found is not None and found.vocab_size <= config.padded_vocab_size:
        config = dataclasses.replace(config, vocab_size=found.vocab_size)
    return Source(
        where=where,
        config=config,
        tensors=tensors,
        neox=None,
        tokenizer=found,
        step=0,
        notes=notes,
    )


def _tokenizer(given: str | None, directory: Path | None) -> Tokenizer | None:
    from libneox.tokenizer import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    if directory is None:
        return None
    try:
        return load_tokenizer(directory)
    except InputMissing:
        return None
