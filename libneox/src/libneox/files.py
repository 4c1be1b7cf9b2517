# SPDX-License-Identifier: Apache-2.0
"""Files: opening inputs, writing outputs so that they appear whole or not at all, hashing."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from libneox.errors import InputMissing, OutputExists, UsageError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Length and hex sha256 of a file, as manifests hold them."""

    bytes: int
    sha256: str


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file, or stdin for `-`, for buffered binary reading.

    Raises:
        InputMissing: no such file, a directory, unreadable, or stdin is closed.
        UsageError: stdin is a terminal, so nobody is sending anything.
    """
    if os.fspath(path) == "-":
        return _open_stdin()
    try:
        return open(path, "rb", buffering=CHUNK_BYTES)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error


def _open_stdin() -> BinaryIO:
    try:
        is_open = not stat.S_ISDIR(os.fstat(0).st_mode)  # libneox.cli puts one in the place of a closed stdin
    except OSError:
        is_open = False
    if not is_open:
        raise InputMissing("stdin is closed or a directory; name a file or pipe something in")
    if os.isatty(0):
        raise UsageError("no input: stdin is a terminal; name a file, pipe something in, or see --help")
    return io.BufferedReader(io.FileIO(0, "rb", closefd=False), CHUNK_BYTES)


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return `path` if a file can be made there; checked before any work is done.

    Raises:
        OutputExists: it exists and `force` is off, is no regular file, or its directory is missing or read-only.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputExists(f"{path}: is a directory")
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise OutputExists(f"{path}: is no regular file; name another")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path}: exists already; --force replaces it")
    parent = path.parent
    if not parent.is_dir():
        raise OutputExists(f"{parent}: no such directory; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputExists(f"{parent}: not writable")
    return path


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """A name beside `path` for its unfinished self: unique to this process, and recognisable as unfinished."""
    path = Path(path)
    suffix = f".tmp-{os.getpid()}"
    return path.with_name(os.fsdecode(os.fsencode(path.name)[: 255 - len(suffix)]) + suffix)  # 255 bytes


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears under its name complete and synced, or not at all.

    An exception on the way (also SIGINT and SIGTERM, see `libneox.cli`) removes the unfinished file.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb", buffering=CHUNK_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(Path(path).parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a finished, synced directory its name. What has the name already goes, last of all.

    Where the file system can exchange two names there is something whole under `target` at any moment. Elsewhere a kill
    in between leaves the old one as `NAME.old.tmp-...`.
    """
    if not os.path.lexists(target):
        temporary.rename(target)
        fsync_directory(target.parent)
        return
    old = temporary
    if not _exchange(temporary, target):
        old = temporary_name(target.with_name(f"{target.name}.old"))
        target.rename(old)
        temporary.rename(target)
    fsync_directory(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names trade places in one step; False where that cannot be done."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None).renameat2
        return bool(rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(exchange)) == 0)
    return False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small UTF-8 text file atomically; bytes of file names that are no UTF-8 stay what they are."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def fsync_directory(directory: str | os.PathLike[str]) -> None:
    """Make renames in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def human_bytes(count: float) -> str:
    """`1536` as `1.5 KB`; decimal units, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def is_terminal(fd: int = 2) -> bool:
    """Whether a descriptor is a terminal; False for a closed one."""
    try:
        return os.isatty(fd)
    except OSError:  # pragma: no cover - isatty does not raise on Linux
        return False


def stderr_is_live() -> bool:
    """Whether a person watches stderr: progress is drawn live then, and written line by line otherwise."""
    return sys.stderr is not None and is_terminal(2)
