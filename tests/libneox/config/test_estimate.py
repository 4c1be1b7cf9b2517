# SPDX-License-Identifier: Apache-2.0
"""The dry run: exact where it can be, and an estimate whose parts add up (C-11)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libneox.config import load_config
from libneox.config.engine import WHOLE
from libneox.config.estimate import dry_run, render
from libneox.errors import UsageError

LAYOUT_20B = ("model_parallel_size=2", "pipe_parallel_size=4")


def test_20b_as_it_was_trained() -> None:
    report = dry_run(load_config(["20B"], overrides=LAYOUT_20B))
    assert report["parameters"] == 20_554_567_680
    assert report["layout"] | {"precision": ""} == {
        "world_size": 96,
        "tensor_parallel": 2,
        "pipeline_stages": 4,
        "data_parallel": 12,
        "zero_stage": 1,
        "engine": "deepspeed",
        "precision": "",
    }
    assert report["batch"]["grad_accum"] == 32
    assert report["tokens"]["total"] == 150_000 * 1536 * 2048
    rows = report["memory_per_rank"]
    assert [row["layers"] for row in rows] == [11] * 4
    text = render(report)
    assert "20,554,567,680" in text
    assert "TP 2 * PP 4 * DP 12" in text
    assert "\nnum_layers: 44\n" in text
    assert json.loads(json.dumps(report))["config"]["num_layers"] == 44


@pytest.mark.parametrize("preset", ["20B", "llama2/70B", "falcon/7B", "gpt3/125M"])
def test_split_parameters_cover_the_model(preset: str) -> None:
    """Summed over ranks, what ranks hold is the model plus what is replicated over the tensor-parallel group."""
    whole = load_config([preset]).model_config()
    for stages in (1, 2, 4):
        report = dry_run(load_config([preset], overrides=[f"pipe_parallel_size={stages}"]), world_size=stages * 4)
        held = sum(row["parameters"] for row in report["memory_per_rank"])
        twice = whole.padded_vocab_size * whole.hidden_size if whole.tie_embeddings and stages > 1 else 0
        assert held == whole.num_parameters() + twice


def test_zero_divides_what_it_says() -> None:
    rows = {}
    for stage in (1, 2, 3):
        config = load_config(["pythia/1.4B"], overrides=[f"zero_optimization.stage={stage}"])
        rows[stage] = dry_run(config, world_size=8)["memory_per_rank"][0]
    count = 1_414_647_808
    assert (rows[1]["weights"], rows[1]["gradients"], rows[1]["optimizer"]) == (2 * count, 2 * count, 12 * count // 8)
    assert (rows[2]["weights"], rows[2]["gradients"]) == (2 * count, 2 * count // 8)
    assert rows[3]["weights"] == 2 * count // 8
    fp32 = dry_run(load_config(["pythia/1.4B"], overrides=["precision=fp32"]), world_size=8)["memory_per_rank"][0]
    assert (fp32["weights"], fp32["gradients"], fp32["optimizer"]) == (4 * count, 4 * count, 12 * count // 8)


@pytest.mark.parametrize(
    ("precision", "world", "overrides", "bytes_each"),
    [
        ("fp32", 1, (), (4, 4, 8, 0)),  # the weights are the masters
        ("fp32", 8, ("engine=plain",), (4, 4, 8, 0)),
        ("fp32", 1, ("engine=deepspeed",), (4, 4, 12, 0)),
        ("fp32", 1, ("fp32_allreduce=true",), (4, 4, 12, 0)),  # only DeepSpeed does that
        ("bfloat16", 1, (), (2, 2, 12, 4)),
        ("bfloat16", 8, ("engine=plain", "data_types.grad_accum_dtype=fp32"), (2, 2, 12, 4)),
        ("bfloat16", 8, ("optimizer={type: sm3}",), (2, 2, 8, 4)),
        ("fp16", 1, (), (2, 2, 12, 0)),
    ],
)
def test_each_engine_is_counted_as_it_is(precision: str, world: int, overrides: tuple, bytes_each: tuple) -> None:
    config = load_config(["pythia/1.4B"], overrides=[f"precision={precision}", *overrides])
    row = dry_run(config, world_size=world)["memory_per_rank"][0]
    names = ("weights", "gradients", "optimizer", "update")
    assert tuple(row[name] / row["parameters"] for name in names) == bytes_each


def test_the_update_counts_where_it_needs_more_than_the_activations() -> None:
    small = ("precision=bfloat16", "checkpoint_activations=true", "train_micro_batch_size_per_gpu=1")
    for overrides, larger in ((small, "update"), (("precision=bfloat16",), "activations")):
        row = dry_run(load_config(["pythia/1.4B"], overrides=overrides), world_size=1)["memory_per_rank"][0]
        assert row["total"] == row["weights"] + row["gradients"] + row["optimizer"] + row[larger]


def test_the_plain_engine_gets_what_looks_at_shapes() -> None:
    from neox_train.optimizers import KINDS

    assert {name for name, kind in KINDS.items() if kind.shaped} == set(WHOLE)


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        ("{type: lion}", 8 / 8),
        ("{type: sgd}", 4 / 8),
        ("{type: sgd, params: {momentum: 0.9}}", 8 / 8),
        ("{type: madgrad_wd}", 16 / 8),
        ("{type: sm3}", 8),
        ("{type: adafactor}", 4),
    ],
)
def test_optimizer_states(optimizer: str, bytes_each: float) -> None:
    config = load_config(["pythia/1.4B"], overrides=[f"optimizer={optimizer}"])
    assert dry_run(config, world_size=8)["memory_per_rank"][0]["optimizer"] == int(bytes_each * 1_414_647_808)


def test_offloading_moves_states_to_the_host() -> None:
    config = load_config(["pythia/1.4B"], overrides=["zero_optimization.offload_optimizer={device: cpu}"])
    row = dry_run(config, world_size=8)["memory_per_rank"][0]
    assert row["optimizer"] == 0
    assert row["host"] == 12 * 1_414_647_808 // 8


def test_recomputation_saves_activations() -> None:
    def activations(*overrides: str) -> int:
        return dry_run(load_config(["pythia/410M"], overrides=overrides), world_size=8)["memory_per_rank"][0][
            "activations"
        ]

    assert activations("checkpoint_activations=true") * 5 < activations()
    assert activations("train_micro_batch_size_per_gpu=8") < activations()


def test_vocabulary_comes_from_the_tokenizer(golden: Path) -> None:
    config = load_config([golden / "model/ckpts/x_padvocab_pp0_tp1/config.yml"])
    tokenizer = golden / "model/data/tiny_bpe_500.json"
    assert dry_run(config.replace(vocab_file=str(tokenizer)))["model"]["vocab_size"] == 500
    with pytest.raises(UsageError, match="vocab_size: is unknown"):
        dry_run(config.replace(vocab_file="nowhere.json"))


@pytest.mark.parametrize("key", ["data_path", "train_data_paths"])
def test_vocabulary_comes_from_beside_the_dataset(tmp_path: Path, key: str) -> None:
    prefix = tmp_path / "data"
    vocabulary = {"model": {"vocab": {str(i): i for i in range(1000)}}, "added_tokens": [{"id": 1000}]}
    (tmp_path / "data.tokenizer.json").write_text(json.dumps(vocabulary))
    value = str(prefix) if key == "data_path" else [str(prefix)]
    config = load_config(["pythia/14M"], overrides=["padded_vocab_size=null"])
    facts = dry_run(load_config([config.to_dict() | {key: value}]))
    assert facts["model"]["vocab_size"] == 1001
    with pytest.raises(UsageError, match="vocab_size: is unknown"):
        dry_run(config)


def test_a_model_without_a_run_can_be_counted() -> None:
    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "vocab_size": 100,
    }
    report = dry_run(load_config([shape]))
    assert (report["batch"], report["tokens"]["total"], report["schedule"]) == (None, None, None)
    assert "parameters" in render(report)


def test_mixtures_are_not_counted_as_dense_models() -> None:
    with pytest.raises(UsageError, match="mixture-of-experts layers are not there yet"):
        dry_run(load_config(["pythia/14M"], overrides=["moe_num_experts=8"]))
