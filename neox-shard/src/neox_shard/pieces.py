# SPDX-License-Identifier: Apache-2.0
"""A large .bin in pieces that a file host takes, and back, with checksums.

The pieces are called as those of the Pythia datasets: PREFIX-00000-of-00082.bin, the second number being that of the
last piece. PREFIX.sha256 holds a line for each piece, for .idx, the sidecars and the whole .bin, as `sha256sum` writes
and checks them; it is written last.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from libneox.cli import warn
from libneox.data.manifest import manifest_path, read_manifest, tokenizer_of
from libneox.data.mmap import MMapDataset, described_bytes, pair_paths, strip_suffix
from libneox.data.writer import check_prefix
from libneox.errors import DataError, InputMissing, IntegrityError, UsageError
from libneox.files import CHUNK_BYTES, atomic_write, check_output, human_bytes, sha256_file
from libneox.progress import Progress
from libneox.sums import read_sums, sum_line

PROG = "neox-shard"
MOST_PIECES = 100_000  # five digits


def split_dataset(prefix: Path, folder: Path | None, *, piece_bytes: int, force: bool, quiet: bool) -> list[Path]:
    """Write the pieces of a dataset, and everything needed to join them, to a folder (its own by default).

    Returns:
        The paths of the pieces, in order.

    Raises:
        OutputExists: one of the files exists.
        UsageError: no piece size, or one that makes too many pieces.
    """
    if piece_bytes < 1:
        raise UsageError("--bytes: a piece holds at least one byte")
    with MMapDataset(prefix) as data:
        prefix = data.prefix
    folder = folder or prefix.parent
    data_path = pair_paths(prefix)[1]
    size = data_path.stat().st_size
    last = max(-(-size // piece_bytes) - 1, 0)
    if last > MOST_PIECES - 1:
        raise UsageError(f"--bytes {piece_bytes}: would make {last + 1} pieces, the names count {MOST_PIECES}")
    pieces = [check_output(folder / f"{prefix.name}-{k:05d}-of-{last:05d}.bin", force=force) for k in range(last + 1)]
    sums_path = check_output(folder / f"{prefix.name}.sha256", force=force)
    companions = _companions(prefix)
    copies = {}
    if folder.absolute() != prefix.parent.absolute():
        copies = {path: check_output(folder / path.name, force=force) for path in companions}
    sums_path.unlink(missing_ok=True)
    whole = hashlib.sha256()
    sums: list[tuple[str, str]] = []
    with open(data_path, "rb") as source, Progress(PROG, "bytes", total=size, quiet=quiet) as progress:
        for piece in pieces:
            digest = hashlib.sha256()
            with atomic_write(piece) as target:
                for chunk in _chunks(source, piece_bytes):
                    target.write(chunk)
                    digest.update(chunk)
                    whole.update(chunk)
                    progress.update(len(chunk))
            sums.append((digest.hexdigest(), piece.name))
    for path in companions:
        if path in copies:
            _copy(path, copies[path])
        sums.append((sha256_file(path), path.name))
    sums.append((whole.hexdigest(), data_path.name))
    with atomic_write(sums_path) as file:
        file.writelines(sum_line(digest, name) for digest, name in sums)
    if not quiet:
        warn(PROG, f"{len(pieces)} pieces of {human_bytes(piece_bytes)}, checksums in {sums_path}")
    return pieces


def join_pieces(prefix: Path, out: Path | None, *, force: bool, quiet: bool) -> None:
    """Put PREFIX-*-of-*.bin together again, checking each against PREFIX.sha256 where there is one.

    Args:
        out: prefix of the result; by default the pair becomes whole where its pieces are.

    Raises:
        InputMissing: a piece, or PREFIX.idx.
        IntegrityError: a file is not what PREFIX.sha256 says.
        DataError: the pieces do not add up to what PREFIX.idx describes.
    """
    prefix = strip_suffix(prefix)
    out = prefix if out is None else strip_suffix(out)
    here = out.absolute() == prefix.absolute()
    pieces = find_pieces(prefix)
    index_path, data_path = pair_paths(prefix)
    if not index_path.is_file():
        raise InputMissing(f"{index_path}: missing; the pieces are of no use without it, fetch it too")
    sums_path = prefix.with_name(prefix.name + ".sha256")
    sums = read_sums(sums_path) if sums_path.is_file() else {}
    target_index, target = pair_paths(out)
    if here:
        check_output(target, force=force)
    else:
        check_prefix(out, force=force)
    for path in _companions(prefix):
        _compare(path, sha256_file(path), sums)
    if not here:
        target_index.unlink(missing_ok=True)
    whole = hashlib.sha256()
    size = sum(piece.stat().st_size for piece in pieces)
    with atomic_write(target) as file, Progress(PROG, "bytes", total=size, quiet=quiet) as progress:
        for piece in pieces:
            digest = hashlib.sha256()
            with open(piece, "rb") as source:
                for chunk in _chunks(source, piece.stat().st_size):
                    file.write(chunk)
                    digest.update(chunk)
                    whole.update(chunk)
                    progress.update(len(chunk))
            _compare(piece, digest.hexdigest(), sums)
        _compare(data_path, whole.hexdigest(), sums)
        file.flush()
        _check_fits(index_path, Path(file.name))
    if not here:
        for path in reversed(_companions(prefix)):  # .idx last
            _copy(path, check_output(out.with_name(out.name + path.name[len(prefix.name) :]), force=True))
    if not quiet:
        checked = "checksums right" if sums else "no PREFIX.sha256 to check them against"
        warn(PROG, f"{target}: {human_bytes(size)} from {len(pieces)} pieces, {checked}")


def find_pieces(prefix: Path) -> list[Path]:
    """All pieces of a dataset, in order.

    Raises:
        InputMissing: there are none, or one is missing.
    """
    pattern = re.compile(re.escape(prefix.name) + r"-(\d{5})-of-(\d{5})\.bin")
    matches = [m for path in sorted(prefix.absolute().parent.iterdir()) if (m := pattern.fullmatch(path.name))]
    lasts = sorted({int(match[2]) for match in matches})
    if not lasts:
        raise InputMissing(f"{prefix}-00000-of-NNNNN.bin: no such pieces")
    if len(lasts) > 1:
        raise DataError(f"{prefix}: pieces of two splittings lie side by side (of {lasts[0]} and of {lasts[1]})")
    pieces = [prefix.with_name(f"{prefix.name}-{k:05d}-of-{lasts[0]:05d}.bin") for k in range(lasts[0] + 1)]
    for piece in pieces:
        if not piece.is_file():
            raise InputMissing(f"{piece}: missing; {len(matches)} of {len(pieces)} pieces are there")
    return pieces


def _check_fits(index_path: Path, data_path: Path) -> None:
    """Raise DataError unless the joined bytes are what the index describes."""
    expected, found = described_bytes(index_path), data_path.stat().st_size
    if expected != found:
        raise DataError(f"{index_path}: describes {expected} bytes, but the pieces have {found}; fetch them again")


def _companions(prefix: Path) -> list[Path]:
    """The files beside .bin, .idx first."""
    found = [pair_paths(prefix)[0]]
    if read_manifest(prefix) is not None:
        found.append(manifest_path(prefix))
    tokenizer = tokenizer_of(prefix)
    return found + ([tokenizer] if tokenizer is not None else [])


def _chunks(source: object, count: int) -> Iterator[bytes]:
    while count > 0 and (chunk := source.read(min(CHUNK_BYTES, count))):  # type: ignore[attr-defined]
        count -= len(chunk)
        yield chunk


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, atomic_write(target) as writer:
        for chunk in _chunks(reader, source.stat().st_size):
            writer.write(chunk)


def _compare(path: Path, digest: str, sums: dict[str, str]) -> None:
    if sums and sums.get(path.name, digest) != digest:
        raise IntegrityError(f"{path}: sha256 {digest[:12]} instead of {sums[path.name][:12]}; fetch it again")
