# SPDX-License-Identifier: Apache-2.0
"""Reading PREFIX.bin/PREFIX.idx, the datasets of GPT-NeoX and Megatron (MMIDIDX version 1).

`.bin` holds the tokens of all sequences back to back. `.idx` is little-endian and unaligned:

    0         9 bytes   "MMIDIDX" and two NULs
    9         u64       version, 1
    17        u8        dtype code of the tokens, see CODES
    18        u64       n, number of sequences
    26        u64       nd, number of entries of the document index
    34        i32 x n   tokens of each sequence
    34+4n     i64 x n   byte offset of each sequence in .bin
    34+12n    i64 x nd  document index: 0, then the number of sequences after each document
    34+12n+8nd i8 x n   only Megatron-core multimodal: mode of each sequence

Like GPT-NeoX, training treats each sequence as a document; the document index is kept and checked, not trained by.
Codes 6 and 7 mean float32 and float64 to GPT-NeoX but the reverse to Megatron-core; the lengths tell which is meant.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from libneox.data.mapping import map_file
from libneox.errors import DataError, InputMissing, UsageError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
_FINGERPRINT_BLOCKS, _FINGERPRINT_BYTES = 64, 4096
Array = np.ndarray[Any, Any]


class MMapDataset:
    """A pair, opened for reading: in constant time and memory, whatever its size.

    What can be wrong without reading every entry is found here; `libneox.data.check` reads everything.

    Attributes:
        prefix: the path without `.bin` or `.idx`.
        dtype: numpy dtype of the tokens.
        sizes: tokens of each sequence, int32 [n].
        pointers: byte offset of each sequence, int64 [n].
        doc_idx: document index, int64 [nd].
        modes: int8 [n] of a multimodal Megatron-core pair, else None.
        tokens: all tokens in file order, dtype [total].

    Raises:
        InputMissing: a file of the pair is missing.
        DataError: it is no pair, or the two files do not fit together.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = strip_suffix(prefix)
        index_path, data_path = pair_paths(self.prefix)
        index = _map_index(index_path, data_path)
        code, count, documents = _read_header(index, index_path)
        self.sizes, self.pointers, self.doc_idx, self.modes = _sections(index, index_path, count, documents)
        data = map_file(data_path)
        self.dtype = _token_dtype(code, self.sizes, self.pointers, data.size, index_path, data_path)
        self.tokens: Array = data.view(self.dtype)
        self._index: Array = index

    def __len__(self) -> int:
        return len(self.sizes)

    def __enter__(self) -> MMapDataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; views handed out before stay valid."""
        empty = np.empty(0, np.int64)
        self.sizes, self.pointers, self.doc_idx, self.tokens, self._index = empty, empty, empty, empty, empty

    @property
    def num_tokens(self) -> int:
        """Tokens in `.bin`."""
        return len(self.tokens)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> Array:
        """Return `length` tokens of sequence `i` from `offset` on (all the rest by default), a read-only view.

        Raises:
            DataError: the index points outside `.bin`.
        """
        size = int(self.sizes[i])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"{self.prefix}: sequence {i} has {size} tokens, asked for {offset}:{offset + length}")
        start, rest = divmod(int(self.pointers[i]), self.dtype.itemsize)
        if rest or start < 0 or start + size > len(self.tokens):
            raise DataError(f"{self.prefix}.idx: sequence {i} lies outside {self.prefix}.bin; run neox-shard verify")
        return self.tokens[start + offset : start + offset + length]

    @functools.cached_property
    def contiguous(self) -> bool:
        """Whether the lengths add up to `.bin`, so that sequences lie back to back, as every known writer does it."""
        return int(self.sizes.sum(dtype=np.int64)) == len(self.tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest that tells datasets apart in constant time: lengths, and 64 blocks spread over each file."""
        digest = hashlib.sha256()
        for data in (self._index, self.tokens.view(np.uint8)):
            digest.update(struct.pack("<Q", data.size))
            last = max(data.size - _FINGERPRINT_BYTES, 0)
            for start in sorted({last * k // (_FINGERPRINT_BLOCKS - 1) for k in range(_FINGERPRINT_BLOCKS)}):
                digest.update(data[start : start + _FINGERPRINT_BYTES].tobytes())
        return digest.hexdigest()


def pair_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """PREFIX.idx and PREFIX.bin."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")


def strip_suffix(path: str | os.PathLike[str]) -> Path:
    """The prefix of a pair, also when the user named one of its files.

    Raises:
        UsageError: there is no name in it (`.`, `/`).
    """
    path = Path(path)
    if not path.name:
        raise UsageError(f"{path}: is no name of a dataset; give a prefix such as data/pile")
    return path.with_name(path.name[:-4]) if path.suffix in (".bin", ".idx") else path


def described_bytes(index_path: Path) -> int:
    """The length that an index says its .bin has.

    Raises:
        InputMissing, DataError: there is no index, or it is damaged.
    """
    index = map_file(index_path)
    code, count, documents = _read_header(index, index_path)
    sizes, pointers, _, _ = _sections(index, index_path, count, documents)
    return int(pointers[-1]) + int(sizes[-1]) * np.dtype(CODES[code]).itemsize if count else 0


def _map_index(index_path: Path, data_path: Path) -> Array:
    if not index_path.exists():
        if data_path.exists():
            raise InputMissing(
                f"{index_path}: missing beside {data_path.name}; the pair was never committed, write it again"
            )
        raise InputMissing(f"{index_path}: no such file; a dataset is named by its prefix, without .bin or .idx")
    return map_file(index_path)


def _read_header(index: Array, path: Path) -> tuple[int, int, int]:
    head = index[: HEADER.size].tobytes()
    if head[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise DataError(
            f"{path}: legacy 'cached' dataset (TNTIDX), which is not read; make it again from its text with "
            "neox-tokenize | neox-shard"
        )
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise DataError(f"{path}: not a neox index (bad magic, expected MMIDIDX)")
    if len(head) < HEADER.size:
        raise DataError(f"{path}: truncated: {len(head)} bytes, the header alone has {HEADER.size}; copy it again")
    _, version, code, count, documents = HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path}: not a neox index this version reads (format version {version}, expected 1)")
    if code not in CODES:
        raise DataError(f"{path}: not a neox index (unknown dtype code {code}, expected 1 to 8)")
    return code, count, documents


def _sections(index: Array, path: Path, count: int, documents: int) -> tuple[Array, Array, Array, Array | None]:
    pointers_at = HEADER.size + 4 * count
    documents_at = pointers_at + 8 * count
    end = documents_at + 8 * documents
    if index.size not in (end, end + count):
        state = "truncated" if index.size < end else "too long"
        raise DataError(
            f"{path}: {state}: {index.size} bytes where {count} sequences and {documents} document entries "
            f"need {end}; copy or write it again"
        )
    sizes = index[HEADER.size : pointers_at].view("<i4")
    pointers = index[pointers_at:documents_at].view("<i8")
    doc_idx = index[documents_at:end].view("<i8")
    return sizes, pointers, doc_idx, index[end:].view("i1") if index.size > end else None


def _token_dtype(code: int, sizes: Array, pointers: Array, data_bytes: int, index: Path, data: Path) -> np.dtype[Any]:
    """The dtype that makes the last sequence end where `.bin` ends."""
    expected = 0
    for candidate in {6: (6, 7), 7: (7, 6)}.get(code, (code,)):
        dtype = np.dtype(CODES[candidate])
        expected = int(pointers[-1]) + int(sizes[-1]) * dtype.itemsize if len(sizes) else 0
        first = int(pointers[0]) if len(sizes) else 0
        if expected == data_bytes and first == 0 and data_bytes % dtype.itemsize == 0:
            if len(sizes) < 2 or int(pointers[1]) == int(sizes[0]) * dtype.itemsize:
                return dtype
            expected = -1
    if expected == data_bytes or expected < 0:
        raise DataError(f"{index}: the offsets do not follow from the lengths; write the pair again")
    state = "shorter" if data_bytes < expected else "longer"
    raise DataError(
        f"{data}: {data_bytes} bytes, {state} than the {expected} that {index.name} describes; the pair does not "
        "belong together or was cut, copy or write it again"
    )
