# SPDX-License-Identifier: Apache-2.0
"""From a configuration to sets: plans, resuming, lengthening, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from libneox.data.mmap import MMapDataset
from libneox.data.splits import DataSpec, Sources, build_splits, samples_wanted
from libneox.errors import DataError, InputMissing, UsageError


def test_samples_wanted_follow_the_original() -> None:
    assert samples_wanted(1000, 32, 100, 10) == (32000, 11 * 10 * 32, 320)


def test_a_sample_does_not_depend_on_what_was_read_before(numbered: Path) -> None:
    spec = DataSpec(seq_length=16, data_path=str(numbered), split="1")
    one, two = (build_splits(spec, train_samples=100).train for _ in range(2))
    everything = one.batch(range(100))
    for i in np.random.RandomState(0).permutation(100).tolist():
        np.testing.assert_array_equal(two.get(i).tokens, everything[i])
    assert everything.dtype == np.int64
    assert everything.shape == (100, 17)


def test_a_resumed_run_keeps_its_epochs_and_a_longer_one_appends(numbered: Path) -> None:
    spec = DataSpec(seq_length=16, data_path=str(numbered), split="1")
    first = build_splits(spec, train_samples=100)
    stored = json.loads(json.dumps(first.epochs))
    assert first.notes == ()
    same = build_splits(spec, train_samples=100, epochs=stored)
    shorter = build_splits(spec, train_samples=10, epochs=stored)
    assert same.epochs == shorter.epochs == first.epochs
    longer = build_splits(spec, train_samples=300, epochs=stored)
    assert "freshly shuffled" in longer.notes[0]
    assert longer.epochs["train"][0][:1] == first.epochs["train"][0]
    held = len(first.train)
    assert len(longer.train) >= 300
    np.testing.assert_array_equal(longer.train.batch(range(held)), first.train.batch(range(held)))
    appended = longer.train.batch(range(held, len(longer.train)))
    assert len(np.unique(appended)) > 0.95 * MMapDataset(numbered).num_tokens  # whole epochs: every token again
    again = build_splits(spec, train_samples=300, epochs=longer.epochs)
    assert again.notes == ()
    np.testing.assert_array_equal(again.train.batch(range(300)), longer.train.batch(range(300)))
    fresh = build_splits(spec, train_samples=300)
    assert (fresh.train.batch(range(50)) != longer.train.batch(range(50))).any()  # E is part of the order
    assert longer.train.fingerprint == first.train.fingerprint


def test_epochs_of_a_run_are_shuffled_differently(numbered: Path) -> None:
    spec = DataSpec(seq_length=16, data_path=str(numbered), split="1", train_epochs=3)
    splits = build_splits(spec, train_samples=None)
    assert splits.epochs == {"train": [[1, 1, 1]]}
    per_epoch = len(splits.train) // 3
    epochs = [splits.train.batch(range(e * per_epoch, (e + 1) * per_epoch)) for e in range(3)]
    once = build_splits(DataSpec(seq_length=16, data_path=str(numbered), split="1"), train_samples=None)
    np.testing.assert_array_equal(epochs[0], once.train.batch(range(per_epoch)))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    for tokens in epochs:  # each token is seen at most twice: where two samples meet
        assert np.bincount(tokens.reshape(-1)).max() <= 2


def test_more_epochs_keep_the_first_ones(numbered: Path) -> None:
    two, three = (DataSpec(seq_length=16, data_path=str(numbered), split="1", train_epochs=n) for n in (2, 3))
    first = build_splits(two, train_samples=None)
    longer = build_splits(three, train_samples=None, epochs=first.epochs)
    assert longer.epochs == {"train": [[1, 1, 1]]}
    np.testing.assert_array_equal(
        longer.train.batch(range(len(first.train))), first.train.batch(range(len(first.train)))
    )
    assert build_splits(two, train_samples=None, epochs=longer.epochs).epochs == longer.epochs


@pytest.mark.parametrize("spec", [{}, {"order": "hash"}, {"packing": "unpacked"}, {"packing": "pack_until_overflow"}])
def test_every_position_of_a_blend_can_be_read(make_pair, spec: dict[str, str]) -> None:
    """Also with a dataset of weight 0, from which the rule draws once, and with shares of less than a sample."""
    paths = tuple(str(make_pair(name, [[k + 1] * 30] * 3)) for k, name in enumerate("abcd"))
    for weights in ((0.0, 1.0, 3.0, 0.0), (1e-9, 0.5, 0.5, 1e-3)):
        for samples in (1, 2, 7, 100):
            sources = {"train": Sources(paths, weights)}
            train = build_splits(DataSpec(seq_length=8, sources=sources, **spec), train_samples=samples).train
            assert len(train.batch(range(samples))) == samples


def test_a_lengthened_blend_keeps_its_beginning(make_pair) -> None:
    paths = tuple(str(make_pair(name, [[k] * 40, [k + 1] * 40])) for name, k in (("a", 1), ("b", 11)))
    spec = DataSpec(seq_length=8, sources={"train": Sources(paths, (0.8, 0.2))})
    first = build_splits(spec, train_samples=50)
    longer = build_splits(spec, train_samples=500, epochs=first.epochs)
    np.testing.assert_array_equal(longer.train.batch(range(50)), first.train.batch(range(50)))
    assert len(longer.notes) == 2
    with pytest.raises(UsageError, match="had 2 datasets"):
        build_splits(
            DataSpec(seq_length=8, sources={"train": Sources((*paths, paths[0]))}), train_samples=5, epochs=first.epochs
        )


def test_weights_by_documents(make_pair) -> None:
    small, large = make_pair("s", [[1] * 9] * 10), make_pair("l", [[2] * 9] * 90)
    sources = Sources((str(small), str(large)), (0.5, 0.5))
    spec = DataSpec(seq_length=4, sources={"train": sources}, weight_by_num_documents=True, weighted_sampler_alpha=1.0)
    tokens = build_splits(spec, train_samples=1000).train.batch(range(1000))
    assert (tokens[:, 0] == 1).mean() == pytest.approx(0.5, abs=0.01)  # p (1 - p) is symmetric at 0.1 and 0.9
    spec = DataSpec(seq_length=4, sources={"train": sources}, weight_by_num_documents=True, weighted_sampler_alpha=2.0)
    tokens = build_splits(spec, train_samples=1000).train.batch(range(1000))
    expected = 0.01 * 0.9 / (0.01 * 0.9 + 0.81 * 0.1)
    assert (tokens[:, 0] == 1).mean() == pytest.approx(expected, abs=0.01)


def test_fingerprint_changes_with_everything_that_decides_samples(numbered: Path, make_pair) -> None:
    def fingerprint(path: Path = numbered, **changes: object) -> str:
        spec = {"seq_length": 16, "data_path": str(path), "split": "1"} | changes
        return build_splits(DataSpec(**spec), train_samples=10).train.fingerprint

    other = make_pair("other", [[1, 2, 3] * 300])
    changes = [{}, {"seed": 2}, {"seq_length": 8}, {"split": "9,1"}, {"order": "hash"}, {"packing": "unpacked"}]
    found = [fingerprint(**change) for change in changes] + [fingerprint(other)]
    assert len(set(found)) == len(found)
    assert fingerprint() == found[0]


def test_retokenized_data_are_read_afresh(make_pair) -> None:  # B-15
    """The original keeps an index beside the data that it trusts for ever; here there is none to go stale."""
    prefix = make_pair("a", [[1] * 10, [2] * 10])
    spec = DataSpec(seq_length=4, data_path=str(prefix), split="1")
    before = build_splits(spec, train_samples=5).train
    old = before.fingerprint
    make_pair("a", [[7] * 30], force=True)
    after = build_splits(spec, train_samples=5).train
    assert (after.batch(range(5)) == 7).all()
    assert after.fingerprint != old
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_what_cannot_be_given_is_refused(make_pair, tmp_path: Path) -> None:
    tiny, empty = make_pair("tiny", [[1, 2]]), make_pair("empty", [])
    with pytest.raises(UsageError, match="order: neox"):
        build_splits(DataSpec(seq_length=8, data_path=str(tiny), split="1", order="hash"), train_samples=1)
    with pytest.raises(DataError, match="no documents"):
        build_splits(DataSpec(seq_length=8, data_path=str(empty)), train_samples=1)
    with pytest.raises(DataError, match="no tokens"):
        build_splits(DataSpec(seq_length=8, data_path=str(make_pair("z", [[], []])), split="1"), train_samples=1)
    with pytest.raises(UsageError, match="no training data"):
        build_splits(DataSpec(seq_length=8, data_path=str(tiny), split="0,1,0"), train_samples=1)
    with pytest.raises(InputMissing):
        build_splits(DataSpec(seq_length=8, data_path=str(tmp_path / "none")), train_samples=1)
    for wrong in (
        {"order": "random"},
        {"packing": "tight"},
        {"seed": 2**32},
        {"seed": -1},
        {"data_path": None},
        {"sources": {"train": Sources(("a",))}},
        {"order": "hash", "packing": "unpacked"},
        {"data_path": None, "sources": {"train": Sources(("a", "b"), (1.0,))}},
        {"data_path": None, "sources": {"train": Sources(("a", "b"), (1.0, 2.0))}, "train_epochs": 2},
    ):
        with pytest.raises(UsageError):
            DataSpec(**({"seq_length": 8, "data_path": str(tiny)} | wrong))


def test_a_set_that_is_not_wanted_is_not_opened(numbered: Path) -> None:
    sources = {"train": Sources((str(numbered),)), "valid": Sources(("/no/such/data",))}
    splits = build_splits(DataSpec(seq_length=8, sources=sources), train_samples=5)
    assert splits.valid is None
    assert splits.prefixes == (numbered,)
    with pytest.raises(InputMissing):
        build_splits(DataSpec(seq_length=8, sources=sources), train_samples=5, valid_samples=5)


def test_positions_outside_are_an_error(numbered: Path) -> None:
    train = build_splits(DataSpec(seq_length=8, data_path=str(numbered), split="1"), train_samples=5).train
    for wrong in ([-1], [len(train)]):
        with pytest.raises(IndexError):
            train.batch(wrong)
    assert train.batch([]).shape == (0, 9)


def test_a_document_longer_than_a_sample_is_read_in_parts(make_pair) -> None:
    prefix = make_pair("a", [list(range(1000))], "int32")
    train = build_splits(DataSpec(seq_length=10, data_path=str(prefix), split="1"), train_samples=99).train
    assert len(train) == 99
    tokens = train.batch(range(99))
    assert (np.diff(tokens, axis=1) == 1).all()
    assert sorted(tokens[:, 0].tolist()) == list(range(0, 990, 10))
    assert MMapDataset(prefix).contiguous


MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 10,
}


def _spec(**keys: object) -> DataSpec:
    from libneox.config import load_config

    return DataSpec.from_config(load_config([MODEL | keys]))


def test_a_configuration_gives_its_data_keys() -> None:
    spec = _spec(data_path="a", split="9,1,0", seed=5, order="hash")
    assert spec == DataSpec(seq_length=8, seed=5, data_path="a", split="9,1,0", order="hash")
    spec = _spec(
        train_data_paths=["a", "b"],
        valid_data_paths=["c"],
        test_data_paths=["d"],
        train_label_data_paths=["al", "bl"],
        train_reward_data_paths=["ar", "br"],
        train_data_weights=[1.0, 2.0],
        pack_impl="unpacked",
        allow_chopped=False,
    )
    assert spec.sources == {
        "train": Sources(("a", "b"), (1.0, 2.0), ("al", "bl"), ("ar", "br")),
        "valid": Sources(("c",)),
        "test": Sources(("d",)),
    }
    assert (spec.packing, spec.allow_chopped) == ("unpacked", False)


def test_a_configuration_gives_its_preference_pairs() -> None:
    paths = {
        f"{side}_{name}_data_paths": [f"{side}-{name}"]
        for side in ("pos", "neg")
        for name in ("train", "valid", "test")
    }
    labels = {
        f"{side}_{name}_label_data_paths": [f"{side}-{name}-l"]
        for side in ("pos", "neg")
        for name in ("train", "valid", "test")
    }
    spec = _spec(dataset_impl="pairwise", train_impl="dpo", pack_impl="unpacked", **paths, **labels)
    assert spec.sources["train"] == Sources(
        ("pos-train",), labels=("pos-train-l",), rejected=("neg-train",), rejected_labels=("neg-train-l",)
    )
    assert set(spec.sources) == {"train", "valid", "test"}


def test_rewards_are_no_tokens(make_pair) -> None:
    with pytest.raises(DataError, match="not tokens"):
        build_splits(DataSpec(seq_length=2, data_path=str(make_pair("r", [[0.5]], "float32"))), train_samples=1)
