# SPDX-License-Identifier: Apache-2.0
"""The order of samples: against arrays made by running GPT-NeoX, and the keyed order's own promises."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from libneox.data.mmap import MMapDataset
from libneox.data.order import HashOrder, PackedOrder, epochs_for, permute, samples_in, split_bounds
from libneox.data.splits import NAMES, DataSpec, build_splits
from libneox.errors import UsageError

INDEX_CASES = [
    "s01_default_split", "s02_one_epoch", "s03_three_epochs", "s05_multi_2048", "s06_seed_max", "s08_exact_one_epoch",
    "s10_noeod", "s11_char", "s12_seq_len_2", "s14_doc_shorter_seq",
]  # fmt: skip


@pytest.mark.parametrize("case", INDEX_CASES)
def test_order_and_samples_equal_the_original(golden: Path, case: str) -> None:
    folder = golden / "data/b_index" / case
    meta = json.loads((folder / "meta.json").read_text())
    train, valid, test = meta["num_samples"]
    spec = DataSpec(
        seq_length=meta["seq_length"],
        seed=meta["seed"],
        data_path=str(golden / "data/a_preprocess" / meta["data_prefix"]),
        split=meta["split"],
    )
    splits = build_splits(spec, train_samples=train, valid_samples=valid, test_samples=test)
    for name in NAMES:
        expected, found = meta["sets"][name], getattr(splits, name)
        if expected is None:
            assert found is None
            continue
        assert splits.epochs[name] == [[expected["num_epochs"]]]
        assert len(found) == expected["len"] + 1  # the original cannot reach its last sample
        digest = hashlib.sha256(found.batch(range(expected["len"])).astype("<i8").tobytes()).hexdigest()
        assert digest == expected["all_samples_sha256"]
        arrays = {path.stem.split("_")[-2]: np.load(path) for path in folder.glob(f"*_{name}_*_idx.npy")}
        _check_arrays(found.order(0), arrays, meta["seq_length"])
        first = np.load(next(folder.glob(f"{name}_first*_samples.npy")))
        np.testing.assert_array_equal(np.stack([found.get(i).tokens for i in range(len(first))]), first)


def _check_arrays(order: PackedOrder, expected: dict[str, np.ndarray], length: int) -> None:
    for ours, theirs in ((order.documents, expected["doc"]), (order.shuffle, expected["shuffle"])):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    located = [order.locate(k * length) for k in range(len(order) + 1)]
    np.testing.assert_array_equal(located[1:], expected["sample"][1:])


def test_splits_equal_the_original(golden: Path) -> None:
    cases = json.loads((golden / "data/c_blend/meta.json").read_text())["splits"]
    assert len(cases) == 88
    for case in cases:
        assert list(split_bounds(case["split"], case["size"])) == case["out"], case


@pytest.mark.parametrize("split", ["", "a,b", "-1,2", "0,0,0", "nan", "inf,1"])
def test_senseless_splits_are_refused(split: str) -> None:
    with pytest.raises(UsageError, match="split"):
        split_bounds(split, 10)


def test_epochs_are_the_smallest_number_that_suffices() -> None:
    for tokens in (1, 2, 63, 64, 65, 1000):
        for length in (1, 2, 64, 999):
            for samples in (1, 2, 7, 1000):
                epochs = epochs_for(samples, length, tokens)
                assert samples_in(epochs, length, tokens) >= samples
                assert epochs == 1 or samples_in(epochs - 1, length, tokens) < samples


def test_located_tokens_equal_a_plain_prefix_sum() -> None:
    rng = np.random.RandomState(3)
    sizes = rng.randint(0, 9, 1000).astype(np.int32)  # empty documents too
    order = PackedOrder(sizes, 100, 900, seed=5, seq_length=7, epochs=3)
    ends = np.cumsum(sizes[order.documents], dtype=np.int64)
    for token in [0, 1, *rng.randint(0, ends[-1], 300).tolist(), int(ends[-1]) - 1]:
        document = int(np.searchsorted(ends, token, side="right"))
        assert order.locate(token) == (document, token - (int(ends[document - 1]) if document else 0))
    stream = [(d, k) for d in order.documents.tolist() for k in range(sizes[d])]
    for start in rng.randint(0, len(stream) - 50, 50).tolist():
        got = [(d, k) for d, lo, hi in order.pieces(start, 50) for k in range(lo, hi)]
        assert got == stream[start : start + 50]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        PackedOrder(np.array([10], np.int32), 0, 1, seed=seed, seq_length=2, epochs=1)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection_that_its_key_changes(size: int) -> None:
    one, other = (permute(np.arange(size), size, key) for key in (1, 2))
    assert sorted(one.tolist()) == list(range(size))
    if size > 60:
        assert (one != other).mean() > 0.9
        assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < 0.3


def test_permute_spreads_evenly() -> None:
    """Cells of (position, image) are filled as evenly as chance would: chi-squared with 15 * 15 free cells."""
    size = 1 << 16
    image = permute(np.arange(size), size, 12345)
    cells = np.histogram2d(np.arange(size), image, bins=16)[0]
    chi = float(((cells - size / 256) ** 2 / (size / 256)).sum())
    assert 225 - 5 * 21.2 < chi < 225 + 5 * 21.2


def test_permute_is_fixed_for_good() -> None:
    """Runs depend on these numbers: a change of the function is a change of the order of every run."""
    assert permute(np.arange(8), 1000, 42).tolist() == FIXED
    assert HashOrder(10_000, seed=1, seq_length=99).starts(np.array([0, 1, 101, 102])).tolist() == FIXED_STARTS


FIXED = [85, 605, 594, 389, 468, 241, 891, 932]
FIXED_STARTS = [1188, 1584, 3168, 7128]


def test_hash_order_of_three_billion_samples_is_constant_time() -> None:  # L-04
    samples = 3_000_000_000
    order = HashOrder(samples * 2048 + 1, seed=7, seq_length=2048)
    assert order.per_epoch == samples
    positions = np.array([0, 2_900_000_000, samples - 1, samples, 5 * samples + 17])
    starts = order.starts(positions)
    assert (starts % 2048 == 0).all()
    assert ((starts >= 0) & (starts < samples * 2048)).all()
    back = permute(np.arange(2_900_000_000, 2_900_000_100), samples, 99)
    assert len(set(back.tolist())) == 100
    assert back.max() > 2**31  # numbers beyond 32 bits are reached


def test_every_epoch_of_the_hash_order_serves_every_sample_once() -> None:
    order = HashOrder(1000, seed=3, seq_length=7)
    epochs = [order.starts(np.arange(order.per_epoch) + e * order.per_epoch) for e in range(8)]
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 7).all()
        assert starts.min() >= 0
        assert starts.max() + 8 <= 1000
    assert len({tuple(starts) for starts in epochs}) == 8
    assert len({int(starts.min()) for starts in epochs}) > 1  # the unused tokens differ


def test_hash_samples_are_slices_of_the_file(numbered: Path) -> None:
    data = MMapDataset(numbered)
    spec = DataSpec(seq_length=16, seed=9, data_path=str(numbered), split="80,20,0", order="hash")
    splits = build_splits(spec, train_samples=100, valid_samples=20)
    lo, hi, end = (
        int(data.pointers[b]) // 4 if b < len(data) else data.num_tokens for b in split_bounds("80,20,0", 60)[:3]
    )
    for found, first, last in ((splits.train, lo, hi), (splits.valid, hi, end)):
        assert found is not None
        tokens = found.batch(range(len(found)))
        assert (np.diff(tokens, axis=1) == 1).all()
        assert tokens.min() >= first
        assert tokens.max() < last
    assert len(splits.train or ()) == 100
    assert splits.epochs == {"train": [[]], "valid": [[]]}
