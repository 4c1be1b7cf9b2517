# SPDX-License-Identifier: Apache-2.0
"""Mixtures: against GPT-NeoX's blending indices, and far beyond them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libneox.data.blend import Blend, normalized, samples_of_each, weights_by_documents
from libneox.data.splits import DataSpec, Sources, build_splits
from libneox.errors import UsageError


@pytest.fixture(scope="module")
def meta(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "data/c_blend/meta.json").read_text())


def _plain(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """The rule as it is written, one position after another."""
    shares = np.array(normalized(weights))
    served = np.zeros(len(shares))
    datasets, samples = [], []
    for position in range(size):
        best = int((shares * max(position, 1) - served).argmax())
        datasets.append(best)
        samples.append(int(served[best]))
        served[best] += 1
    return datasets, samples


def test_blending_equals_the_original(meta: dict[str, Any]) -> None:
    for case in meta["cases"]:
        datasets, samples = Blend(case["weights"]).indices(case["size"])
        assert [float.hex(w) for w in normalized(case["weights"])] == case["normalized_hex"]
        found = [hashlib.sha256(a.tobytes()).hexdigest() for a in (datasets.astype(np.uint8), samples.astype("<i8"))]
        assert found == [case["dataset_index_sha256"], case["dataset_sample_index_sha256"]], (
            case["name"],
            case["size"],
        )
        assert np.bincount(datasets, minlength=len(case["weights"])).tolist() == case["counts"]


def test_shares_and_document_weights_equal_the_original(meta: dict[str, Any]) -> None:
    for case in meta["normalized_num_samples"]:
        weights = normalized(case["weights"])
        assert weights == case["out_weights"]
        if case["num_samples"] is not None:
            assert samples_of_each(weights, case["num_samples"]) == case["out_num_samples"]
    for case in meta["weights_by_num_docs"]:
        assert weights_by_documents(case["num_docs"], case["alpha"]) == case["out"]


def test_blended_samples_equal_the_original(golden: Path, meta: dict[str, Any]) -> None:
    case = meta["blend_weighted"]
    paths = tuple(str(golden / f"data/a_preprocess/{name}_eod_text_document") for name in ("sample", "edge"))
    sources = Sources(paths, tuple(case["weights"]))
    spec = DataSpec(seq_length=case["seq_length"], seed=case["seed"], sources={"train": sources})
    train = build_splits(spec, train_samples=2000).train
    assert train is not None
    np.testing.assert_array_equal(train.batch(range(200)), np.load(golden / "data/c_blend/blend_weighted_first200.npy"))
    index = np.load(golden / "data/c_blend/blend_weighted_dataset_index.npy")
    sample = np.load(golden / "data/c_blend/blend_weighted_dataset_sample_index.npy")
    datasets, samples = Blend(case["weights"]).indices(len(index))
    np.testing.assert_array_equal(datasets, index)
    np.testing.assert_array_equal(samples, sample)


def test_one_pass_over_unequal_sets_serves_each_sample_once(golden: Path, meta: dict[str, Any]) -> None:
    """Where the original gives a set of one sample half of the run (blend_epochs: 1427 draws of it)."""
    case = meta["blend_epochs"]
    index = np.load(golden / "data/c_blend/blend_epochs_dataset_index.npy")
    np.testing.assert_array_equal(Blend(case["weights"]).indices(len(index))[0], index)  # its rule is reproduced
    paths = tuple(str(golden / f"data/a_preprocess/{name}_eod_text_document") for name in ("sample", "edge"))
    spec = DataSpec(seq_length=32, sources={"train": Sources(paths)}, train_epochs=1)
    splits = build_splits(spec, train_samples=None)
    assert splits.epochs == {"train": [[1], [1]]}
    assert len(splits.train or ()) == sum(case["lens"]) + 2
    served = np.unique(splits.train.batch(range(len(splits.train))), axis=0, return_counts=True)
    each = [
        build_splits(DataSpec(seq_length=32, data_path=path, split="1"), train_samples=None).train for path in paths
    ]
    expected = np.unique(np.concatenate([one.batch(range(len(one))) for one in each]), axis=0, return_counts=True)
    for ours, theirs in zip(served, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [2, 7, 300])
def test_lanes_agree_with_the_plain_rule(count: int) -> None:
    weights = np.random.RandomState(count).lognormal(0, 2, count).tolist()
    size = 20_000
    blend = Blend(weights)
    datasets, samples = _plain(weights, size)
    positions = np.random.RandomState(1).randint(0, size, 200)
    found = blend.lookup(positions)
    assert found[0].tolist() == [datasets[p] for p in positions]
    assert found[1].tolist() == [samples[p] for p in positions]
    assert blend.indices(size)[0].tolist() == datasets


def test_stretches_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libneox.data.blend._SHORTEST", 256)
    monkeypatch.setattr("libneox.data.blend._LONGEST", 1024)
    weights = [0.0, 1e-4, 0.3, 0.7, 0.05, 0.05]
    datasets, samples = _plain(weights, 5000)
    blend = Blend(weights)
    found = blend.lookup(np.arange(4999, -1, -1))
    assert found[0].tolist() == datasets[::-1]
    assert found[1].tolist() == samples[::-1]


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1], ["1", 2]])
def test_bad_weights_are_refused(weights: list[Any]) -> None:  # B-09
    with pytest.raises(UsageError, match="weight"):
        normalized(weights)


def test_three_hundred_datasets(make_pair) -> None:  # B-09
    first = make_pair("d", [[0] * 30, [0] * 35])
    index = Path(f"{first}.idx").read_bytes()
    for k in range(300):
        Path(f"{first}{k}.idx").write_bytes(index)
        Path(f"{first}{k}.bin").write_bytes(np.full(65, k, "<u2").tobytes())
    paths = tuple(f"{first}{k}" for k in range(300))
    weights = tuple(float(1 + k % 3) for k in range(300))
    spec = DataSpec(seq_length=8, sources={"train": Sources(paths, weights)})
    train = build_splits(spec, train_samples=3000).train
    assert train is not None
    tokens = train.batch(range(3000))
    assert (tokens == tokens[:, :1]).all()
    counts = np.bincount(tokens[:, 0], minlength=300)
    assert len(counts) == 300
    assert np.abs(counts - 3000 * np.array(weights) / sum(weights)).max() <= 1.5
