# SPDX-License-Identifier: Apache-2.0
"""Trackers get every record, once a step, and can neither stop a run nor be asked for in vain."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neox_train.trackers import Track, figures

LIBRARIES = {"tensorboard_dir": "tensorboard", "use_wandb": "wandb", "use_comet": "comet_ml"}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_tensorboard_has_each_step_once_after_a_resume(train, config, metrics, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = config(
        train_iters=5, checkpoint_factor=3, tensorboard_dir=str(tmp_path / "TB"), split="90,8,2", eval_iters=1
    )
    train(path)
    train(path, "--set", "iteration=3", "--set", "train_iters=6", "--set", "lr_decay_iters=40")  # steps 4, 5 again
    records = metrics(tmp_path / "RUN")
    seen = scalars(tmp_path / "TB", "loss")
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in seen] == pytest.approx([record["loss"] for record in records])
    assert [value for _, value in scalars(tmp_path / "TB", "tokens_per_s")][-1] == pytest.approx(
        records[-1]["tokens_per_s"]
    )
    assert scalars(tmp_path / "TB", "valid_loss")[-1][0] == 6  # the closing evaluation, which no record holds


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log of LevelDB's kind, in blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little of the block is left for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(part)
            part = b""


def test_wandb_offline(train, config, metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = config(train_iters=3, use_wandb=True, wandb_project="shapes", wandb_run_name="tiny")
    train(path)
    train(path, "--set", "train_iters=4")
    first, second = sorted((tmp_path / "RUN" / "wandb").glob("offline-run-*"), key=lambda found: found.stat().st_mtime)
    ident = json.loads((tmp_path / "RUN" / "trackers.json").read_text())["wandb"]
    assert first.name.endswith(ident)
    assert second.name.endswith(ident)  # the same run goes on
    rows, begun = [], None
    for folder in (first, second):
        for record in wandb_records(next(folder.glob("*.wandb"))):
            begun = record.run if record.HasField("run") else begun
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append((items["step"], items["loss"]))
    assert begun is not None
    assert (begun.project, begun.display_name) == ("shapes", "tiny")
    assert "hidden_size" in {update.key for update in begun.config.update}
    assert rows == [(record["step"], pytest.approx(record["loss"])) for record in metrics(tmp_path / "RUN")]


@pytest.mark.slow
def test_wandb_on_every_rank(train_apart, config, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    path = config(train_iters=2, use_wandb=True, wandb_init_all_ranks=True, wandb_run_name="tiny")
    train_apart(path, ranks=2, env={"WANDB_MODE": "offline"})
    begun = {}
    for file in (tmp_path / "RUN" / "wandb").glob("offline-run-*/*.wandb"):
        records = list(wandb_records(file))
        run = next(record.run for record in records if record.HasField("run"))
        begun[run.display_name] = (run.run_group, sum(record.HasField("history") for record in records))
    assert begun == {"tiny-rank0": ("tiny", 2), "tiny-rank1": ("tiny", 2)}


def test_comet_offline(train, config, metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    train(config(train_iters=3, use_comet=True, comet_project="shapes", comet_tags=["t"], comet_others={"k": "v"}))
    (archive,) = (tmp_path / "RUN" / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
        about = json.loads(file.read("experiment.json"))
    ident = json.loads((tmp_path / "RUN" / "trackers.json").read_text())["comet"]
    assert ident in json.dumps(about)
    logged = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    losses = [(metric["step"], metric["metricValue"]) for metric in logged if metric["metricName"] == "loss"]
    assert losses == [(record["step"], pytest.approx(record["loss"])) for record in metrics(tmp_path / "RUN")]


@pytest.mark.parametrize("key", [*LIBRARIES, "eval_tasks"])
def test_what_is_not_installed_is_said_before_anything_is_done(
    key: str, train, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    library = {**LIBRARIES, "eval_tasks": "neox_eval"}[key]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a))
    value: Any = {"tensorboard_dir": "TB", "eval_tasks": ["x"]}.get(key, True)
    done = train(config(**{key: value}), code=2)
    assert f"{key}: {library} is not installed; pip install" in done.stderr
    assert not (tmp_path / "RUN").exists()


def test_a_tracker_that_fails_is_warned_about_once(
    train, config, metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from neox_train.trackers.tensorboard import TensorBoard

    def fail(self: TensorBoard, step: int, values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "log", fail)
    done = train(config(train_iters=3, tensorboard_dir="TB"))
    assert done.stderr.count("No space left") == 1
    assert "warning: tensorboard:" in done.stderr
    assert len(metrics(tmp_path / "RUN")) == 3


def test_nobody_logged_in_is_an_error_at_start(train_apart, config, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    home = {name: str(tmp_path) for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
    login = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "NETRC": str(tmp_path / "netrc")}
    path = config(train_iters=2, use_wandb=True, wandb_host="http://127.0.0.1:9")
    done = train_apart(path, env=home | login, code=2)
    assert "use_wandb: " in done.stderr
    assert "run `wandb login`, or set WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "RUN" / "step_2").exists()


def test_a_record_as_numbers() -> None:
    record = {"step": 3, "loss": 2.5, "skipped": True, "grad_norm": None, "tasks": {"step": 2, "a/acc": 0.5}, "x": "y"}
    assert dict(figures(record)) == {"step": 3, "loss": 2.5, "skipped": 1, "tasks/step": 2, "tasks/a/acc": 0.5}


def test_the_end_is_told_with_the_exit_code() -> None:
    from libneox.errors import StoppedEarly

    class Silent:
        codes: list[int] = []

        def log(self, step: int, values: Any) -> None: ...

        def close(self, code: int) -> None:
            self.codes.append(code)

    track = Track("x", Silent(), pytest.fail)
    track.close()
    with pytest.raises(StoppedEarly), contextlib.closing(track):
        raise StoppedEarly("")
    assert Silent.codes == [0, 75]
