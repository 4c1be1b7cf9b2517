# SPDX-License-Identifier: Apache-2.0
"""Reading pairs: those of the original and of Megatron-core, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from libneox.data.mmap import MMapDataset
from libneox.data.writer import DatasetWriter
from libneox.errors import DataError, InputMissing, UsageError

NEOX_PAIRS = ["edge_eod", "sample_char", "sample_eod", "sample_gpt2", "sample_hfgpt2", "sample_noeod"]
LABEL_PAIRS = ["masked_text_document", "masked_label_document", "chat_conversation_label_document"]
MCORE_SETS = ["mc_u16", "mc_i32_multiseq", "mc_multimodal", "mc_u16_merged"] + [
    f"mc_dtype_{name}" for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "float32", "float64")
]


@pytest.mark.parametrize(
    "name", [*[f"a_preprocess/{n}_text_document" for n in NEOX_PAIRS], *[f"e_mask_chat/{n}" for n in LABEL_PAIRS]]
)
def test_pairs_of_the_original_are_rewritten_byte_for_byte(golden: Path, tmp_path: Path, name: str) -> None:  # B-16
    source = golden / "data" / name
    with MMapDataset(source) as data, DatasetWriter(tmp_path / "out", data.dtype) as writer:
        for i in range(len(data)):
            writer.add(data.get(i), data.sizes[i : i + 1])
        writer.commit()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == Path(f"{source}{suffix}").read_bytes()


@pytest.mark.parametrize("name", MCORE_SETS)
def test_megatron_core_pairs_are_read(golden: Path, name: str) -> None:
    expected = json.loads((golden / "data/d_mcore/meta.json").read_text())["datasets"][name]
    data = MMapDataset(golden / "data/d_mcore" / name)
    assert data.dtype.name == expected["dtype"]  # also where the two projects' codes contradict each other
    assert data.sizes.tolist() == expected["sequence_lengths"]
    assert data.doc_idx.tolist() == expected["document_indices"]
    assert (data.modes.tolist() if data.modes is not None else None) == expected["sequence_modes"]
    for i, (head, total) in enumerate(zip(expected["first_tokens"], expected["sum"], strict=True)):
        sequence = data.get(i)
        assert sequence[: len(head)].tolist() == head
        assert sequence.sum(dtype=np.float64) == total


def test_labels_are_the_text_or_masked(golden: Path) -> None:
    text = MMapDataset(golden / "data/e_mask_chat/masked_text_document")
    labels = MMapDataset(golden / "data/e_mask_chat/masked_label_document")
    assert text.dtype == labels.dtype == np.int32
    masked = labels.tokens < 0
    assert masked.any()
    assert (labels.tokens[masked] == -100).all()
    assert (labels.tokens[~masked] == text.tokens[~masked]).all()


def test_legacy_cached_format_is_refused_with_a_remedy(golden: Path) -> None:
    with pytest.raises(DataError, match=r"TNTIDX.*neox-tokenize"):
        MMapDataset(golden / "data/a_preprocess/edge_cached_text_document")


def test_get_returns_parts_and_refuses_what_is_outside(make_pair) -> None:
    data = MMapDataset(make_pair("a", [[1, 2, 3], [], [4, 5]]))
    assert data.get(0, 1).tolist() == [2, 3]
    assert data.get(0, 1, 1).tolist() == [2]
    assert data.get(1).tolist() == []
    assert data.get(np.int64(2)).tolist() == [4, 5]  # the original returns None for a numpy integer
    for arguments in ((0, 2, 2), (0, -1), (3,)):
        with pytest.raises(IndexError):
            data.get(*arguments)
    with pytest.raises(ValueError, match="read-only"):
        data.get(0)[0] = 9


def test_a_prefix_may_be_named_by_one_of_its_files(make_pair) -> None:
    prefix = make_pair("a.b", [[1]])
    assert (
        MMapDataset(f"{prefix}.idx").prefix
        == MMapDataset(f"{prefix}.bin").prefix
        == MMapDataset(prefix).prefix
        == prefix
    )


def _header(version: int = 1, code: int = 8, count: int = 1, documents: int = 2) -> bytes:
    return struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, count, documents)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "not a neox index"),
        (b"\x01\x00\x02\x00" * 20, "not a neox index"),
        (b"MMIDIDX\0\0" + bytes(3), "truncated"),
        (_header(version=2) + bytes(28), "not a neox index.*version 2"),
        (_header(code=9) + bytes(28), "not a neox index.*code 9"),
        (_header(count=2**63) + bytes(28), "truncated"),
        (_header(documents=2**63) + bytes(28), "truncated"),
        (_header() + bytes(27), "truncated"),
        (_header() + bytes(30), "too long"),
    ],
)
def test_damaged_index_is_refused_at_open(make_pair, index: bytes, message: str) -> None:  # B-01, B-03
    prefix = make_pair("a", [[7]])
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=rf"a\.idx: {message}"):
        MMapDataset(prefix)


def test_swapped_files_are_refused(make_pair) -> None:  # B-01
    prefix = make_pair("a", [[7]])
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.idx").write_bytes(data)
    Path(f"{prefix}.bin").write_bytes(index)
    with pytest.raises(DataError, match="not a neox index"):
        MMapDataset(prefix)


@pytest.mark.parametrize(("change", "message"), [(-2, "shorter"), (1, "longer"), (2, "longer"), (-1, "shorter")])
def test_bin_of_the_wrong_length_is_refused_at_open(make_pair, change: int, message: str) -> None:  # B-02
    prefix = make_pair("a", [[1, 2, 3], [4]])
    path = Path(f"{prefix}.bin")
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DataError, match=rf"a\.bin: .*{message}"):
        MMapDataset(prefix)


def test_missing_files_are_named(make_pair, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"nothing\.idx: no such file"):
        MMapDataset(tmp_path / "nothing")
    prefix = make_pair("a", [[1]])
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(InputMissing, match="never committed"):
        MMapDataset(prefix)


def test_checks_do_not_depend_on_assert(make_pair) -> None:  # B-01
    prefix = make_pair("a", [[1]])
    Path(f"{prefix}.idx").write_bytes(b"x" * 62)
    run = subprocess.run(
        [sys.executable, "-O", "-m", "neox_shard", "info", str(prefix)], capture_output=True, timeout=60, check=False
    )
    assert run.returncode == 65
    assert b"not a neox index" in run.stderr


def test_no_descriptor_is_held(make_pair) -> None:
    prefix = make_pair("a", [[1, 2, 3]] * 4)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    opened = [MMapDataset(prefix) for _ in range(50)]
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    view = opened[0].get(1)
    opened.clear()
    assert view.tolist() == [1, 2, 3]  # the mapping lives as long as a view of it


def test_threads_may_open_and_read_at_once(make_pair) -> None:
    prefix = make_pair("a", [[k] * 50 for k in range(100)])
    wrong: list[int] = []

    def work() -> None:
        for k in range(100):
            with MMapDataset(prefix) as data:
                if data.get(k).tolist() != [k] * 50:
                    wrong.append(k)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_fingerprint_tells_data_apart(make_pair) -> None:
    one, same, other = make_pair("a", [[1, 2], [3]]), make_pair("b", [[1, 2], [3]]), make_pair("c", [[1, 2], [4]])
    split = make_pair("d", [[1], [2, 3]])
    prints = [MMapDataset(prefix).fingerprint for prefix in (one, same, other, split)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_path_without_a_name_is_no_dataset(path: str) -> None:
    with pytest.raises(UsageError, match="no name of a dataset"):
        MMapDataset(path)
    with pytest.raises(UsageError, match="no name of a dataset"):
        DatasetWriter(path, "uint16")
