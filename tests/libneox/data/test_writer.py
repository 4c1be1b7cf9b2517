# SPDX-License-Identifier: Apache-2.0
"""Writing pairs: they appear whole or not at all, and never over something else."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from libneox.data.manifest import TokenizerRecord, load_tokenizer_of, read_manifest, tokenizer_of
from libneox.data.mmap import MMapDataset
from libneox.data.writer import DatasetWriter
from libneox.errors import DataError, IntegrityError, OutputExists, UsageError
from libneox.files import sha256_file
from libneox.tokenizer import load_tokenizer

ONE = np.array([1]), np.array([1])


def test_nothing_appears_before_the_commit(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(*ONE)
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json")]
    assert list(tmp_path.iterdir()) == []  # no commit: nothing stays behind


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(*ONE)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_manifest_tells_what_was_written(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id)
    with DatasetWriter(tmp_path / "a", "uint16", tokenizer=record, tokenizer_data=tokenizer.data) as writer:
        writer.add(np.arange(5), np.array([2, 0, 3]), documents=np.array([2, 1]))
        written = writer.commit(command=("neox-shard", "x"), rejects={"empty": 3, "long": 0})
    found = read_manifest(tmp_path / "a")
    assert found == written
    assert found is not None
    assert (found.sequences, found.documents, found.tokens, found.dtype) == (3, 2, 5, "uint16")
    assert found.rejects == {"empty": 3}
    for suffix, record_of in ((".bin", found.bin), (".idx", found.idx)):
        path = tmp_path / f"a{suffix}"
        assert (path.stat().st_size, sha256_file(path)) == (record_of.bytes, record_of.sha256)
    assert tokenizer_of(tmp_path / "a") == tmp_path / "a.tokenizer.json"
    loaded = load_tokenizer_of(tmp_path / "a")
    assert loaded is not None
    assert loaded.fingerprint == tokenizer.fingerprint
    assert MMapDataset(tmp_path / "a").doc_idx.tolist() == [0, 2, 3]
    other = tokenizer.data.replace(b"endoftext", b"endoftexx")
    (tmp_path / "a.tokenizer.json").write_bytes(other)
    with pytest.raises(IntegrityError, match="not the tokenizer"):
        load_tokenizer_of(tmp_path / "a")


def test_document_counts_may_begin_late(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", "uint8") as writer:
        writer.add(np.arange(3), np.array([1, 2]))
        writer.add(np.arange(4), np.array([1, 3]), documents=np.array([0, 2]))
        writer.add(np.arange(1), np.array([1]))
        writer.commit()
    data = MMapDataset(tmp_path / "a")
    assert data.doc_idx.tolist() == [0, 1, 2, 2, 4, 5]
    assert data.pointers.tolist() == [0, 1, 3, 4, 7]


@pytest.mark.parametrize("values", [[70000], [-1], [65536]])
def test_values_are_never_wrapped(tmp_path: Path, values: list[int]) -> None:
    with DatasetWriter(tmp_path / "a", "uint16") as writer, pytest.raises(DataError, match="do not fit uint16"):
        writer.add(np.array(values), np.array([1]))


def test_an_existing_output_is_kept_without_force(make_pair, tmp_path: Path) -> None:  # B-10
    prefix = make_pair("a", [[1, 2, 3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputExists, match="--force"):
        DatasetWriter(prefix, "uint16")
    with DatasetWriter(prefix, "uint16", force=True) as writer:
        writer.add(*ONE)  # not committed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    make_pair("a", [[9]], force=True)
    assert MMapDataset(prefix).tokens.tolist() == [9]


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"firmware")
    with pytest.raises(OutputExists, match=r"a\.bin"):
        DatasetWriter(tmp_path / "a", "uint16")
    (tmp_path / "b.json").write_text('{"mine": 1}')
    with pytest.raises(OutputExists, match=r"b\.json"):
        DatasetWriter(tmp_path / "b", "uint16")
    assert (tmp_path / "a.bin").read_bytes() == b"firmware"


def test_a_stale_tokenizer_does_not_outlive_its_data(make_pair, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size)
    prefix = make_pair("a", [[1]], tokenizer=record, tokenizer_data=tokenizer.data)
    assert tokenizer_of(prefix) is not None
    make_pair("a", [[1]], force=True)
    assert tokenizer_of(prefix) is None


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="no such directory"):
        DatasetWriter(tmp_path / "no/a", "uint16")
    (tmp_path / "d.idx").mkdir()
    with pytest.raises(OutputExists):
        DatasetWriter(tmp_path / "d", "uint16", force=True)
    with pytest.raises(UsageError, match="too long"):
        DatasetWriter(tmp_path / ("x" * 250), "uint16")
    with DatasetWriter(tmp_path / ("x" * 240), "uint16") as writer:
        writer.add(*ONE)
        writer.commit()
    assert MMapDataset(tmp_path / ("x" * 240)).tokens.tolist() == [1]


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:  # B-14
    with DatasetWriter(tmp_path / "a", "uint16"):
        with pytest.raises(OutputExists, match="another process"):
            DatasetWriter(tmp_path / "a", "uint16")
        with DatasetWriter(tmp_path / "a_label", "uint16"):
            pass
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(*ONE)
        writer.commit()


def test_a_dead_writer_is_succeeded_and_cleared_away(tmp_path: Path) -> None:  # B-14
    code = (
        "import sys, time, numpy as np; from libneox.data.writer import DatasetWriter\n"
        "w = DatasetWriter(sys.argv[1], 'uint16'); w.add(np.arange(10), np.array([10])); print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    with pytest.raises(OutputExists, match="another process"):
        DatasetWriter(tmp_path / "a", "uint16")
    owner.kill()
    owner.wait(10)
    owner.stdout.close()
    assert any(".tmp-" in path.name for path in tmp_path.iterdir())
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(*ONE)
        writer.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_killed_between_the_renames_the_output_is_no_pair_and_can_be_written_again(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(*ONE)
        writer.commit()
    (tmp_path / "a.idx").unlink()  # the state after the rename of .bin
    with DatasetWriter(tmp_path / "a", "uint16") as writer:  # without force
        writer.add(np.array([2]), np.array([1]))
        writer.commit()
    assert MMapDataset(tmp_path / "a").tokens.tolist() == [2]


def test_writing_keeps_no_list_of_documents(tmp_path: Path) -> None:
    """Python-level memory must not grow with the number of documents."""
    import tracemalloc

    values, lengths = np.zeros(100_000, np.uint16), np.ones(100_000, np.int64)
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add(values, lengths)
        tracemalloc.start()
        started = time.perf_counter()
        for _ in range(20):
            writer.add(values, lengths)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown < 2_000_000, f"{grown} bytes for 2 million documents in {time.perf_counter() - started:.1f} s"
        writer.commit()
    assert len(MMapDataset(tmp_path / "a")) == 2_100_000


def test_a_tokenizer_of_the_users_own_is_not_replaced(make_pair, tmp_path: Path) -> None:
    record = TokenizerRecord("tokenizer.json", hashlib.sha256(b"{1}").hexdigest(), 5)
    (tmp_path / "a.tokenizer.json").write_bytes(b"{mine}")
    with pytest.raises(OutputExists, match="a.tokenizer.json"):
        make_pair("a", [[1]], tokenizer=record, tokenizer_data=b"{1}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokenizer.json"]
    (tmp_path / "a.tokenizer.json").write_bytes(b"{1}")  # the same one is no loss
    make_pair("a", [[1]], tokenizer=record, tokenizer_data=b"{1}")
    other = TokenizerRecord("tokenizer.json", hashlib.sha256(b"{2}").hexdigest(), 5)
    (tmp_path / "a.idx").unlink()  # what a killed writer left is ours to replace
    make_pair("a", [[1]], tokenizer=other, tokenizer_data=b"{2}")
    assert (tmp_path / "a.tokenizer.json").read_bytes() == b"{2}"
