# SPDX-License-Identifier: Apache-2.0
"""Samples of whole documents: the original's order, without its defects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from libneox.data.documents import DocumentSamples
from libneox.data.mmap import MMapDataset
from libneox.data.splits import DataSpec, Sources, build_splits
from libneox.errors import DataError, UsageError


def _splits(golden: Path, case: str, samples: int | None = None):
    folder = golden / "data/e_packing" / case
    meta = json.loads((folder / "meta.json").read_text())
    paths = {
        key: (str(golden / f"data/e_mask_chat/{meta[key]}_document"),)
        for key in ("text", "label", "reward")
        if meta[key]
    }
    spec = DataSpec(
        seq_length=meta["seq_length"],
        seed=meta["seed"],
        sources={"train": Sources(paths["text"], labels=paths.get("label", ()), rewards=paths.get("reward", ()))},
        packing=meta["pack_impl"],
        allow_chopped=meta["allow_chopped"],
    )
    # the goldens were made without the half percent that per-split paths add
    stored = {"train": [[meta["num_samples"]]]} if meta["pack_impl"] != "packed" else None
    return folder, meta, build_splits(spec, train_samples=meta["num_samples"], epochs=stored).train


def test_packed_with_labels_equals_the_original(golden: Path) -> None:
    _, meta, train = _splits(golden, "p01_packed_label")
    found = train.read(range(meta["len"]))
    for name, array in (("text", found.tokens), ("label", found.labels)):
        assert hashlib.sha256(array.tobytes()).hexdigest() == meta["sha256"][name]


OVERFLOW = ["p02_overflow_nolabel", "p03_overflow_label", "p04_overflow_nochop"]
UNPACKED = ["p05_unpacked_label", "p06_unpacked_nochop", "p07_unpacked_reward", "p08_unpacked_chat"]


@pytest.mark.parametrize("case", [*OVERFLOW, *UNPACKED])
def test_documents_of_each_sample_equal_the_original(golden: Path, case: str) -> None:
    folder, meta, train = _splits(golden, case)
    doc, sample, shuffle = (np.load(next(folder.glob(f"*_{name}_idx.npy"))) for name in ("doc", "sample", "shuffle"))
    last = meta["num_samples"] - 1  # the original stops filling its last sample after one document
    for i in range(meta["num_samples"]):
        k = int(shuffle[i])
        if k != last or case in UNPACKED:
            assert train.documents(i).tolist() == doc[sample[k, 0] : sample[k + 1, 0]].tolist()


@pytest.mark.parametrize("case", [*OVERFLOW, *UNPACKED])
def test_rows_equal_the_original_but_for_its_foreign_token(golden: Path, case: str) -> None:
    folder, meta, train = _splits(golden, case)
    theirs = {path.stem.split("_")[-1]: np.load(path) for path in folder.glob("first*.npy")}
    shuffle = np.load(next(folder.glob("*_shuffle_idx.npy")))
    ours = train.read(range(len(theirs["text"])))
    text = MMapDataset(golden / f"data/e_mask_chat/{meta['text']}_document")
    for row in range(len(ours.tokens)):
        if shuffle[row] == meta["num_samples"] - 1:
            continue  # answered by another sample in the original
        end = min(int(text.sizes[train.documents(row)].sum()), meta["seq_length"] + 1)
        np.testing.assert_array_equal(ours.tokens[row, :end], theirs["text"][row, :end])
        assert (ours.tokens[row, end:] == 0).all()
        assert (ours.labels[row, end:] == -100).all()
        if "label" in theirs:
            np.testing.assert_array_equal(ours.labels[row, :end], theirs["label"][row, :end])
        if "reward" in theirs:
            np.testing.assert_array_equal(ours.rewards[row, :end], theirs["reward"][row, :end])
            assert (ours.rewards[row, end:] == 0).all()


def test_validation_never_reads_training_documents(make_pair) -> None:
    prefix = make_pair("a", [[k, k] for k in range(100)])
    for packing in ("unpacked", "pack_until_overflow"):
        spec = DataSpec(seq_length=5, data_path=str(prefix), split="80,10,10", packing=packing)
        splits = build_splits(spec, train_samples=200, valid_samples=30, test_samples=30)
        for found, lo, hi in ((splits.train, 0, 80), (splits.valid, 80, 90), (splits.test, 90, 100)):
            read = found.read(range(len(found)))
            real = read.tokens[read.labels >= 0]
            assert real.min() >= lo
            assert real.max() < hi
            assert set(real.tolist()) == set(range(lo, hi))  # and all of them


def test_padding_is_not_trained_on_without_labels(make_pair) -> None:
    prefix = make_pair("a", [[5, 6, 7], [8]])
    spec = DataSpec(seq_length=5, data_path=str(prefix), split="1", packing="unpacked")
    read = build_splits(spec, train_samples=2).train.read([0, 1])
    rows = {
        tuple(tokens): tuple(labels) for tokens, labels in zip(read.tokens.tolist(), read.labels.tolist(), strict=True)
    }
    assert rows == {(5, 6, 7, 0, 0, 0): (5, 6, 7, -100, -100, -100), (8, 0, 0, 0, 0, 0): (8, *[-100] * 5)}


def test_samples_are_filled_but_never_over(make_pair) -> None:
    rng = np.random.RandomState(2)
    lengths = rng.randint(0, 15, 200)
    prefix = make_pair("a", [[k] * n for k, n in enumerate(lengths)])
    spec = DataSpec(seq_length=19, data_path=str(prefix), split="1", packing="pack_until_overflow")
    train = build_splits(spec, train_samples=300).train
    seen = np.concatenate([train.documents(i) for i in range(300)])
    for i in range(300):
        documents = train.documents(i)
        assert 0 < lengths[documents].sum() <= 20
    assert set(seen.tolist()) == set(np.flatnonzero(lengths).tolist())  # empty documents fill nothing
    filled = lengths[seen].sum() / (300 * 20)
    assert filled > 0.7


def test_masked_and_long_documents_are_left_out(make_pair) -> None:
    documents = [[1] * 3, [2] * 3, [3] * 30, [4] * 3]
    text = make_pair("t", documents, "int32")
    labels = make_pair("l", [[-100, -100, 1], [-100] * 3, [-100] * 25 + [3] * 5, [4] * 3], "int32")
    for chop, expected in ((True, {1, 4}), (False, {1, 4})):
        sources = Sources((str(text),), labels=(str(labels),))
        for packing in ("unpacked", "pack_until_overflow"):
            spec = DataSpec(seq_length=9, sources={"train": sources}, packing=packing, allow_chopped=chop)
            read = build_splits(spec, train_samples=8).train.read(range(8))
            assert set(read.tokens[read.tokens > 0].tolist()) == expected
    spec = DataSpec(seq_length=9, data_path=str(text), split="1", packing="unpacked", allow_chopped=False)
    read = build_splits(spec, train_samples=8).train.read(range(8))
    assert set(read.tokens[read.tokens > 0].tolist()) == {1, 2, 4}


def test_no_usable_document_is_an_error_not_a_loop(make_pair) -> None:
    prefix = make_pair("a", [[1] * 30])
    for packing in ("unpacked", "pack_until_overflow"):
        spec = DataSpec(seq_length=9, data_path=str(prefix), split="1", packing=packing, allow_chopped=False)
        with pytest.raises(DataError, match="none of its documents"):
            build_splits(spec, train_samples=8)


def test_preference_pairs_stay_aligned(make_pair) -> None:
    rng = np.random.RandomState(4)
    better = make_pair("p", [[k + 1] * n for k, n in enumerate(rng.randint(1, 8, 50))])
    worse = make_pair("n", [[k + 101] * n for k, n in enumerate(rng.randint(1, 8, 50))])
    for packing in ("unpacked", "pack_until_overflow"):
        sources = Sources((str(better),), rejected=(str(worse),))
        spec = DataSpec(seq_length=11, sources={"train": sources}, packing=packing)
        train = build_splits(spec, train_samples=60).train
        read = train.read(range(60))
        for chosen, rejected in zip(read.tokens.tolist(), read.rejected.tokens.tolist(), strict=True):
            pairs = [list(dict.fromkeys(token for token in row if token)) for row in (chosen, rejected)]
            assert [token + 100 for token in pairs[0]] == pairs[1]
        one = train.get(3)
        np.testing.assert_array_equal(one.rejected.tokens, read.rejected.tokens[3])


def test_unequal_pairs_and_labels_are_refused(make_pair) -> None:
    three, two, other = make_pair("a", [[1]] * 3), make_pair("b", [[1]] * 2), make_pair("c", [[1, 1], [1], [1]])
    cases = [
        Sources((str(three),), rejected=(str(two),)),
        Sources((str(three),), labels=(str(two),)),
        Sources((str(three),), labels=(str(other),)),
        Sources((str(three),), rewards=(str(two),)),
    ]
    for sources in cases:
        with pytest.raises(DataError):
            build_splits(DataSpec(seq_length=4, sources={"train": sources}, packing="unpacked"), train_samples=3)
    with pytest.raises(UsageError, match="pack_impl"):
        DataSpec(seq_length=4, sources={"train": Sources((str(three),), rejected=(str(three),))})
    with pytest.raises(UsageError, match="reward"):
        DataSpec(seq_length=4, sources={"train": Sources((str(three),), rewards=(str(three),))})


def test_a_longer_run_goes_on_where_it_was(make_pair) -> None:
    data = MMapDataset(make_pair("a", [[k + 1] for k in range(10)]))
    common = {"packing": "unpacked", "seed": 1, "seq_length": 2}
    short = DocumentSamples(data, 0, 10, segments=[7], **common)
    longer = DocumentSamples(data, 0, 10, segments=[7, 6], **common)
    np.testing.assert_array_equal(longer.batch(range(7)), short.batch(range(7)))
    assert sorted(longer.batch(range(7, 13))[:, 0].tolist()) == [1, 2, 3, 8, 9, 10]
