# SPDX-License-Identifier: Apache-2.0
"""Output directories that appear whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from libneox.errors import OutputExists
from libneox.files import fsync_directory, put_in_place, temporary_name

_UNFINISHED = re.compile(r"\.tmp-(\d+)\Z")


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A new directory beside `target` that takes its name when the block ends, and is removed if it fails.

    Left-overs of conversions that were killed are removed first. Files must be synced by whoever writes them.

    Raises:
        OutputExists: `target` is there and `force` is off, or nothing can be created where it should stand.
    """
    check_target(target, force=force)
    _remove_leftovers(target)
    temporary = temporary_name(target)
    try:
        temporary.mkdir()
    except OSError as error:
        raise OutputExists(f"{target}: cannot be created here: {error.strerror}") from error
    try:
        yield temporary
        fsync_directory(temporary)
        put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(target: Path, *, force: bool) -> None:
    """Raise OutputExists unless a directory can be created at `target`; done before any work."""
    if target.name in ("", ".."):
        raise OutputExists(f"{target}: give the output a name of its own")
    if os.path.lexists(target):
        if not force:
            raise OutputExists(f"{target}: exists already; --force replaces it")
        if not target.is_dir() or target.is_symlink():
            raise OutputExists(f"{target}: is no directory; remove it first")
    parent = target.parent
    if not parent.is_dir():
        raise OutputExists(f"{parent}: no such directory; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputExists(f"{parent}: not writable")


def check_apart(target: Path, source: str) -> None:
    """Raise OutputExists if replacing `target` would take away what is read, and whatever stands beside it."""
    if target.resolve() in Path(source).resolve().parents:
        raise OutputExists(f"{target}: holds the source {source}; choose another place")


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f"{_escaped(target.name)}*.tmp-*"):
        match = _UNFINISHED.search(path.name)
        if match and path.name[: match.start()] in (target.name, target.name + ".old") and not _alive(int(match[1])):
            if path.name.startswith(target.name + ".old") and not target.exists():
                path.rename(target)  # killed while it was replaced: it is still good
            else:
                shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
