# SPDX-License-Identifier: Apache-2.0
"""The forward pass that is stored with a checkpoint, and perplexity per character."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from libneox import run_directory
from libneox.run_directory import Manifest


def damage(step: Path, part: int) -> None:
    """Change the figures of a step, and make the manifest agree: what hashes cannot find."""
    path = step / "trainer.json"
    trainer = json.loads(path.read_text())
    trainer["forward_check"]["losses"][part] *= 1.001
    manifest = Manifest.read(step)
    _, record = run_directory.add_file(step, path.name, json.dumps(trainer).encode())
    changed = dataclasses.replace(manifest, files={**manifest.files, path.name: record})
    run_directory.add_file(step, run_directory.MANIFEST, changed.to_bytes())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_that_computes_something_else_is_found(train, config, stage: int, tmp_path: Path) -> None:
    path = config(checkpoint_validation_with_forward_pass=True, zero_optimization={"stage": stage})
    train(path, "-q", "--set", "exit_interval=2", code=75)
    stored = json.loads((tmp_path / "RUN/step_2/trainer.json").read_text())["forward_check"]
    assert len(set(stored["losses"])) == 8
    train(path, "-q", "--set", "exit_interval=4", code=75)  # agrees with itself
    elsewhere = ("--set", "zero_optimization.stage=1", "--set", "engine=deepspeed")
    train(path, "-q", *elsewhere, "--set", "exit_interval=6", code=75)  # and at another layout
    damage(tmp_path / "RUN" / "step_6", stage)
    done = train(path, "-q", code=81)
    assert f"part {stage + 1} of the fixed input has a loss of" in done.stderr
    train(path, "-q", "--set", "checkpoint_validation_with_forward_pass=false")


def test_the_stored_figures_are_the_models(train, config, tmp_path: Path) -> None:
    import torch
    import torch.nn.functional as F

    from libneox import load_model

    path = config(checkpoint_validation_with_forward_pass=True)
    train(path, "-q", "--set", "train_iters=2")
    stored = json.loads((tmp_path / "RUN/step_2/trainer.json").read_text())["forward_check"]["losses"]
    ids = torch.arange(33)[None]
    each = F.cross_entropy(load_model(tmp_path / "RUN")(ids[:, :-1])[0], ids[0, 1:], reduction="none")
    assert stored == pytest.approx(each.view(8, 4).mean(1).tolist(), rel=1e-5)


def test_a_checkpoint_without_one_is_told(train, config) -> None:
    train(config(), "-q", "--set", "exit_interval=2", code=75)
    done = train(config(), "-q", "--set", "checkpoint_validation_with_forward_pass=true")
    assert "holds no forward pass to compare with" in done.stderr


def test_perplexity_of_characters(train, config, metrics, tmp_path: Path) -> None:
    """Of a tokenizer of bytes, over ASCII: as many characters as tokens, but for the end of documents."""
    import numpy as np

    from libneox.config import load_config
    from libneox.data.splits import build_splits, samples_wanted

    path = config(char_level_ppl=True, eval_interval=8, eval_iters=10)
    train(path, "-q")
    record = metrics(tmp_path / "RUN")[-1]
    train_samples, valid_samples, _ = samples_wanted(8, 4, 8, 10)
    valid = build_splits(load_config([path]), train_samples=train_samples, valid_samples=valid_samples).valid
    targets = valid.read(np.arange(40) % len(valid)).tokens[:, 1:]
    share = targets.size / (targets != 0).sum()
    assert share > 1
    assert record["valid_char_ppl"] == pytest.approx(math.exp(record["valid_loss"] * share), rel=1e-6)
