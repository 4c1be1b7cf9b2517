# SPDX-License-Identifier: Apache-2.0
"""Reading every byte of a pair, to find what opening it cannot: wrong offsets, impossible ids, changed bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from libneox.data.manifest import (
    Manifest,
    load_tokenizer_of,
    manifest_path,
    read_manifest,
)
from libneox.data.mmap import MMapDataset, pair_paths
from libneox.errors import DataError, IntegrityError
from libneox.files import FileRecord, sha256_file

_ENTRIES = 1 << 20
_TOKENS = 1 << 24


@dataclass(frozen=True)
class Checked:
    """What `check_pair` found to be right.

    Attributes:
        sequences, documents, tokens: counts.
        largest: the largest id, None if there are no tokens.
        vocab_size: what it was held against, None if unknown.
        hashed: whether the files were compared with the hashes of a manifest.
    """

    sequences: int
    documents: int
    tokens: int
    largest: int | None
    vocab_size: int | None
    hashed: bool


def check_pair(
    prefix: str | os.PathLike[str], *, vocab_size: int | None = None, progress: Callable[[int], None] = lambda n: None
) -> Checked:
    """Check everything about a pair.

    Args:
        vocab_size: ids must be below it; by default the manifest's tokenizer decides.
        progress: called with the number of tokens looked at since the last call.

    Raises:
        DataError: lengths, offsets or the document index contradict each other; an id is not below the vocabulary size.
        IntegrityError: a file is not the one its manifest describes.
    """
    with MMapDataset(prefix) as data:
        manifest = read_manifest(prefix)
        _check_offsets(data)
        documents = check_documents(data)
        if manifest is not None:
            _check_manifest(data, manifest)
        tokenizer = manifest.tokenizer if manifest is not None else None
        if vocab_size is None and tokenizer is not None:
            vocab_size = tokenizer.vocab_size
        load_tokenizer_of(prefix)
        largest = _check_ids(data, vocab_size, progress) if data.dtype.kind in "iu" else None
        return Checked(len(data), documents, data.num_tokens, largest, vocab_size, manifest is not None)


def document_of(data: MMapDataset, token: int) -> tuple[int, int]:
    """The sequence that holds a token of the file, and the token's offset in it."""
    start = token * data.dtype.itemsize
    sequence = int(np.searchsorted(data.pointers, start, side="right")) - 1
    return sequence, token - int(data.pointers[sequence]) // data.dtype.itemsize


def _check_offsets(data: MMapDataset) -> None:
    expected = 0
    for start in range(0, len(data), _ENTRIES):
        sizes = data.sizes[start : start + _ENTRIES].astype(np.int64)
        if int(sizes.min()) < 0:
            at = start + int(sizes.argmin())
            raise DataError(f"{data.prefix}.idx: sequence {at} has the length {sizes.min()}; write the pair again")
        ends = expected + np.cumsum(sizes) * data.dtype.itemsize
        wrong = np.flatnonzero(data.pointers[start : start + _ENTRIES] != np.concatenate(([expected], ends[:-1])))
        if len(wrong):
            at = start + int(wrong[0])
            raise DataError(
                f"{data.prefix}.idx: the offset of sequence {at} is {int(data.pointers[at])}, not the end of the one "
                "before it; write the pair again"
            )
        expected = int(ends[-1])


def check_documents(data: MMapDataset) -> int:
    """The number of documents. GPT-NeoX's own merge tool leaves only the first entry, which is let pass.

    Raises:
        DataError: the document index does not run from 0 to the last sequence.
    """
    entries = data.doc_idx
    if len(entries) == 0 or int(entries[0]) != 0:
        raise DataError(f"{data.prefix}.idx: the document index does not begin with 0; write the pair again")
    if len(entries) == 1:
        return len(data)
    for start in range(0, len(entries) - 1, _ENTRIES):
        steps = np.diff(entries[start : start + _ENTRIES + 1])
        if int(steps.min()) < 0:
            at = start + int(steps.argmin())
            raise DataError(f"{data.prefix}.idx: document {at} ends before it begins; write the pair again")
    if int(entries[-1]) != len(data):
        raise DataError(
            f"{data.prefix}.idx: its documents end at sequence {int(entries[-1])}, but there are {len(data)}; "
            "write the pair again"
        )
    return len(entries) - 1


def _check_manifest(data: MMapDataset, manifest: Manifest) -> None:
    index_path, data_path = pair_paths(data.prefix)
    for path, record in ((index_path, manifest.idx), (data_path, manifest.bin)):
        found = FileRecord(path.stat().st_size, sha256_file(path))
        if found != record:
            raise IntegrityError(
                f"{path}: not the file that {manifest_path(data.prefix).name} describes (sha256 {found.sha256[:12]}, "
                f"{found.bytes} bytes, instead of {record.sha256[:12]}, {record.bytes}); copy or write the pair again"
            )
    facts = (manifest.sequences, manifest.tokens, manifest.dtype)
    if facts != (len(data), data.num_tokens, data.dtype.name):
        raise IntegrityError(f"{manifest_path(data.prefix)}: its counts {facts} do not fit the pair; write it again")


def _check_ids(data: MMapDataset, vocab_size: int | None, progress: Callable[[int], None]) -> int | None:
    largest = smallest = None
    for start in range(0, data.num_tokens, _TOKENS):
        block: np.ndarray[Any, Any] = data.tokens[start : start + _TOKENS]
        top, bottom = int(block.max()), int(block.min())
        largest = top if largest is None else max(largest, top)
        smallest = bottom if smallest is None else min(smallest, bottom)
        if vocab_size is not None and (top >= vocab_size or bottom < 0):
            at = start + int(np.flatnonzero((block >= vocab_size) | (block < 0))[0])
            sequence, offset = document_of(data, at)
            raise DataError(
                f"{data.prefix}.bin: document {sequence}, token {offset}: id {int(data.tokens[at])} is outside the "
                f"vocabulary of {vocab_size}; tokenize it with the right tokenizer"
            )
        progress(len(block))
    return largest
