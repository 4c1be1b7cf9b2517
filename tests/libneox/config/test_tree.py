# SPDX-License-Identifier: Apache-2.0
"""The tree: reading it, writing it back, hashing it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from libneox.config import all_keys, load_config, presets
from libneox.errors import UsageError

AWKWARD = {
    "seed": 7,
    "prompt_end": "a: b # c\n",
    "wandb_group": "no",
    "wandb_run_name": "007",
    "wandb_team": "1e-4",
    "eval_results_prefix": " padded ",
    "tokenizer": "~",
    "weight_decay": 1e-7,
    "extra_save_iters": [0, 1],
    "train_data_paths": ["a b", "c,d", "é"],
    "optimizer": {"type": "adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
    "deepspeed_extra_args": {"x": {"y": [1, None, True, "true"]}},
    "checkpoint_factor": 1.5,
    "checkpoint_scale": "log",
}


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config([AWKWARD])
    (tmp_path / "c.yml").write_text(config.to_yaml())
    again = load_config([tmp_path / "c.yml"])
    assert again == config
    assert again.hash == config.hash
    assert again.to_dict() == config.to_dict() == AWKWARD | {"wandb_run_name": "007"}


@pytest.mark.parametrize("name", presets.names())
def test_presets_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config([name])
    (tmp_path / "c.yml").write_text(config.to_yaml())
    assert load_config([tmp_path / "c.yml"]) == config
    assert config.warnings == ()


def test_other_readers_get_the_same_numbers() -> None:
    read = yaml.safe_load(load_config([AWKWARD]).to_yaml())
    assert read["optimizer"]["params"]["eps"] == 1e-8
    assert read["weight_decay"] == 1e-7


def test_hash_sees_values_and_nothing_else() -> None:
    a, b = load_config([{"seed": 1, "train_iters": 2}]), load_config([{"train-iters": 2, "seed": 1}])
    assert a.hash == b.hash
    assert a.hash != load_config([{"seed": 2, "train_iters": 2}]).hash
    assert load_config([{"seed": 1234}]).hash == load_config([]).hash


def test_the_tree_is_frozen() -> None:
    config = load_config([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.seed = 3  # type: ignore[misc]


def test_replace_checks_types() -> None:
    config = load_config(["pythia/14M"]).replace(vocab_size=500, padded_vocab_size=512)
    assert (config.model.vocab_size, config.model_config().padded_vocab_size) == (500, 512)
    with pytest.raises(UsageError, match="vocab_size"):
        config.replace(vocab_size="many")


def test_every_key_has_an_attribute() -> None:
    config = load_config([])
    for name, key in all_keys().items():
        assert config.get(name) == key.default, name
        assert getattr(getattr(config, key.group), name) == key.default
    with pytest.raises(KeyError):
        config.get("no_such_key")


def test_optimizer_defaults() -> None:
    config = load_config([{"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}])
    assert config.optimizer_type == "adam"
    assert config.optimizer_params == {"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
    assert load_config([]).lr == 1e-3
    assert load_config([{"optimizer": {"type": "sm3", "params": {"lr": 0.1}}}]).optimizer_params == {"lr": 0.1}
    assert load_config([]).optim.gradient_clipping == 1.0


def test_deepspeed_dict() -> None:
    config = load_config(
        [
            {
                "train_micro_batch_size_per_gpu": 2,
                "precision": "fp16",
                "fp16": {"enabled": True, "fp16": True, "loss_scale": 0, "initial_scale_power": 12},
                "zero_optimization": {"stage": 0, "overlap_comm": True},
                "deepspeed_extra_args": {"zero_allow_untested_optimizer": True},
                "wall_clock_breakdown": True,
            }
        ]
    )
    assert config.deepspeed_dict(config.batch_plan(4)) == {
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": True,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "fp16": {"loss_scale": 0, "initial_scale_power": 12, "enabled": True},
    }
