# SPDX-License-Identifier: Apache-2.0
"""How glibc hands out large blocks: from fresh pages each time, or from a heap that is kept, in huge pages.

Settings of the process, which a command may choose. Where there is no glibc they do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE = 2 << 20
_kept = False


def keep() -> bool:
    """Let glibc take large blocks from its own heap and give nothing back; returns whether there is a glibc to ask.

    By default every tensor over some MB is fresh memory from the kernel, which clears it page by page, and goes back
    at once. What is kept can be in pieces: the peak of the process may be a little higher.
    """
    global _kept
    # one arena, since those of other threads (autograd's is one) are too small for large blocks
    _kept = _mallopt(arena_max=1, mmap_max=0, trim_threshold=-1)
    if _kept:
        _grow_in_huge_pages()
    return _kept


def release() -> bool:
    """As glibc behaves by itself once a process has used large blocks; the opposite of `keep`."""
    global _kept
    _kept = False
    return _as_usual() and bool(ctypes.CDLL(None).malloc_trim(0) in (0, 1))


@contextlib.contextmanager
def in_huge_pages() -> Iterator[None]:
    """Large blocks taken in here lie side by side in huge pages, for data that is read again and again.

    A decoding step whose weights have pages of their own takes 3 to 10 % longer. Afterwards glibc goes on as in a
    process that has used large blocks: blocks below 32 MB come from its heap.
    """
    if _mallopt(mmap_max=0, trim_threshold=-1):
        _grow_in_huge_pages()
    try:
        yield
    finally:
        if not _kept:
            _as_usual()


def _as_usual() -> bool:
    return _mallopt(mmap_max=65536, mmap_threshold=32 << 20, trim_threshold=64 << 20)


def _grow_in_huge_pages() -> bool:
    """Have the heap grow in pages of 2 MB, where Linux leaves that to programs; returns whether it agreed.

    A training step goes through gigabytes, and in pages of 4 KB spends a sixth of its time looking up addresses. What
    is reserved here and given back at once is address space; a page gets memory when it is first written to.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
            return False  # where address space counts as memory
        libc = ctypes.CDLL(None)
        libc.malloc.restype, size = ctypes.c_void_p, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2
        block = libc.malloc(ctypes.c_size_t(size))
        if block:
            begin = -(-block // HUGE_PAGE) * HUGE_PAGE
            span = ctypes.c_size_t(block + size - begin)
            agreed = libc.madvise(ctypes.c_void_p(begin), span, mmap.MADV_HUGEPAGE) == 0
            libc.free(ctypes.c_void_p(block))
            return agreed
    return False


def _mallopt(**settings: int) -> bool:
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4, "arena_max": -8}  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(numbers[name], value) for name, value in settings.items()])
    return False
