# SPDX-License-Identifier: Apache-2.0
"""Training on datasets with labels: where they say no loss there is none, and how uneven masks are weighted."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from libneox import load_model
from libneox.config import load_config
from libneox.data.splits import build_splits

STEPS = 4


def has_loss(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rule of these labels: vowels only, so that some samples have few and some have many."""
    return np.isin(tokens, [ord(letter) for letter in "aeiou"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys that name a dataset with labels: text, and documents without a vowel between."""
    from libneox.data.manifest import TokenizerRecord
    from libneox.data.writer import DatasetWriter
    from libneox.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("labelled")
    tokenizer = load_tokenizer("bytes")
    text = inspect.getsource(subprocess)
    pieces = [text[i : i + 40] if i // 40 % 3 else "." * 30 + "a." for i in range(0, 24_000, 40)]
    documents = [np.array([*ids, tokenizer.eod_id], np.int32) for ids in tokenizer.encode_batch(pieces)]
    record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id)
    tokens = np.concatenate(documents)
    lengths = np.array([len(document) for document in documents])
    for name, values in (("text", tokens), ("labels", np.where(has_loss(tokens), tokens, -100))):
        with DatasetWriter(folder / name, "int32", tokenizer=record, tokenizer_data=tokenizer.data) as writer:
            writer.add(values.astype(np.int32), lengths)
            writer.commit(command=["tests"])
    paths = {"data_paths": [str(folder / "text")], "label_data_paths": [str(folder / "labels")]}
    return {"data_path": None, "split": None, "train_iters": STEPS} | {
        f"{split}_{key}": value for split in ("train", "valid", "test") for key, value in paths.items()
    }


def by_hand(run: Path, config: Path) -> list[float]:
    """Losses of plain torch from the run's step 0: the tokens of each sample, and the rule."""
    keys = load_config([config])
    train = build_splits(keys, train_samples=4 * STEPS).train
    model = load_model(run / "step_0").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.006, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        tokens = train.read(np.arange(4 * step, 4 * step + 4)).tokens.astype(np.int64)
        targets = torch.from_numpy(np.where(has_loss(tokens), tokens, -100)[:, 1:].copy())
        logits = model(torch.from_numpy(tokens[:, :-1].copy()))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize(("packing", "stage"), [("packed", 1), ("pack_until_overflow", 0), ("unpacked", 0)])
def test_losses_by_hand(train, config, losses, labelled, packing: str, stage: int, tmp_path: Path) -> None:
    path = config(
        **labelled,
        pack_impl=packing,
        dataset_impl="gpt2",
        zero_optimization={"stage": stage},
        lr_decay_style="constant",
        warmup=0.0,
        weight_decay=0.0,
        extra_save_iters=[0],
    )
    train(path, "-q")
    assert losses(tmp_path / "RUN") == pytest.approx(by_hand(tmp_path / "RUN", path), rel=2e-5)


def test_labels_are_used_in_validation_too(train, config, metrics, labelled, tmp_path: Path) -> None:
    path = config(**labelled, eval_interval=1, eval_iters=1, optimizer={"type": "adam", "params": {"lr": 0.0}})
    train(path, "-q", "--set", "train_iters=1")
    unlabelled = {key: value for key, value in labelled.items() if "label" not in key}
    train(config("all.yml", **unlabelled | {"save": str(tmp_path / "all")}, eval_interval=1, eval_iters=1), "-q")
    assert metrics(tmp_path / "RUN")[0]["valid_loss"] != metrics(tmp_path / "all")[0]["valid_loss"]


@pytest.mark.parametrize("stage", [0, 1])
def test_tokens_weigh_the_same_however_the_batch_is_cut(
    train, config, metrics, labelled, stage: int, tmp_path: Path
) -> None:
    """In one micro-batch both weightings are the same; in four of one sample each only that of tokens still is."""

    def run(weighting: str, micro: int) -> list[float]:
        path = tmp_path / f"{weighting}{micro}"
        keys = {"loss_weighting": weighting, "train_micro_batch_size_per_gpu": micro, "z_loss": 1e-3, "save": str(path)}
        train(config(**labelled | keys, zero_optimization={"stage": stage}), "-q", "--set", "train_iters=3")
        return [record[name] for record in metrics(path) for name in ("loss", "grad_norm")]

    whole = run("micro_batches", 4)
    assert run("tokens", 1) == pytest.approx(whole, rel=1e-4)
    assert run("micro_batches", 1) != pytest.approx(whole, rel=1e-2)


@pytest.mark.slow
def test_tokens_weigh_the_same_on_two_ranks(train, train_apart, config, metrics, labelled, tmp_path: Path) -> None:
    keys = {**labelled, "loss_weighting": "tokens", "eval_interval": 2, "eval_iters": 1}
    train(config("one.yml", **keys, save=str(tmp_path / "one")), "-q")
    cut = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    train_apart(config("two.yml", **keys, **cut), "-q", ranks=2)
    for ours, whole in zip(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", *(name for name in whole if name == "valid_loss")):
            assert ours[name] == pytest.approx(whole[name], rel=1e-4)
