# SPDX-License-Identifier: Apache-2.0
"""Writing a pair so that it appears whole or not at all.

Everything is written under unfinished names beside the output and synced; then the sidecars, PREFIX.bin and last
PREFIX.idx are renamed into place. The name PREFIX.idx is the commit mark: a reader that finds it finds a whole pair.
A lock keeps two writers apart; the kernel drops the lock of a writer that died, and the next one clears its leavings.
Lengths and offsets never stand in memory: they go to files as they come.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from libneox.data.manifest import (
    SUFFIXES,
    Manifest,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    tokenizer_path,
)
from libneox.data.mmap import CODES, HEADER, MAGIC, pair_paths, strip_suffix
from libneox.errors import DataError, NeoxError, OutputExists, UsageError
from libneox.files import CHUNK_BYTES, FileRecord, check_output, fsync_directory

LONGEST = 2**31 - 1  # tokens in a sequence: .idx stores int32
_BLOCK = 1 << 20  # entries of the index handled at a time
_NAME_BYTES = 255  # of a file name, on every common file system
Array = np.ndarray[Any, Any]


class DatasetWriter:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json. Use as a context manager and call `commit` inside it.

    Leaving the block without a commit, or by an exception, leaves nothing behind and an older output untouched.

    Args:
        prefix: output path without suffix.
        dtype: of the tokens; values given in another integer type are checked, never wrapped.
        force: replace an existing output.
        tokenizer: which tokenizer made the ids, for the manifest.
        tokenizer_data: its file's bytes, put beside the pair.

    Raises:
        OutputExists: the output exists, cannot be created, or another process is writing it.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: Any,
        *,
        force: bool = False,
        tokenizer: TokenizerRecord | None = None,
        tokenizer_data: bytes | None = None,
    ):
        self.prefix = strip_suffix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.sequences = self.documents = self.tokens = 0
        self._code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        self._tokenizer, self._tokenizer_data = tokenizer, tokenizer_data
        self._temporary: dict[str, Path] = {}
        self._open: list[BinaryIO] = []
        self._hash = hashlib.sha256()
        check_prefix(self.prefix, force=force)
        self._lock = _Lock(self.prefix)
        try:
            check_prefix(self.prefix, force=force)  # another writer may have finished while we waited for nothing
            if tokenizer is not None and tokenizer_data is not None:
                _check_tokenizer(self.prefix, tokenizer.kind, tokenizer_data, force=force)
            self._bin = self._create("bin")
            self._idx = self._create("idx")
            self._idx.write(bytes(HEADER.size))
            self._documents: BinaryIO | None = None  # made when a document holds other than one sequence
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def add(self, values: Array, lengths: Array, documents: Array | None = None) -> None:
        """Append sequences.

        Args:
            values: their tokens, one sequence behind the other, 1-D.
            lengths: tokens of each sequence, summing to len(values).
            documents: sequences of each document, summing to len(lengths); by default each sequence is one.

        Raises:
            DataError: a value does not fit the dtype, or a sequence is too long for the format.
        """
        lengths = np.asarray(lengths, np.int64)
        if int(lengths.sum()) != len(values):
            raise ValueError(f"lengths sum to {int(lengths.sum())}, but there are {len(values)} values")
        if len(lengths) and int(lengths.max()) > LONGEST:
            at = self.sequences + int(lengths.argmax())
            raise DataError(f"{self.prefix}: document {at} has {lengths.max()} tokens, the format ends at {LONGEST}")
        data = memoryview(fitted(values, self.dtype, self.prefix)).cast("B") if len(values) else b""
        self._bin.write(data)
        self._hash.update(data)
        self._idx.write(lengths.astype("<i4").tobytes())
        if documents is not None or self._documents is not None:
            self._add_documents(np.ones(len(lengths), np.int64) if documents is None else np.asarray(documents))
        self.documents += len(lengths) if documents is None else len(documents)
        self.sequences += len(lengths)
        self.tokens += len(values)

    def prepare(
        self,
        *,
        command: Sequence[str] = (),
        sources: Sequence[Mapping[str, Any]] = (),
        rejects: Mapping[str, int] | None = None,
        part_of: str | None = None,
    ) -> Manifest:
        """Finish and sync all files under their unfinished names; `publish` then only renames."""
        self._bin.flush()
        idx = self._finish_index()
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
        size = self.tokens * self.dtype.itemsize
        manifest = Manifest(
            sequences=self.sequences,
            documents=self.documents,
            tokens=self.tokens,
            dtype=self.dtype.name,
            bin=FileRecord(size, self._hash.hexdigest()),
            idx=idx,
            tokenizer=self._tokenizer,
            command=tuple(command),
            sources=tuple(sources),
            rejects={reason: count for reason, count in (rejects or {}).items() if count},
            part_of=part_of,
        )
        self._write_sidecar("json", manifest.to_json().encode())
        if self._tokenizer is not None and self._tokenizer_data is not None:
            self._write_sidecar("tokenizer", self._tokenizer_data)
        return manifest

    def publish(self) -> None:
        """Rename everything into place, PREFIX.idx last. Call after `prepare`."""
        index_path, data_path = pair_paths(self.prefix)
        index_path.unlink(missing_ok=True)  # from here on the old output, replaced on demand, is no pair any more
        fsync_directory(self.prefix.absolute().parent)
        for kind in SUFFIXES:
            if self._tokenizer is None or kind != self._tokenizer.kind or "tokenizer" not in self._temporary:
                _remove_stale_tokenizer(self.prefix, kind)
        if self._tokenizer is not None and "tokenizer" in self._temporary:
            self._rename("tokenizer", tokenizer_path(self.prefix, self._tokenizer.kind))
        self._rename("json", manifest_path(self.prefix))
        self._rename("bin", data_path)
        fsync_directory(self.prefix.absolute().parent)
        self._rename("idx", index_path)
        fsync_directory(self.prefix.absolute().parent)
        self.abort()  # nothing unfinished is left; this lets go of the lock

    def commit(self, **facts: Any) -> Manifest:
        """Make the pair appear. Takes the arguments of `prepare`."""
        manifest = self.prepare(**facts)
        self.publish()
        return manifest

    def abort(self) -> None:
        """Remove everything unfinished and let go of the lock. Does nothing after a commit."""
        for file in self._open:
            with contextlib.suppress(OSError):  # a full disk fails once more when the buffer is flushed
                file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        self._open, self._temporary = [], {}
        self._lock.release()

    def _add_documents(self, documents: Array) -> None:
        if self._documents is None:
            self._documents = self._create("doc")
            for block in _ranges(1, self.documents + 1):  # until here each document was one sequence
                self._documents.write(block.astype("<i8").tobytes())
        self._documents.write((self.sequences + np.cumsum(documents)).astype("<i8").tobytes())

    def _finish_index(self) -> FileRecord:
        """Append offsets and document index, fill in the header."""
        idx = self._idx
        idx.flush()
        offset = 0
        for start in range(0, self.sequences, _BLOCK):
            count = min(_BLOCK, self.sequences - start)
            sizes = np.frombuffer(os.pread(idx.fileno(), 4 * count, HEADER.size + 4 * start), "<i4")
            ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize + offset
            idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        idx.write(bytes(8))
        if self._documents is None:
            for block in _ranges(1, self.sequences + 1):
                idx.write(block.astype("<i8").tobytes())
        else:
            self._documents.seek(0)
            while data := self._documents.read(CHUNK_BYTES):
                idx.write(data)
        idx.seek(0)
        idx.write(HEADER.pack(MAGIC, 1, self._code, self.sequences, self.documents + 1))
        idx.flush()
        idx.seek(0)
        digest = hashlib.file_digest(idx, "sha256").hexdigest()  # type: ignore[arg-type]
        return FileRecord(idx.tell(), digest)

    def _create(self, name: str) -> BinaryIO:
        path = unfinished(self.prefix, name)
        file = open(path, "w+b", buffering=CHUNK_BYTES)  # noqa: SIM115 - closed by abort
        self._temporary[name] = path
        self._open.append(file)
        return file

    def _write_sidecar(self, name: str, data: bytes) -> None:
        file = self._create(name)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

    def _rename(self, name: str, target: Path) -> None:
        self._temporary[name].rename(target)
        del self._temporary[name]


def fitted(values: Array, dtype: np.dtype[Any], name: object) -> Array:
    """Values as a contiguous array of `dtype`; integers are never wrapped or cut.

    Raises:
        DataError: one does not fit; `name` is where they come from.
    """
    values = np.ascontiguousarray(values)
    if values.dtype == dtype:
        return values
    if dtype.kind in "iu" and len(values):
        limits = np.iinfo(dtype)
        if values.dtype.kind not in "iu" or int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise DataError(f"{name}: values from {values.min()} to {values.max()} do not fit {dtype.name}")
    return values.astype(dtype)


def command_line() -> tuple[str, ...]:
    """The command line as the user typed it, for the manifest."""
    name = Path(sys.argv[0])
    return (name.parent.name.replace("_", "-") if name.name == "__main__.py" else name.name, *sys.argv[1:])


def describe_command() -> str:
    """The command line as one shell-quoted text."""
    return shlex.join(command_line())


def check_prefix(prefix: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return `prefix` if a pair can be written there.

    A .bin without .idx is replaced only if the manifest beside it proves that it is what a killed writer of ours left.

    Raises:
        OutputExists: it exists and `force` is off; or the directory is missing or read-only.
        UsageError: the name is empty or too long for the file system.
    """
    prefix = strip_suffix(prefix)
    if len(os.fsencode(prefix.name)) + max(map(len, SUFFIXES.values())) > _NAME_BYTES:
        raise UsageError(f"{prefix}: the name is too long; with its suffixes it must stay within {_NAME_BYTES} bytes")
    index_path, data_path = pair_paths(prefix)
    check_output(index_path, force=force)
    check_output(data_path, force=force or _is_uncommitted(prefix, data_path))
    foreign = manifest_path(prefix).exists() and read_manifest_or_none(prefix) is None
    check_output(manifest_path(prefix), force=force or not foreign)
    return prefix


def read_manifest_or_none(prefix: Path) -> Manifest | None:
    """The manifest, or None if it is missing, damaged or something else."""
    try:
        return read_manifest(prefix)
    except NeoxError:
        return None


def _is_uncommitted(prefix: Path, data_path: Path) -> bool:
    manifest = read_manifest_or_none(prefix)
    return manifest is not None and data_path.is_file() and data_path.stat().st_size == manifest.bin.bytes


def _check_tokenizer(prefix: Path, kind: str, data: bytes, *, force: bool) -> None:
    """Raise OutputExists if a tokenizer of the user's own lies where that of the dataset belongs."""
    path = tokenizer_path(prefix, kind)
    if path.is_file() and (present := path.read_bytes()) != data:
        manifest = read_manifest_or_none(prefix)
        known = manifest.tokenizer.sha256 if manifest is not None and manifest.tokenizer is not None else None
        check_output(path, force=force or hashlib.sha256(present).hexdigest() == known)


def _remove_stale_tokenizer(prefix: Path, kind: str) -> None:
    manifest = read_manifest_or_none(prefix)
    if manifest is not None and manifest.tokenizer is not None and manifest.tokenizer.kind == kind:
        tokenizer_path(prefix, kind).unlink(missing_ok=True)


def _ranges(start: int, stop: int) -> Iterator[Array]:
    for first in range(start, stop, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, stop), dtype=np.int64)


def _short_name(prefix: Path) -> str:
    """The prefix's name, shortened so that every suffix fits; shortened names carry a checksum of the whole."""
    name = os.fsencode(prefix.name)
    if len(name) <= _NAME_BYTES - 40:
        return prefix.name
    return f"{os.fsdecode(name[:200])}-{zlib.crc32(name):08x}"


def unfinished(prefix: Path, name: str) -> Path:
    """Where an unfinished part of an output is kept; `name` has no dot. A later writer clears it if we are killed."""
    return prefix.with_name(f"{_short_name(prefix)}.{name}.tmp-{os.getpid()}")


class _Lock:
    """An exclusive lock on an output; the kernel lets go of it when its owner dies, however that happens."""

    def __init__(self, prefix: Path):
        self._path = prefix.with_name(_short_name(prefix) + ".lock")
        self._fd: int | None = self._acquire(prefix)
        self._clear(prefix)

    def _clear(self, prefix: Path) -> None:
        """Remove unfinished files of this output. We hold the lock, so whoever wrote them is dead."""
        start = _short_name(prefix) + "."
        for path in prefix.absolute().parent.iterdir():
            name, mark, pid = path.name.partition(".tmp-")
            if mark and pid.isdigit() and name.startswith(start) and "." not in name[len(start) :]:
                path.unlink(missing_ok=True)

    def _acquire(self, prefix: Path) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise OutputExists(
                    f"{prefix}: another process is writing it; wait for it or choose another output"
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self._path.stat()):
                    return fd
            os.close(fd)  # its owner removed the file between our open and our lock

    def release(self) -> None:
        """Remove the lock file and let go."""
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None
