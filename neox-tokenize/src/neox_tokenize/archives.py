# SPDX-License-Identifier: Apache-2.0
"""Archives and the other forms of lm_dataformat. Members are streamed; nothing is ever written to disk.

form                 content
.tar, .tar.*         members in order; each is read like a file of its own (JSONL, compressed or not, or one text)
.zip                 the same; needs a real file, its directory is at the end
.dat                 16 ASCII digits, that many bytes of UTF-8, and again
.json                one JSON array of documents
"""

from __future__ import annotations

import errno
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

from libneox.decompress import decompressed
from libneox.errors import DataError, UnsafeInput, UsageError
from libneox.lookahead import Lookahead, Readable
from neox_tokenize.blocks import BLOCK_BYTES, READ_BYTES, Block, Limits, line_blocks, read_document

DAT_LENGTH = 16
# RuntimeError: encrypted. OSError without a file: a seek to where a damaged directory points, or damaged bzip2.
UNREADABLE_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError, EOFError, OSError,
    UnicodeDecodeError,
)  # fmt: skip
OpenMember = Callable[[Lookahead, str, "str | None"], Iterator[Block]]


def is_zip(head: bytes) -> bool:
    """Whether data starting with `head` is a zip archive."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def is_tar(head: bytes) -> bool:
    """Whether data starting with `head` is a tar archive: its first header is marked as one, or its checksum fits."""
    if len(head) < tarfile.BLOCKSIZE:
        return False
    if head[257:262] == b"ustar" and b"\0" in head[:257]:
        return True  # tarfile says what is wrong with it
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def is_columnar(head: bytes) -> bool:
    """Whether data starting with `head` is Parquet or Arrow."""
    return head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"))


def is_dat(head: bytes) -> bool:
    """Whether data starting with `head` is a .dat: a length of 16 digits, and another one behind that much text."""
    if not re.match(rb"0000[0-9]{12}", head):  # no document has a terabyte, but a text may begin with a long number
        return False
    following = head[DAT_LENGTH + int(head[:DAT_LENGTH]) :][:DAT_LENGTH]
    return re.fullmatch(rb"[0-9]{0,16}", following) is not None


def tar_blocks(stream: Lookahead, name: str, open_member: OpenMember) -> Iterator[Block]:
    """The members of a tar archive, streamed.

    Raises:
        UnsafeInput: a link, a device, or a path that leads out of the archive.
        DataError: the archive is cut off, damaged, or followed by something that would be lost, such as another one.
    """
    source = _LastBlock(stream)
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                where = f"{name}:{member.name}"
                if member.isdir():
                    continue
                _check_member(member.name, where, plain=member.isfile())
                content = archive.extractfile(member)
                if content is not None and member.size:
                    yield from open_member(_Member(content, stream), where, None)
            end = source.behind(archive.offset)
    except tarfile.TarError as error:
        raise DataError(f"{name}: the tar archive is damaged or cut off ({error})") from error
    # tarfile ends without a word at a header that is damaged or not there
    if len(end) < tarfile.BLOCKSIZE:
        raise DataError(f"{name}: the tar archive stops without its end mark; it is cut off")
    while end:
        if end.strip(b"\0"):
            raise DataError(
                f"{name}: what follows the members read so far is no tar header; the archive is damaged, or two were "
                "joined: name them one by one"
            )
        end = stream.read1(READ_BYTES)


def zip_blocks(path: str | None, name: str, limits: Limits, open_member: OpenMember) -> Iterator[Block]:
    """The members of a zip archive; same rules as `tar_blocks`."""
    if path is None:
        raise UsageError(f"{name}: a zip archive has its directory at the end and cannot be streamed; name the file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_directory(archive, name)
            for member in archive.infolist():
                where = f"{name}:{member.filename}"
                if not member.is_dir():
                    _check_zip_member(member, where, limits)
                with archive.open(member) as content:  # compares the names: damage can make a directory of a file
                    if not member.is_dir():
                        yield from open_member(Lookahead(content), where, None)
    except UNREADABLE_ZIP as error:
        if isinstance(error, OSError) and (error.errno not in (None, errno.EINVAL) or error.filename):
            raise
        raise DataError(f"{name}: the zip archive cannot be read ({error})") from error


def _check_directory(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an archive of which zipfile would read some members only, without a word.

    It does not count entries, so one whose length is wrong hides those behind it; and whatever stands in front of an
    archive it takes for a program that unpacks it.
    """
    assert archive.fp is not None
    # zipfile keeps little of the record at the end; this is the one it found, among comments and zip64's
    end = zipfile._EndRecData(archive.fp)  # type: ignore[attr-defined]
    stated, offset = end[zipfile._ECD_ENTRIES_TOTAL], end[zipfile._ECD_OFFSET]  # type: ignore[attr-defined]
    found = len(archive.infolist())
    if (stated - found) % (1 << 16):  # programs without zip64 write the two bytes that there is room for
        raise DataError(f"{name}: the zip archive's directory holds {found} of its {stated} entries; it is damaged")
    archive.fp.seek(0)
    if archive.start_dir > offset and archive.fp.read(4) == b"PK\x03\x04":
        raise DataError(
            f"{name}: in front of what the zip archive's directory names there are other members; it is damaged, or "
            "two were joined: name them one by one"
        )


def _check_zip_member(member: zipfile.ZipInfo, where: str, limits: Limits) -> None:
    mode = member.external_attr >> 16
    _check_member(member.filename, where, plain=stat.S_IFMT(mode) in (0, stat.S_IFREG))
    if member.file_size > limits.record_bytes and member.file_size > 1000 * max(member.compress_size, 1):
        raise DataError(f"{where}: {member.file_size} bytes out of {member.compress_size}; refused as a bomb")


def dat_blocks(stream: Lookahead, name: str, limits: Limits) -> Iterator[Block]:
    """Documents with their length in front."""
    records: list[bytes] = []
    size, first, offset = 0, 1, 0
    while digits := stream.read(DAT_LENGTH):
        if not re.fullmatch(rb"[0-9]{16}", digits):
            raise DataError(f"{name}: at byte {offset}: a length of 16 digits expected, not {digits!r}; cut off?")
        length = int(digits)
        limits.check(length, f"{name}: document {first + len(records)}", stream, 0)
        text = stream.read(length)
        if len(text) < length:
            raise DataError(f"{name}: at byte {offset}: a document of {length} bytes, but only {len(text)} are left")
        records.append(text)
        size += length
        offset += DAT_LENGTH + length
        if size >= BLOCK_BYTES:
            yield Block(name, "text", "document", first, records)
            first, records, size = first + len(records), [], 0
    if records:
        yield Block(name, "text", "document", first, records)


def json_array_blocks(stream: Lookahead, name: str, limits: Limits) -> Iterator[Block]:
    """The elements of one JSON array. The array is held in memory, and so falls under the limit of a document."""
    import msgspec

    data = read_document(stream, name, limits).removeprefix(b"\xef\xbb\xbf")
    try:
        elements = [bytes(raw) for raw in msgspec.json.decode(data, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{name}: not one valid JSON array ({error})") from error
    del data
    for start in range(0, len(elements), 1000):
        yield Block(name, "json", "element", start + 1, elements[start : start + 1000])


# suffix and form, in lm_dataformat's order
NEOX_FORMS = (
    (".dat.zst", "dat"),
    (".jsonl", "jsonl"),
    (".jsonl.zst", "jsonl"),
    (".jsonl.zst.tar", "tar"),
    (".json.zst", "json"),
    (".txt", "text"),
    (".zip", "zip"),
    (".tar.gz", "tar"),
    (".json.gz", "jsonl"),
    (".gz", "lines"),
)


def neox_form(name: str) -> str | None:
    """The form that GPT-NeoX's reader (lm_dataformat) sees in a file of this name: by suffix, in its order."""
    return next((form for suffix, form in NEOX_FORMS if name.endswith(suffix)), None)


def neox_blocks(form: str, stream: Lookahead, name: str, path: str | None, limits: Limits) -> Iterator[Block]:
    """A file as GPT-NeoX read it. Its quirks: lines of a .gz keep their newline, a .txt has universal newlines."""

    def member(content: Lookahead, where: str, _: str | None) -> Iterator[Block]:
        if name.endswith(".jsonl.zst.tar"):
            yield from line_blocks(decompressed(content, where), where, "json", limits)
        else:
            yield Block(where, "text", "document", 1, [read_document(content, where, limits)], [where])

    inner = decompressed(stream, name, long_window=limits.long_window)
    if form == "jsonl":
        yield from line_blocks(inner, name, "json", limits)
    elif form == "lines":
        yield from line_blocks(inner, name, "text", limits, keep_ends=True)
    elif form == "text":
        text = read_document(inner, name, limits).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield Block(name, "text", "document", 1, [text], [name])
    elif form == "dat":
        yield from dat_blocks(inner, name, limits)
    elif form == "json":
        yield from json_array_blocks(inner, name, limits)
    elif form == "zip":
        yield from zip_blocks(path, name, limits, member)
    else:
        yield from tar_blocks(inner, name, member)


def _check_member(member: str, where: str, *, plain: bool) -> None:
    if not plain:
        raise UnsafeInput(f"{where}: a link or device in an archive is refused; remove it from the archive")
    parts = member.replace("\\", "/").split("/")
    if member.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", member):
        raise UnsafeInput(f"{where}: this path leads out of the archive; refused")


class _Member(Lookahead):
    """A member of a tar archive, which may be compressed as a whole."""

    def __init__(self, content: Readable, archive: Lookahead):
        super().__init__(content)
        self._archive, self._started = archive, archive.compressed_bytes

    @property
    def compressed_bytes(self) -> int | None:
        now = self._archive.compressed_bytes
        return None if now is None or self._started is None else now - self._started


class _LastBlock(io.RawIOBase):
    """A stream for tarfile that remembers the last piece it gave."""

    def __init__(self, stream: Lookahead):
        self._stream = stream
        self._last = b""
        self._given = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if data:
            self._last = data
            self._given += len(data)
        return data

    def behind(self, offset: int) -> bytes:
        """What was given from an offset on, which lies in the last piece or at its end."""
        return self._last[max(0, len(self._last) - (self._given - offset)) :] if offset < self._given else b""
