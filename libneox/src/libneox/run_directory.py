# SPDX-License-Identifier: Apache-2.0
"""A run directory: which checkpoints it holds, whether they are whole, and how one comes into being. No torch.

    RUN/step_N/         manifest.json config.yml tokenizer.json trainer.json model-*.safetensors optimizer-*.safetensors
    RUN/latest          relative symlink to the newest step (a text file where links are impossible); only advice
    RUN/metrics.jsonl   one object a step
    RUN/run_status.json how the last trainer ended
    RUN/.lock           held by the trainer that runs

A step directory appears by rename, after every file in it was synced, and holds a manifest with the size and sha256
of each of them. The manifest carries a hash of itself and is written in exactly one way, so a changed byte anywhere
in a step is found. Nothing here trusts `latest`: the newest step that verifies is the latest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from libneox.errors import DataError, InputMissing, IntegrityError, OutputExists
from libneox.files import FileRecord as FileRecord
from libneox.files import fsync_directory, put_in_place, sha256_file, write_text
from libneox.legacy import is_legacy

MANIFEST = "manifest.json"
CONFIG = "config.yml"
TOKENIZER_FILES = {"sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}  # others: tokenizer.json
TRAINER = "trainer.json"
LATEST = "latest"
METRICS = "metrics.jsonl"
STATUS = "run_status.json"
LOCK = ".lock"
FORMAT = "neox-checkpoint"
VERSION = 1

_STEP = re.compile(r"step_(\d+)\Z")
_UNFINISHED = re.compile(r"(step_\d+)(\.old)?\.tmp-")
Warn = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a step directory holds.

    Attributes:
        step: optimizer steps done.
        samples: sequences consumed up to and with this step.
        tokens: tokens consumed.
        world: how the run was laid out, for example `{"size": 2, "data_parallel": 2}`.
        config_sha256: hash of the effective configuration (`NeoxConfig.hash`), or None.
        tokenizer: `{"kind": ..., "sha256": ...}` of the tokenizer file's bytes, or None.
        files: every file of the step but the manifest itself, by name.
    """

    step: int
    samples: int = 0
    tokens: int = 0
    world: Mapping[str, int] = dataclasses.field(default_factory=dict)
    config_sha256: str | None = None
    tokenizer: Mapping[str, str] | None = None
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The one way in which this manifest is written."""
        return _sealed({"format": FORMAT, "version": VERSION} | dataclasses.asdict(self))

    @classmethod
    def read(cls, step_dir: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of a step directory (not the files it lists).

        Raises:
            IntegrityError: it is missing, or a byte of it is not as it was written.
            DataError: it was written by a newer version of this program.
        """
        path = Path(step_dir) / MANIFEST
        try:
            raw = path.read_bytes()
        except FileNotFoundError as error:
            raise IntegrityError(f"{step_dir}: no {MANIFEST}; the checkpoint was never finished") from error
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; use another step") from error
        try:
            body = json.loads(raw)
            body.pop("sha256")
            intact = _sealed(body) == raw
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{path}: not a checkpoint manifest; use another step") from error
        if not intact:
            raise IntegrityError(f"{path}: does not match its own hash; use another step")
        if (body.pop("format", None), body.pop("version", None)) != (FORMAT, VERSION):
            raise DataError(f"{path}: not of version {VERSION} of {FORMAT}; install a newer version of this program")
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return cls(**body)


def _sealed(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical(body | {"sha256": digest}) + b"\n"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True).encode()


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointRef:
    """Where a CKPT argument led: one step directory of ours, a Hugging Face model directory, or one of GPT-NeoX."""

    path: Path
    kind: Literal["neox", "hf", "legacy"]
    step: int | None
    manifest: Manifest | None = None


def list_steps(run: str | os.PathLike[str]) -> list[int]:
    """Numbers of the committed steps in a run directory, ascending; [] if there is no such directory."""
    try:
        with os.scandir(run) as entries:
            return sorted(int(match[1]) for entry in entries if (match := _STEP.match(entry.name)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_path(run: str | os.PathLike[str], step: int) -> Path:
    """`RUN/step_N`."""
    return Path(run) / f"step_{step}"


def step_number(step_dir: str | os.PathLike[str]) -> int:
    """N of `RUN/step_N`."""
    match = _STEP.match(Path(step_dir).name)
    if match is None:
        raise ValueError(f"{step_dir}: not named step_N")
    return int(match[1])


def tokenizer_file(kind: str) -> str:
    """Name of the file in which a step holds a tokenizer of this kind."""
    return TOKENIZER_FILES.get(kind, "tokenizer.json")


def verify_step(step_dir: str | os.PathLike[str]) -> Manifest:
    """Compare every file of a step with its manifest, byte for byte through sha256; the tokenizer's too, listed or not.

    Raises:
        InputMissing: there is no such directory.
        IntegrityError: naming the first file that is missing, of another length or with another hash.
    """
    step_dir = Path(step_dir)
    if not step_dir.is_dir():
        raise InputMissing(f"{step_dir}: no such checkpoint")
    manifest = Manifest.read(step_dir)
    for name, record in manifest.files.items():
        if Path(name).name != name:
            raise IntegrityError(f"{step_dir / MANIFEST}: names {name!r}, which is outside the checkpoint")
        try:
            found = (step_dir / name).stat().st_size
        except OSError as error:
            raise IntegrityError(f"{step_dir / name}: {error.strerror}; the checkpoint is damaged") from error
        if found != record.bytes:
            raise IntegrityError(f"{step_dir / name}: {found} bytes, the manifest says {record.bytes}; it is damaged")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        digests = pool.map(lambda name: _digest(step_dir / name), manifest.files)
        for (name, record), digest in zip(manifest.files.items(), digests, strict=True):
            if digest != record.sha256:
                raise IntegrityError(f"{step_dir / name}: sha256 differs from the manifest's; the file is damaged")
    _check_tokenizer(step_dir, manifest)
    return manifest


def _check_tokenizer(step_dir: Path, manifest: Manifest) -> None:
    """The tokenizer that a manifest describes must be there, even where the files it lists leave it out."""
    if manifest.tokenizer is None:
        return
    path = step_dir / tokenizer_file(manifest.tokenizer.get("kind", ""))
    listed = manifest.files.get(path.name)  # its bytes were compared with the record
    if (listed.sha256 if listed else _digest(path)) != manifest.tokenizer["sha256"]:
        raise IntegrityError(f"{path}: is not the tokenizer that the manifest describes; the checkpoint is damaged")


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:  # a bad sector, say
        raise IntegrityError(f"{path}: {error.strerror}; the checkpoint is damaged") from error


def newest_verified(run: str | os.PathLike[str], *, warn: Warn | None = None) -> CheckpointRef | None:
    """The newest step of a run that verifies; None if the run holds no step at all.

    Args:
        warn: told, once for each step that had to be passed over, which one and why.
    Raises:
        IntegrityError: there are steps and none verifies.
    """
    warn = warn or print_warning
    steps = list_steps(run)
    for step in reversed(steps):
        path = step_path(run, step)
        try:
            return CheckpointRef(path, "neox", step, verify_step(path))
        except (IntegrityError, InputMissing, DataError) as error:
            warn(f"{error}; falling back to an older step")
    if steps:
        raise IntegrityError(f"{run}: none of its {len(steps)} checkpoints verifies; restore one from a copy")
    return None


def resolve_checkpoint(arg: str | os.PathLike[str], *, warn: Warn | None = None) -> CheckpointRef:
    """Find what a CKPT argument means, and verify it.

    RUN and RUN/latest are the newest step of the run that verifies; RUN/step_N (or a step directory under any other
    name) is itself; a directory with `config.json` is a Hugging Face model; one with the files of GPT-NeoX (see
    `libneox.legacy`) is a checkpoint of it.

    Raises:
        InputMissing: nothing there, or nothing in it that is a checkpoint.
        IntegrityError: the named step, or every step of the run, is damaged.
    """
    path = Path(arg)
    if path.name == LATEST and not (path / MANIFEST).is_file() and path.parent.is_dir():
        if is_legacy(path.parent):
            return CheckpointRef(path.parent, "legacy", None)
        return _newest(path.parent, arg, warn)  # a text file, a dangling link, or a link to something damaged
    if path.is_file():
        raise InputMissing(f"{path}: is a file; give a run directory, RUN/step_N or a Hugging Face model directory")
    if not path.is_dir():
        raise InputMissing(f"{path}: no such run or checkpoint directory")
    if path.name == LATEST and _STEP.match(path.resolve().name):
        return _newest(path.resolve().parent, arg, warn)
    if (path / MANIFEST).exists() or _STEP.match(path.resolve().name):
        manifest = verify_step(path)
        return CheckpointRef(path, "neox", manifest.step, manifest)
    if list_steps(path):
        return _newest(path, arg, warn)
    if (path / "config.json").is_file():
        return CheckpointRef(path, "hf", None)
    if is_legacy(path):
        return CheckpointRef(path, "legacy", None)
    raise InputMissing(f"{path}: holds no checkpoint (no step_N directory, {MANIFEST}, config.json or global_stepN)")


def _newest(run: Path, arg: str | os.PathLike[str], warn: Warn | None) -> CheckpointRef:
    ref = newest_verified(run, warn=warn)
    if ref is None:
        raise InputMissing(f"{arg}: no checkpoint yet in {run}")
    return ref


def print_warning(message: str) -> None:
    """Say something on stderr, for callers that gave no `warn`."""
    print(f"libneox: warning: {message}", file=sys.stderr, flush=True)


# --- the commit protocol -------------------------------------------------------------------------------------------
#
# step_N.tmp-X/ is made; every writer syncs its files and reports their records; after all have (a barrier, if there
# are several) one of them writes the manifest, syncs, renames, syncs the parent and moves `latest`. A kill at any
# point leaves either a directory that no reader looks at, or a whole step.


def begin_step(target: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Make the directory that will be renamed to `target` (RUN/step_N).

    Raises:
        OutputExists: `target` is there already and `force` is off.
    """
    target = Path(target)
    if os.path.lexists(target) and not force:
        raise OutputExists(f"{target}: exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(6)}")
    temporary.mkdir()
    return temporary


def record_file(path: str | os.PathLike[str]) -> FileRecord:
    """Sync a finished file to disk and return its record."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return FileRecord(size, hashlib.file_digest(file, "sha256").hexdigest())


def add_file(temporary: Path, name: str, data: bytes) -> tuple[str, FileRecord]:
    """Write one small file of a step, synced; returns what the manifest needs."""
    with open(temporary / name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return name, FileRecord(len(data), hashlib.sha256(data).hexdigest())


def commit_step(temporary: Path, target: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Turn a directory whose files are all synced into the step `target`, for good. Returns `target`."""
    target = Path(target)
    add_file(temporary, MANIFEST, manifest.to_bytes())
    fsync_directory(temporary)
    put_in_place(temporary, target)
    if _STEP.match(target.name):
        point_latest(target)
    return target


def abort_step(temporary: Path) -> None:
    """Remove an unfinished step; what cannot be removed is ignored, no reader looks at it."""
    shutil.rmtree(temporary, ignore_errors=True)


def point_latest(target: Path) -> None:
    """Make RUN/latest lead to a step: a relative symlink, or a text file on file systems without links."""
    link = target.parent / LATEST
    temporary = link.with_name(f"{LATEST}.tmp-{secrets.token_hex(6)}")
    try:
        temporary.symlink_to(target.name)
        os.replace(temporary, link)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        write_text(link, target.name + "\n")
    fsync_directory(target.parent)


def remove_unfinished(run: str | os.PathLike[str]) -> list[str]:
    """Remove what killed trainers left behind; call only while holding the lock. Returns the names removed.

    A step that was being replaced, and has no successor yet, takes its name back.
    """
    with os.scandir(run) as entries:
        names = [e.name for e in entries if _UNFINISHED.match(e.name) or e.name.startswith(f"{LATEST}.tmp-")]
    removed = []
    for name in names:
        path, match = Path(run) / name, _UNFINISHED.match(name)
        if match and match[2] and not (Path(run) / match[1]).exists():
            path.rename(Path(run) / match[1])
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(name)
    return removed


def prune(run: str | os.PathLike[str], keep_last: int, *, protect: Iterable[int] = ()) -> list[int]:
    """Delete all but the newest `keep_last` steps, if the newest one verifies; returns the steps deleted.

    Args:
        keep_last: at least 1.
        protect: steps that are kept whatever their age and not counted (milestones).
    """
    if keep_last < 1:
        raise ValueError("keep_last must be at least 1")
    protected = set(protect)
    steps = list_steps(run)
    doomed = [step for step in steps if step not in protected][:-keep_last]
    if not doomed:
        return []
    verify_step(step_path(run, steps[-1]))  # raises: then nothing is deleted
    for step in doomed:
        path = step_path(run, step)
        gone = path.with_name(f"{path.name}.tmp-pruned-{secrets.token_hex(4)}")
        path.rename(gone)  # at once out of every reader's sight
        shutil.rmtree(gone, ignore_errors=True)
    return doomed


def set_aside(run: str | os.PathLike[str], after: int) -> list[Path]:
    """Rename the steps behind `after`, for a run that goes on from there: no reader takes them for its own any more.

    Returns:
        Their new paths.
    """
    moved = []
    for step in list_steps(run):
        if step > after:
            path = step_path(run, step)
            moved.append(path.rename(path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}")))
    if moved:
        point_latest(step_path(run, after))
    return moved


# --- one trainer at a time, and how it ended -----------------------------------------------------------------------


@contextlib.contextmanager
def lock(run: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go of it however the process ends.

    Raises:
        OutputExists: another process holds it, or the directory cannot be written.
    """
    path = Path(run) / LOCK
    try:
        Path(run).mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputExists(f"{run}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
            raise OutputExists(f"{run}: in use by {holder}; stop it, or give another `save` directory") from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def write_status(run: str | os.PathLike[str], **fields: Any) -> None:
    """Write RUN/run_status.json: how a trainer ended, for whoever gets a launcher's flattened exit code.

    Fields in use: `state` (running, finished, stopped, failed), `code`, `reason`, `step` (last committed), `rank`,
    `host`, `pid`, `evaluation` (figures after the last step).
    """
    write_text(Path(run) / STATUS, json.dumps(fields, indent=1) + "\n")


def read_status(run: str | os.PathLike[str]) -> dict[str, Any] | None:
    """RUN/run_status.json, or None if there is none that can be read."""
    try:
        value = json.loads((Path(run) / STATUS).read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def cut_metrics(run: str | os.PathLike[str], step: int) -> None:
    """Keep the lines of RUN/metrics.jsonl up to `step`: later ones belong to steps that will be done again."""
    path = Path(run) / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break  # a line torn by a kill: it and all behind it
        kept.append(line)
    write_text(path, b"".join(kept).decode())
