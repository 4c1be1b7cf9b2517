# SPDX-License-Identifier: Apache-2.0
"""Checking inputs against a list of sha256 sums while they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from libneox.errors import IntegrityError, UsageError
from libneox.sums import read_sums


class Hashed:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def finish(self) -> str:
        """Read what is left, and return the hex sha256 of it all."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()


class Sums:
    """A list as `sha256sum` writes it; names count from the list's own folder.

    Raises:
        InputMissing, DataError: there is no such list, or it is none.
    """

    def __init__(self, file: str):
        self._file = file
        folder = Path(file).parent
        self._sums = {(folder / name).resolve(): digest for name, digest in read_sums(file).items()}

    def require(self, path: str) -> str:
        """The hash that a file must have; UsageError if the list does not name it."""
        expected = self._sums.get(Path(path).resolve())
        if expected is None:
            raise UsageError(f"{path}: not in {self._file}, so it cannot be verified; leave it or --verify-hash out")
        return expected

    def check(self, path: str, read: Hashed) -> None:
        """Raise IntegrityError if a file is not what the list says."""
        expected, actual = self.require(path), read.finish()
        if actual != expected:
            raise IntegrityError(f"{path}: sha256 is {actual[:12]}..., not {expected[:12]}... as {self._file} says")
