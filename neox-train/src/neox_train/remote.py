# SPDX-License-Identifier: Apache-2.0
"""Checkpoints at an address: copies of committed steps, and where a run on a new machine begins. No torch.

An address is anything that fsspec opens (`s3://bucket/folder`, `gs://`, `file:///`). A step there is whole once its
manifest is: that is sent last, and removed first if it was another one's.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from libneox import run_directory
from libneox.errors import InputMissing, IntegrityError, NeoxError, StoppedEarly, StorageError, UsageError
from libneox.files import write_text
from libneox.run_directory import MANIFEST, Manifest, Warn

RECORD = "uploads.json"
LOADED = "loaded"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_address(text: str) -> bool:
    """Whether a `load` or `save` is an address and no path."""
    return _URL.match(text) is not None


def open_address(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address and the path in it.

    Raises:
        UsageError: nobody knows the protocol.
        InputMissing: the package for it is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        extra = "'neox-train[s3]'" if url.startswith("s3") else "the package that it names"
        raise InputMissing(f"{url}: {error}; pip install {extra}") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}; give an address that fsspec knows, for example s3://bucket/run") from error
    return filesystem, path.rstrip("/")


class Uploads:
    """Copies of a run's steps at an address, made by a thread of rank 0 while training goes on.

    What was sent is noted in RUN/uploads.json, so that an interrupted copy goes on where it was. A failure is told and
    tried again with the next step.
    """

    def __init__(self, run: Path, url: str, *, part_bytes: int, warn: Warn):
        """Begin with the steps that are in `run` already.

        Raises:
            UsageError, InputMissing: as `open_address`.
        """
        self._run, self._url, self._part, self._warn = run, url, part_bytes, warn
        self._fs, self._root = open_address(url)
        self._lock = threading.Lock()
        self._waiting = set(run_directory.list_steps(run))
        self._problem = ""
        self._thread: threading.Thread | None = None
        self._work()

    @property
    def pending(self) -> set[int]:
        """Steps that are not there yet, and must not be deleted here."""
        with self._lock:
            return set(self._waiting)

    def offer(self, step: int) -> None:
        """Copy a committed step, and before it whatever failed earlier."""
        with self._lock:
            self._waiting.add(step)
        self._work()

    def finish(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait for everything; what failed is tried once more.

        Args:
            stopped: whether somebody has asked the run to stop; then nothing more is waited for.
        Raises:
            StorageError: something is still not there.
            StoppedEarly: likewise, because the run was stopped.
        """
        for _ in range(2):
            if self.pending:
                self._work()
            while self._thread is not None and self._thread.is_alive() and not stopped():
                self.wait(0.2)
        if self.pending:
            names = ", ".join(f"step_{step}" for step in sorted(self.pending))
            if stopped():
                raise StoppedEarly(f"stopped before {names} was copied to {self._url}; run the same command again")
            raise StorageError(f"{self._url}: {names} not copied, {self._problem}; run the same command again")

    def wait(self, seconds: float | None) -> None:
        """Let the thread work, for so long at most."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _work(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(target=self._copy_all, name="neox-upload", daemon=True)
            self._thread.start()

    def _copy_all(self) -> None:
        try:
            self._fs.exists(self._root)  # a wrong key is better told now than at the first checkpoint
            while True:
                with self._lock:
                    if not self._waiting:
                        self._thread = None  # whoever offers next starts another
                        return
                    step = min(self._waiting)
                try:
                    self._copy(step)
                except IntegrityError as error:
                    self._warn(f"{error}; it is not copied to {self._url}")
                with self._lock:
                    self._waiting.discard(step)
        except Exception as error:  # every protocol has errors of its own
            self._problem = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"{self._url}: not copied, {self._problem}; tried again with the next checkpoint")

    def _copy(self, step: int) -> None:
        source = run_directory.step_path(self._run, step)
        target = f"{self._root}/{source.name}"
        manifest = Manifest.read(source)
        text = manifest.to_bytes()
        there = f"{target}/{MANIFEST}"
        self._fs.invalidate_cache()
        if self._fs.exists(there):
            if self._fs.cat_file(there) == text:
                return
            self._fs.rm_file(there)  # of another run: its files are about to be replaced
        self._fs.makedirs(target, exist_ok=True)
        sent = self._sent()
        for name, record in manifest.files.items():
            key = f"{source.name}/{name}"
            if sent.get(key) != record.sha256 or not self._has(f"{target}/{name}", record.bytes):
                self._send(source / name, f"{target}/{name}", record.bytes)
                sent[key] = record.sha256
                write_text(self._run / RECORD, json.dumps({"url": self._url, "files": sent}, indent=1) + "\n")
        self._send(source / MANIFEST, there, len(text))

    def _sent(self) -> dict[str, str]:
        try:
            stored = json.loads((self._run / RECORD).read_text())
            return dict(stored["files"]) if stored["url"] == self._url else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _send(self, source: Path, target: str, size: int) -> None:
        parts = {"chunksize": self._part} if {"s3", "gs"} & set(_protocols(self._fs)) else {}
        self._fs.put_file(str(source), target, **parts)
        if not self._has(target, size):
            raise StorageError(f"{target}: not {size} bytes long after it was sent")

    def _has(self, path: str, size: int) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path)) and self._fs.info(path)["size"] == size


def fetch(url: str, folder: Path, *, step: int | None, warn: Warn) -> Path:
    """Copy the newest whole step of an address (of a run, or of a step itself) into `folder`; returns its path there.

    Args:
        step: this one and no other.
        warn: told of each step that was passed over.
    Raises:
        InputMissing: there is none.
        IntegrityError: none is whole, or the one that was named is not.
        StorageError: the address did not answer.
    """
    filesystem, root = open_address(url)
    if folder.is_dir():
        run_directory.remove_unfinished(folder)  # of a copy that was killed
    failed: NeoxError | None = None
    try:
        for number, place in _steps_at(filesystem, root, step):
            try:
                return _fetch_step(filesystem, place, run_directory.step_path(folder, number))
            except IntegrityError as error:
                if step is not None:
                    raise
                failed = error
                warn(f"{error}; falling back to an older step")
    except NeoxError:
        raise
    except Exception as error:  # every protocol has errors of its own
        raise StorageError(f"{url}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    if failed is not None:
        raise IntegrityError(f"{url}: none of its checkpoints verifies; restore one from a copy") from failed
    raise InputMissing(f"{url}: no checkpoint there{'' if step is None else f' of step {step}'}")


def _steps_at(filesystem: Any, root: str, step: int | None) -> Iterator[tuple[int, str]]:
    """(number, place), the newest first."""
    places = [root] if filesystem.exists(f"{root}/{MANIFEST}") else []
    if not places and filesystem.exists(root):
        places = [str(path).rstrip("/") for path in filesystem.ls(root, detail=False)]
    found = []
    for place in places:
        try:
            number = run_directory.step_number(place)
        except ValueError:
            continue
        if step in (None, number) and filesystem.exists(f"{place}/{MANIFEST}"):
            found.append((number, place))
    yield from sorted(found, reverse=True)


def _fetch_step(filesystem: Any, place: str, target: Path) -> Path:
    with contextlib.suppress(InputMissing, IntegrityError):
        run_directory.verify_step(target)
        return target
    temporary = run_directory.begin_step(target, force=True)
    try:
        (temporary / MANIFEST).write_bytes(filesystem.cat_file(f"{place}/{MANIFEST}"))
        manifest = Manifest.read(temporary)
        for name, record in manifest.files.items():
            if Path(name).name != name:
                raise IntegrityError(f"{place}/{MANIFEST}: names {name!r}, which is outside the checkpoint")
            if not filesystem.exists(f"{place}/{name}"):
                raise IntegrityError(f"{place}/{name}: is missing")
            filesystem.get_file(f"{place}/{name}", str(temporary / name))
            if run_directory.record_file(temporary / name) != record:
                raise IntegrityError(f"{place}/{name}: differs from the manifest; the file is damaged")
        return run_directory.commit_step(temporary, target, manifest)
    except BaseException:
        run_directory.abort_step(temporary)
        raise


def _protocols(filesystem: Any) -> tuple[str, ...]:
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)
