# SPDX-License-Identifier: Apache-2.0
"""From files, directories and stdin to blocks of records; what a file holds is told by its bytes, not its name."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from libneox.cli import warn
from libneox.decompress import decompressed
from libneox.errors import DataError, InputMissing, UsageError
from libneox.files import open_input
from libneox.lookahead import Lookahead
from neox_tokenize import archives
from neox_tokenize.blocks import BLOCK_BYTES, Block, Limits, line_blocks, read_document
from neox_tokenize.sums import Hashed, Sums

FORMATS = ("auto", "jsonl", "json", "text", "lines")
BLOCK_TEXTS = 4096  # of small texts in a block
HEAD_BYTES = 1 << 16  # what is looked at to tell a format
# In a directory only these are read; a README beside the data is no document. A file named by itself is always read.
SUFFIXES = re.compile(
    r"\.(jsonl|ndjson|json|txt|md|dat|parquet|arrow|tar|zip|tgz)(\.(zst|gz|xz|bz2)(\.tar)?)?$|\.(zst|gz|xz|bz2)$"
)
UNSUPPORTED = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"%PDF-": "a PDF",
    b"\x89PNG": "an image",
    b"\x7fELF": "a program",
    b"SQLite format 3": "a database",
    b"MMIDIDX": "the index of a tokenized dataset",
}


@dataclass(frozen=True)
class Inputs:
    """What to read and how.

    Attributes:
        paths: files and directories, `-` for stdin; none means stdin.
        keys: columns to take of Parquet and Arrow files.
        format: one of FORMATS.
        limits: the sizes that are accepted.
        sums: the hashes that the files must have.
        neox: tell a format by the file's suffix, as GPT-NeoX did.
        prog: the command's name, for warnings.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...] = ("text",)
    format: str = "auto"
    limits: Limits = field(default_factory=Limits)
    sums: Sums | None = None
    neox: bool = False
    prog: str = "neox-tokenize"

    def blocks(self, opened: Lookahead | None = None) -> Iterator[Block]:
        """All records in order: files as given, a directory's by name, members as they stand in their archive.

        Args:
            opened: the only input, if it had to be looked into already.
        """
        yield from gathered(self._one_by_one(opened))

    def _one_by_one(self, opened: Lookahead | None) -> Iterator[Block]:
        for path in self._files():
            if opened is not None:
                yield from self._blocks_of(opened, *_names(path))
                continue
            with open_input(path) as file, _shallow(path):
                if self.sums is None:
                    yield from self._blocks_of(Lookahead(file), *_names(path))
                else:
                    self.sums.require(path)
                    hashed = Hashed(file)
                    yield from self._blocks_of(Lookahead(hashed), *_names(path))
                    self.sums.check(path, hashed)

    def _files(self) -> Iterator[str]:
        for path in self.paths or ("-",):
            if path == "-" or not Path(path).is_dir():
                yield path
                continue
            entries = sorted(Path(path).iterdir(), key=lambda entry: os.fsencode(entry.name))
            known = archives.neox_form if self.neox else SUFFIXES.search
            files = [entry for entry in entries if known(entry.name) and entry.is_file()]
            if skipped := [entry.name for entry in entries if entry not in set(files)]:
                shown = ", ".join(skipped[:5]) + (" ..." if len(skipped) > 5 else "")
                warn(self.prog, f"{path}: {len(skipped)} entries of this directory are not read: {shown}")
            if not files:
                raise InputMissing(f"{path}: no file with a known ending in this directory; name the files themselves")
            yield from map(os.fspath, files)

    def _blocks_of(self, stream: Lookahead, name: str, path: str | None) -> Iterator[Block]:
        """The records of one file or member, whatever it is wrapped in.

        Args:
            path: the file on disk, where random access is possible.
        """
        if self.neox and (special := archives.neox_form(name)):
            yield from archives.neox_blocks(special, stream, name, path, self.limits)
            return
        for _ in range(3):  # a .tar.gz.zst is odd, but harmless
            inner = decompressed(stream, name, long_window=self.limits.long_window)
            if inner is stream:
                break
            stream, path = inner, None
        head = stream.peek(HEAD_BYTES)
        if self.format != "auto":
            yield from self._as(self.format, stream, name)
        elif archives.is_zip(head):
            yield from archives.zip_blocks(path, name, self.limits, self._blocks_of)
        elif archives.is_tar(head):
            yield from archives.tar_blocks(stream, name, self._blocks_of)
        elif archives.is_columnar(head):
            from neox_tokenize.columnar import column_blocks

            yield from column_blocks(stream, name, path, head, self.keys)
        elif archives.is_dat(head):
            yield from archives.dat_blocks(stream, name, self.limits)
        else:
            yield from self._as(_text_format(head, name), stream, name)

    def _as(self, form: str, stream: Lookahead, name: str) -> Iterator[Block]:
        if form == "jsonl":
            yield from line_blocks(stream, name, "json", self.limits)
        elif form == "lines":
            yield from line_blocks(stream, name, "text", self.limits)
        elif form == "json":
            yield from archives.json_array_blocks(stream, name, self.limits)
        elif form == "text":
            if document := read_document(stream, name, self.limits):
                yield Block(name, "text", "document", 1, [document], [name])
        else:
            raise UsageError(f"--format {form}: one of {', '.join(FORMATS)}")


@contextlib.contextmanager
def _shallow(path: str) -> Iterator[None]:
    """Refuse archives nested so deep that Python gives up, such as one that unpacks to itself."""
    try:
        yield
    except RecursionError as error:
        raise DataError(f"{path}: archives in archives, nested too deep; unpack them first") from error


def gathered(blocks: Iterable[Block]) -> Iterator[Block]:
    """Join small texts with names of their own (files, members of an archive) to blocks of the usual size."""
    records: list[bytes] = []
    names: list[str] = []
    size = 0
    for block in blocks:
        if block.names is not None:
            records += block.records  # type: ignore[arg-type]
            names += block.names
            size += sum(map(len, block.records))
        if records and (block.names is None or size >= BLOCK_BYTES or len(records) >= BLOCK_TEXTS):
            yield Block(block.source, "text", "document", 1, records, names)
            records, names, size = [], [], 0
        if block.names is None:
            yield block
    if records:
        yield Block(names[0], "text", "document", 1, records, names)


def _names(path: str) -> tuple[str, str | None]:
    """What messages call an input, and its file if it has one."""
    return ("stdin", None) if path == "-" else (path, path)


def _text_format(head: bytes, name: str) -> str:
    """Which of FORMATS uncompressed data is that starts with `head`."""
    for magic, what in UNSUPPORTED.items():
        if head.startswith(magic):
            raise InputMissing(f"{name}: this is {what}, which is not read; convert it to JSONL first")
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n\x1e")
    if not body:  # nothing but blanks: blank lines, unless this is a text by its name
        return "text" if name.endswith((".txt", ".md")) else "jsonl"
    if body[:1] == b"[":
        return "json" if _is_json_array(body) or name.endswith(".json") else "text"
    if body[:1] == b"{":
        return "text" if name.endswith((".txt", ".md")) and not _first_line_is_json(body) else "jsonl"
    if body[:1] == b'"':
        return "jsonl" if name.endswith(("jsonl", "ndjson")) or _first_line_is_json(body) else "text"
    if name.rsplit(":", 1)[-1].split(".gz")[0].split(".zst")[0].endswith((".jsonl", ".ndjson")):
        return "jsonl"  # its first line is broken; say so rather than make one long document of the file
    return "text"


def _first_line_is_json(body: bytes) -> bool:
    line, newline, _ = body.partition(b"\n")
    try:
        json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return not newline and len(body) > HEAD_BYTES // 2  # a first line too long to see the end of
    return True


def _is_json_array(body: bytes) -> bool:
    inner = body[1:].lstrip()[:1]
    return inner in (b'"', b"{", b"]", b"")


def expand(paths: Iterable[Path | str]) -> tuple[str, ...]:
    """Command line arguments as strings, checked to be there before any work is done."""
    result = tuple(os.fspath(path) for path in paths)
    for path in result:
        if path != "-" and not Path(path).exists():
            raise InputMissing(f"{path}: no such file or directory")
    return result
