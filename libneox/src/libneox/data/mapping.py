# SPDX-License-Identifier: Apache-2.0
"""A file as a read-only array of bytes.

`mmap.mmap` keeps a duplicate of the file descriptor until Python 3.13 (`trackfd`), so a mixture of a thousand datasets
would need two thousand descriptors. The mapping made here outlives its descriptor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from libneox.errors import InputMissing


def map_file(path: str | os.PathLike[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Map a file. The pages are shared and read on demand; the mapping ends when the last view of it is gone.

    Returns:
        Read-only uint8 array of the file's length, empty for an empty file.

    Raises:
        InputMissing: no such file, or not readable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputMissing(f"{Path(path)}: {error.strerror}") from error
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        if sys.version_info >= (3, 13):
            return np.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_READ, trackfd=False), np.uint8)
        return _map_without_descriptor(fd, size)
    finally:
        os.close(fd)


def _map_without_descriptor(fd: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    libc = ctypes.CDLL(None, use_errno=True)
    # off_t is 64 bit on every platform that Python 3.11 runs on with files this large
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    region = _Region(address, size)
    weakref.finalize(region, libc.munmap, address, size).atexit = False
    return np.asarray(region)


class _Region:
    """Mapped memory as numpy's array interface describes it; the array made of it keeps it alive."""

    def __init__(self, address: int, size: int):
        read_only = True  # a write would be a segmentation fault
        self.__array_interface__ = {"data": (address, read_only), "shape": (size,), "typestr": "|u1", "version": 3}
