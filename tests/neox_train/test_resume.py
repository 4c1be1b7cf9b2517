# SPDX-License-Identifier: Apache-2.0
"""What a command says about loading is done once: run again after a stop, it continues what it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from libneox import run_directory
from libneox.checkpoint.store import open_tensors
from libneox.config import load_config
from neox_train.resume import find_start

FAST = {"optimizer": {"type": "adam", "params": {"lr": 0.02, "betas": [0.9, 0.95], "eps": 1e-8}}}


def weights(step: Path) -> torch.Tensor:
    with open_tensors(step) as tensors:
        return tensors["embed.weight"]


def test_a_run_goes_back_to_a_step_and_on_from_there(train, config, losses, tmp_path: Path) -> None:
    """Its later steps are of another course: neither what `latest` means, nor what old steps are deleted for."""
    run = tmp_path / "RUN"
    train(config(checkpoint_factor=2), "-q")
    before = {step: weights(run / f"step_{step}") for step in (4, 6, 8)}
    train(config(checkpoint_factor=2, iteration=4, seed=5), "-q", code=2)  # other data: the run is as it was
    assert run_directory.list_steps(run) == [2, 4, 6, 8]
    back = config(checkpoint_factor=2, iteration=4, keep_last_n_checkpoints=2, exit_interval=3, **FAST)
    done = train(back, "-q", code=75)
    aside = {path.name.partition(".aside-")[0] for path in run.glob("*.aside-*")}
    assert aside == {"step_6", "step_8"}
    assert done.stderr.count("set aside, as the run goes on from step 4") == 2
    assert run_directory.list_steps(run) == [4, 6]
    assert not torch.equal(weights(run / "step_6"), before[6])
    assert torch.equal(weights(run / "step_4"), before[4])
    done = train(back)  # stopped by its exit_interval, as by a signal: the same command continues
    assert "after step 6" in done.stderr
    assert run_directory.list_steps(run) == [6, 8]
    assert len(losses(run)) == 8
    assert not torch.equal(weights(run / "step_8"), before[8])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "key",
    [
        "no_load_optim",
        pytest.param("no_load_rng", marks=SLOW),
        pytest.param("use_checkpoint_lr_scheduler", marks=SLOW),
    ],
)
def test_a_stop_changes_nothing_of_what_was_loaded(train, config, losses, key: str, tmp_path: Path) -> None:
    """A fresh optimiser, other random numbers, the rate of the checkpoint: in one go, and stopped on the way."""
    train(config("first.yml", save=str(tmp_path / "first"), hidden_dropout=0.1, train_iters=4), "-q")
    more = FAST | {"load": str(tmp_path / "first"), "hidden_dropout": 0.1, "train_iters": 8}
    train(config("plain.yml", save=str(tmp_path / "plain"), **more), "-q")
    more[key] = True
    train(config("whole.yml", save=str(tmp_path / "whole"), **more), "-q")
    path = config(exit_interval=6, **more)
    train(path, "-q", code=75)
    train(path, "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")  # the key does something


def test_the_rate_of_the_checkpoint_holds(train, config, metrics, tmp_path: Path) -> None:
    train(config("first.yml", save=str(tmp_path / "first"), train_iters=4, min_lr=0.001), "-q")
    stored = load_config([tmp_path / "first/step_4/config.yml"]).lr_schedule()
    load = {"load": str(tmp_path / "first"), "lr_decay_style": "linear", "warmup": 0.0}
    train(config(use_checkpoint_lr_scheduler=True, **load, **FAST), "-q")
    rates = [record["lr"] for record in metrics(tmp_path / "RUN")]
    assert rates == [stored.lr_at(step) for step in range(4, 8)]
    assert load_config([tmp_path / "RUN/step_8/config.yml"]).lr_schedule() == stored


def test_fine_tuning_has_a_run_of_its_own(train, config, tmp_path: Path) -> None:
    train(config(), "-q", "--set", "train_iters=2")
    done = train(config(finetune=True, iteration=2, load=str(tmp_path / "RUN")), code=2)
    assert "finetune: begins at step 0" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [2]


def test_another_configuration_goes_back_again(train, config, tmp_path: Path) -> None:
    """Only what was made by the very same command is a continuation of it."""
    train(config(checkpoint_factor=2, iteration=None), "-q")
    path = config(checkpoint_factor=2, iteration=4, train_iters=6)
    train(path, "-q")

    def start(**changes: Any) -> str:
        found = find_start(load_config([path], overrides=changes), warn=print)
        assert found.source is not None
        return found.source.path.name

    assert start() == "step_6"
    assert start(gradient_clipping=0.5) == "step_4"
    assert start(iteration=6) == "step_6"


def test_a_sample_is_as_long_as_the_model_allows(train, config, metrics, tmp_path: Path) -> None:
    train(config(seq_length=None, train_iters=1), "-q")
    assert metrics(tmp_path / "RUN")[0]["tokens"] == 4 * 32
