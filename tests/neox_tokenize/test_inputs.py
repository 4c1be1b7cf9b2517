# SPDX-License-Identifier: Apache-2.0
"""Files of every form, told by what is in them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from libneox.errors import DataError, InputMissing, IntegrityError, NeoxError, UnsafeInput, UsageError
from neox_tokenize.inputs import Inputs
from tests.peak_memory import measured

TEXTS = ["first\nwith two lines", "ünïcödé 😀 日本語", " ", "x" * 300]
JSONL = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def zstd(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


def tar(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE, linkname: str = "") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (len(data) if kind == tarfile.REGTYPE else 0), kind, linkname
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


MEMBERS = {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)}
HALVES = JSONL.splitlines(keepends=True)
DAT = b"".join(b"%016d" % len(text.encode()) + text.encode() for text in TEXTS)


@pytest.mark.parametrize("name", ["right", "lies.zst", "lies.gz", "lies.txt", "lies.tar"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(JSONL, id="jsonl"),
        pytest.param(JSONL[:-1], id="no newline at the end"),
        pytest.param(zstd(JSONL), id="zstd"),
        pytest.param(zstd(HALVES[0]) + zstd(b"".join(HALVES[1:])), id="two frames"),
        pytest.param(zstd(JSONL[:30]) + zstd(JSONL[30:]), id="frames that cut a line"),
        pytest.param(gzip.compress(JSONL), id="gzip"),
        pytest.param(lzma.compress(JSONL), id="xz"),
        pytest.param(tar({"a.jsonl.zst": zstd(HALVES[0]), "b": zstd(b"".join(HALVES[1:]))}), id="tar of zstd"),
        pytest.param(gzip.compress(tar(MEMBERS)), id="tar.gz of texts"),
        pytest.param(tar(MEMBERS), id="tar of texts"),
        pytest.param(zipped(MEMBERS), id="zip of texts"),
        pytest.param(zipped({"x.jsonl": JSONL}), id="zip of jsonl"),
        pytest.param(zstd(DAT), id="dat.zst"),
        pytest.param(zstd(json.dumps(TEXTS).encode()), id="json array of strings"),
        pytest.param(json.dumps([{"text": text} for text in TEXTS]).encode(), id="json array of objects"),
        pytest.param("\n".join(map(json.dumps, TEXTS)).encode(), id="bare strings"),
    ],
)
def test_forms(tokenize, data: bytes, name: str) -> None:
    assert tokenize(data, name).texts == TEXTS


def test_text_files(tokenize) -> None:
    text = "one\r\ntwo\n\n  three\n"
    assert tokenize(text, "a.txt").texts == [text]
    assert tokenize(gzip.compress(text.encode()), "a.gz").texts == [text]
    assert tokenize(text, "a.txt", format="lines").texts == ["one", "two", "  three"]
    assert tokenize('"Hello," she said.\nAnd more.', "a.txt").texts == ['"Hello," she said.\nAnd more.']
    assert tokenize("{ is how this text begins", "a.txt").texts == ["{ is how this text begins"]
    assert tokenize(JSONL, "a.jsonl", format="text").texts == [JSONL.decode()]
    with pytest.raises(DataError, match="keys a, b need records with fields"):
        tokenize(text, "a.txt", key=["a", "b"])


def test_many_members_keep_their_order_and_names(tokenize) -> None:
    members = {f"{i}": b"\xef\xbb\xbf" + b"text %d" % i for i in range(10000)}
    assert tokenize(tar(members)).texts == [f"text {i}" for i in range(10000)]
    members["9000"] = b"\xff"
    with pytest.raises(DataError, match=r"data:9000: invalid UTF-8"):
        tokenize(tar(members), "data")


def test_a_broken_first_line_is_no_text_document(tokenize) -> None:
    with pytest.raises(DataError, match="in.jsonl:1: broken JSON"):
        tokenize('text": "a"}\n{"text": "b"}')


def test_parquet_and_arrow(tokenize, tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "meta": [{"lang": "de"}] * 4, "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert tokenize(tmp_path / name).texts == TEXTS
        assert tokenize(tmp_path / name, key=["meta.lang"]).texts == ["de"] * 4
        with pytest.raises(DataError, match=r"no column 'body'.*'text'"):
            tokenize(tmp_path / name, key=["body"])
        with pytest.raises(DataError, match=r"row 1.*is a number"):
            tokenize(tmp_path / name, key=["n"])
        cut = (tmp_path / name).read_bytes()
        with pytest.raises(DataError, match="damaged"):
            tokenize(cut[: len(cut) // 2], name)
    with pytest.raises(UsageError, match="name them"):
        tokenize(gzip.compress((tmp_path / "a.parquet").read_bytes()))


def test_tokens_are_not_tokenized_again(tokenize) -> None:
    with pytest.raises(DataError, match="tokens already"):
        tokenize(tokenize(JSONL).data)


def test_directories(tokenize, tmp_path: Path, capfd) -> None:
    for name, text in {"B.jsonl": "from B", "a.txt": "from a", "b.jsonl": "from b"}.items():
        content = text if name.endswith("txt") else json.dumps({"text": text})
        (tmp_path / name).write_text(content)
    (tmp_path / "skip.csv").write_text("a,b")
    (tmp_path / "sub").mkdir()
    assert tokenize(tmp_path).texts == ["from B", "from a", "from b"]
    assert "skip.csv, sub" in capfd.readouterr().err
    with pytest.raises(InputMissing, match="no file with a known ending"):
        tokenize(tmp_path / "sub")


def test_many_files(tokenize, tmp_path: Path) -> None:  # A-21, without its 12 000
    files = []
    for i in range(300):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text(json.dumps({"text": str(i)}))
    assert tokenize(files).texts == [str(i) for i in range(300)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(zstd(JSONL)[: len(zstd(JSONL)) * 6 // 10], "truncated zstd frame at byte", id="A-01"),
        pytest.param(zstd(JSONL)[:-1], "truncated zstd frame at byte", id="A-02 checksum"),
        pytest.param(zstd(JSONL)[:3], "truncated zstd", id="A-02 three bytes"),
        pytest.param(zstd(JSONL) + b"tail", f"at byte {len(zstd(JSONL))}", id="A-04"),
        pytest.param(gzip.compress(JSONL)[:-4], "truncated gzip", id="gzip"),
        pytest.param(tar(MEMBERS)[:1500], "tar archive", id="tar in a member"),
        pytest.param(tar(MEMBERS)[:2048], "without its end mark", id="tar between members"),
        pytest.param(zipped(MEMBERS)[:-30], "zip archive cannot be read", id="zip"),
        pytest.param(DAT[:-1], "only 299 are left", id="dat in a document"),
        pytest.param(DAT[: len(DAT) - 305], "16 digits", id="dat in a length"),
        pytest.param(json.dumps(TEXTS).encode()[:-1], "JSON array", id="json array"),
    ],
)
def test_truncated_input(tokenize, data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        tokenize(data, "data")


def test_flipped_bits(tokenize) -> None:
    data = bytearray(zstd(JSONL))
    for position in range(4, len(data), 7):
        data[position] ^= 8
        with pytest.raises(DataError):
            tokenize(bytes(data))
        data[position] ^= 8


def test_hashes_find_what_the_format_does_not(tokenize, tmp_path: Path) -> None:
    file, plain = tmp_path / "a.jsonl.zst", zstd(b'{"text": "abcdefgh"}\n', checksum=False)
    file.write_bytes(plain)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(plain).hexdigest()}  a.jsonl.zst\n")
    assert tokenize(file, verify_hash=str(sums)).texts == ["abcdefgh"]
    file.write_bytes(plain.replace(b"abcdefgh", b"abcdefgi"))
    assert tokenize(file).texts == ["abcdefgi"]
    with pytest.raises(IntegrityError, match="SHA256SUMS"):
        tokenize(file, verify_hash=str(sums))
    with pytest.raises(UsageError, match="not in"):
        tokenize(JSONL, verify_hash=str(sums))
    sums.write_text("nonsense\n")
    with pytest.raises(DataError, match="SHA256SUMS:1"):
        tokenize(file, verify_hash=str(sums))


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/../../x"])
def test_members_that_lead_out(tokenize, name: str, tmp_path: Path) -> None:
    for data in (tar({name: b"text"}), zipped({name: b"text"})):
        with pytest.raises(UnsafeInput, match="leads out"):
            tokenize(data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tokenize, kind: bytes) -> None:
    with pytest.raises(UnsafeInput, match="link or device"):
        tokenize(tar({"x": b""}, kind, "/etc/passwd"))


def test_a_link_in_a_zip(tokenize) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        info = zipfile.ZipInfo("x")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeInput, match="link or device"):
        tokenize(sink.getvalue())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(zstd(bytes(1 << 26)), id="zeros"),
        pytest.param(zstd(b'{"text": "' + b"a" * (1 << 26) + b'"}'), id="a line"),
        pytest.param(zipped({"x": bytes(1 << 27)}), id="zip"),
        pytest.param(zstd(tar({"a": b"text", "x": bytes(1 << 26)})), id="tar"),
        pytest.param(zstd(tar({"x": tar({"y": b"a" * (1 << 26)})})), id="tar in a tar"),
    ],
)
def test_bombs(tokenize, data: bytes) -> None:
    with pytest.raises(DataError, match="bomb"):
        tokenize(data, max_doc_bytes="100M" if data[:2] == b"PK" else "1G")


def test_a_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    bomb, report = tmp_path / "bomb.zst", tmp_path / "peak"
    bomb.write_bytes(zstd(b'{"text": "' + b"a" * (1 << 29) + b'"}'))
    command = measured([sys.executable, "-m", "neox_tokenize", "-q", bomb], report)
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 65
    assert b"bomb" in done.stderr
    assert int(report.read_text()) <= 300 << 20


def test_what_is_not_read_is_named(tokenize) -> None:
    with pytest.raises(InputMissing, match="7-Zip"):
        tokenize(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(DataError, match="invalid UTF-8"):
        tokenize(bytes(range(256)), "x.dat")


def test_absent_files_are_named_first(tokenize, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="nowhere"):
        tokenize([tmp_path / "nowhere"])


def test_joined_archives_are_refused_rather_than_lost(tokenize) -> None:
    one, two = tar(MEMBERS), tar({"x": b"more"})
    assert tokenize(one + bytes(100_000)).texts == TEXTS  # padding, as on a tape
    for data in (one + two, one.rstrip(b"\0") + bytes(2000 - len(one.rstrip(b"\0")) % 512) + two, one + b"x"):
        with pytest.raises(DataError, match=r"two were joined|end mark"):
            tokenize(data, "data")


def test_every_damaged_header_of_a_tar_is_an_error(tokenize) -> None:
    """tarfile ends without a word at the first header whose checksum is wrong."""
    whole = tar(MEMBERS)
    for member in range(4):
        data = bytearray(whole)
        data[member * 1024 + 10] ^= 1
        with pytest.raises(DataError, match="damaged"):
            tokenize(bytes(data), "data")
    assert tokenize("x" * 257 + "ustar" + "x" * 400, "a.txt").texts == ["x" * 257 + "ustar" + "x" * 400]


def test_compressed_archives_are_read_to_their_end(tokenize) -> None:
    """The checksum of the compression stands behind the end mark of the archive."""
    padded = tar({"a": b"text"}) + bytes(300_000)
    data = zstd(padded)
    assert tokenize(data, "data").texts == ["text"]
    with pytest.raises(DataError, match="truncated zstd"):
        tokenize(data[:-1], "data")


def test_a_damaged_member_of_a_zip(tokenize) -> None:
    whole = zipped({"x": b"some text, and more of it, and more of it" * 50})
    start = whole.index(b"x") + 1
    for position in range(start, start + 40, 3):
        data = bytearray(whole)
        data[position] ^= 0x55
        with pytest.raises(DataError):
            tokenize(bytes(data), "data")
    for position in range(start + 40, len(whole)):  # its directory
        for bit in range(0, 8, 3):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            with contextlib.suppress(NeoxError):
                tokenize(bytes(data), "data")


FILES = {"a.jsonl": JSONL, "d/": b"", "d/foo": b"of a name one bit from a directory's", "z.txt": b"last"}


def zip64(members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A zip archive with all that zip64 adds, at its end and with each member."""
    sink = io.BytesIO()
    with monkeypatch.context() as patch, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    return sink.getvalue()


def zip_streamed(members: dict[str, bytes], comment: bytes) -> bytes:
    """A zip archive written to a pipe, with sizes and checksums behind the members, and with a comment."""
    sink = io.BytesIO()
    pipe = io.BufferedWriter(_Pipe(sink))
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = comment
        for name, data in members.items():
            archive.writestr(name, data)
    pipe.flush()
    return sink.getvalue()


class _Pipe(io.RawIOBase):
    def __init__(self, sink: io.BytesIO):
        self._sink = sink

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self._sink.write(data)


def raw_texts(file: Path, data: bytes, neox: bool = False) -> list[bytes]:
    file.write_bytes(data)
    return [bytes(record) for block in Inputs((str(file),), neox=neox).blocks() for record in block.records]


@pytest.mark.parametrize("form", ["plain", "streamed", "zip64", "prefix"])
def test_no_flipped_bit_hides_a_member_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    whole = {
        "plain": zipped(FILES),
        "streamed": zip_streamed(FILES, b"a comment"),
        "zip64": zip64(FILES, monkeypatch),
        "prefix": b"#!/bin/sh\nexec unzip # PK\3\4\n" + zipped(FILES),
    }[form]
    file, neox = tmp_path / "a.zip", form == "prefix"  # only a file's name can tell that
    texts = raw_texts(file, whole, neox)
    assert len(texts) == (3 if neox else len(HALVES) + 2)
    for position in range(whole.index(b"PK\1\2"), len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            with contextlib.suppress(DataError, UnsafeInput):
                assert raw_texts(file, data, neox) == texts, (position, bit)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_of_another_method(tokenize, method: int) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        archive.writestr("x", "some text " * 50)
    data = bytearray(sink.getvalue())
    data[50] ^= 0x55
    with pytest.raises(DataError, match="the zip archive cannot be read"):
        tokenize(bytes(data), "data")


def test_a_zip_in_front_of_a_zip_is_not_lost(tokenize) -> None:
    """zipfile reads the last one; that is also the one in an archive whose end is missing."""
    sink, inner = io.BytesIO(), zipped({"inner.txt": b"text"})
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("outer.txt", "text")
        archive.writestr("inner.zip", inner)
    cut = sink.getvalue()[: sink.getvalue().index(inner) + len(inner)]
    for data in (zipped(MEMBERS) + inner, zipped(MEMBERS) + zipped({}), cut):
        with pytest.raises(DataError, match="two were joined"):
            tokenize(data, "data")


def arrow_stream(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def test_arrow_streams_are_whole_and_all_are_read(tokenize) -> None:
    one, two = arrow_stream(TEXTS[:2]), arrow_stream(TEXTS[2:])
    assert tokenize(one + two, "data").texts == TEXTS
    assert tokenize(zstd(one + two), "data").texts == TEXTS
    for cut in (8, 4):  # behind the last batch, where Arrow sees nothing wrong
        with pytest.raises(DataError, match=r"damaged|cut off"):
            tokenize(one + two[:-cut], "data")
    with pytest.raises(DataError, match="damaged"):
        tokenize(one + b"tail", "data")
    for position in range(len(one)):  # what Arrow does not check by itself would end in a crash
        flipped = bytearray(one)
        flipped[position] ^= 1 << position % 8
        with contextlib.suppress(NeoxError):
            tokenize(bytes(flipped), "data")


def test_a_directory_as_gpt_neox_reads_it(tokenize, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.md", "c.json", "d.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert tokenize(tmp_path, compat="neox").texts == ["a.jsonl", '{"text": "d.txt"}']
    assert len(tokenize(tmp_path).texts) == 4


def test_a_text_may_begin_with_a_long_number(tokenize) -> None:
    assert tokenize("1234567890123456 is a number", "x").texts == ["1234567890123456 is a number"]


def test_archives_nested_without_end(tokenize) -> None:
    """As one that unpacks to itself."""
    data = b"text"
    for _ in range(1000):
        info = tarfile.TarInfo("x")
        info.size = len(data)
        data = info.tobuf() + data + bytes(-len(data) % 512 + 1024)
    with pytest.raises(DataError, match="nested too deep"):
        tokenize(data, "data")
