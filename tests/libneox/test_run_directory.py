# SPDX-License-Identifier: Apache-2.0
"""The run directory: commit protocol, verification, fallback, retention, lock, metrics."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libneox import files
from libneox import run_directory as rd
from libneox.errors import InputMissing, IntegrityError, OutputExists


def make_step(run: Path, step: int, data: bytes = b"0123456789" * 10) -> Path:
    target = rd.step_path(run, step)
    temporary = rd.begin_step(target)
    records = dict([rd.add_file(temporary, "config.yml", b"num_layers: 2\n"), rd.add_file(temporary, "model", data)])
    return rd.commit_step(temporary, target, rd.Manifest(step=step, samples=step * 4, files=records))


def test_a_step_is_found_again_and_verifies(tmp_path: Path) -> None:
    make_step(tmp_path, 9)
    make_step(tmp_path, 10)
    assert rd.list_steps(tmp_path) == [9, 10]
    assert (tmp_path / "latest").readlink() == Path("step_10")
    manifest = rd.verify_step(tmp_path / "step_10")
    assert (manifest.step, manifest.samples, sorted(manifest.files)) == (10, 40, ["config.yml", "model"])
    for arg in (tmp_path, tmp_path / "latest", tmp_path / "step_10"):
        ref = rd.resolve_checkpoint(arg)
        assert (ref.kind, ref.step) == ("neox", 10)


def test_every_changed_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    path = make_step(tmp_path, 1) / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError):
            rd.verify_step(tmp_path / "step_1")
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(IntegrityError):
            rd.verify_step(tmp_path / "step_1")
    path.write_bytes(whole + b"\n")
    with pytest.raises(IntegrityError):
        rd.verify_step(tmp_path / "step_1")


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete"])
@pytest.mark.parametrize("name", ["config.yml", "model"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = make_step(tmp_path, 1) / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes({"flip": b"\x00" + data[1:], "truncate": data[:-1], "extend": data + b"\n"}[damage])
    with pytest.raises(IntegrityError, match=name):
        rd.resolve_checkpoint(tmp_path / "step_1")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["tokenizer.json", "charlevel", "sentencepiece", "tiktoken"])
def test_the_tokenizer_of_the_manifest_is_missed(tmp_path: Path, kind: str, listed: bool) -> None:
    def step(number: int, described: bytes) -> Path:
        temporary = rd.begin_step(rd.step_path(tmp_path, number))
        name, record = rd.add_file(temporary, rd.tokenizer_file(kind), b"{}")
        tokenizer = {"kind": kind, "sha256": hashlib.sha256(described).hexdigest()}
        manifest = rd.Manifest(step=number, tokenizer=tokenizer, files={name: record} if listed else {})
        return rd.commit_step(temporary, rd.step_path(tmp_path, number), manifest)

    whole, other = step(1, b"{}"), step(2, b"another")
    rd.verify_step(whole)
    with pytest.raises(IntegrityError, match=f"{rd.tokenizer_file(kind)}: is not the tokenizer that"):
        rd.verify_step(other)
    (whole / rd.tokenizer_file(kind)).write_bytes(b"[]")
    with pytest.raises(IntegrityError, match=rd.tokenizer_file(kind)):
        rd.verify_step(whole)
    (whole / rd.tokenizer_file(kind)).unlink()
    with pytest.raises(IntegrityError, match=f"{rd.tokenizer_file(kind)}: No such file or directory; the "):
        rd.verify_step(whole)


def test_a_run_falls_back_to_its_newest_whole_step_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_step(tmp_path, step)
    (tmp_path / "step_3" / "model").unlink()
    (tmp_path / "step_2" / "manifest.json").unlink()
    told: list[str] = []
    assert rd.resolve_checkpoint(tmp_path, warn=told.append).step == 1
    assert len(told) == 2
    assert "step_3" in told[0]
    assert "step_2" in told[1]
    (tmp_path / "step_1" / "config.yml").write_text("")
    with pytest.raises(IntegrityError, match="none of its 3 checkpoints"):
        rd.resolve_checkpoint(tmp_path / "latest", warn=told.append)


@pytest.mark.parametrize("latest", [None, "", "garbage\0", "step_99", "step_1"])
def test_latest_is_only_advice(tmp_path: Path, latest: str | None) -> None:
    make_step(tmp_path, 1)
    make_step(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    assert rd.resolve_checkpoint(tmp_path).step == 2
    assert rd.resolve_checkpoint(tmp_path / "latest").step == 2


def test_latest_may_dangle_or_lag(tmp_path: Path) -> None:
    make_step(tmp_path, 1)
    make_step(tmp_path, 2)
    for target in ("step_1", "nowhere"):
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to(target)
        assert rd.resolve_checkpoint(tmp_path / "latest").step == 2


def test_unfinished_steps_are_no_steps_and_are_removed(tmp_path: Path) -> None:
    make_step(tmp_path, 1)
    rd.begin_step(rd.step_path(tmp_path, 2))
    assert rd.list_steps(tmp_path) == [1]
    assert len(rd.remove_unfinished(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_1"]


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no such"):
        rd.resolve_checkpoint(tmp_path / "missing")
    with pytest.raises(InputMissing, match="holds no checkpoint"):
        rd.resolve_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputMissing, match="is a file"):
        rd.resolve_checkpoint(tmp_path / "file")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert rd.resolve_checkpoint(tmp_path / "hf").kind == "hf"


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt"])
def test_checkpoints_of_gpt_neox_are_known_by_their_files(tmp_path: Path, name: str) -> None:
    step = tmp_path / "global_step7"
    step.mkdir()
    (step / name).touch()
    (tmp_path / "latest").write_text("global_step7")
    for arg, path in ((tmp_path, tmp_path), (tmp_path / "latest", tmp_path), (step, step)):
        assert rd.resolve_checkpoint(arg) == rd.CheckpointRef(path, "legacy", None)
    (tmp_path / "config.json").write_text("{}")  # DeepSpeed under transformers' Trainer leaves global_stepN as well
    assert rd.resolve_checkpoint(tmp_path).kind == "hf"
    make_step(tmp_path, 1)
    assert rd.resolve_checkpoint(tmp_path).kind == "neox"


def test_a_file_of_another_name_is_no_checkpoint_of_gpt_neox(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_optim_states.pt").touch()
    with pytest.raises(InputMissing, match="holds no checkpoint"):
        rd.resolve_checkpoint(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    step = make_step(tmp_path, 1)
    record = rd.record_file(step / "model")
    (step / "manifest.json").write_bytes(rd.Manifest(step=1, files={"../step_1/model": record}).to_bytes())
    with pytest.raises(IntegrityError, match="outside"):
        rd.verify_step(step)


def test_an_existing_step_is_kept_without_force(tmp_path: Path) -> None:
    make_step(tmp_path, 1)
    with pytest.raises(OutputExists):
        rd.begin_step(tmp_path / "step_1")
    temporary = rd.begin_step(tmp_path / "step_1", force=True)
    rd.commit_step(temporary, tmp_path / "step_1", rd.Manifest(step=1))
    assert rd.verify_step(tmp_path / "step_1").files == {}


@pytest.mark.parametrize(("can_exchange", "moment"), [(True, 0), (True, 1), (False, 0), (False, 1), (False, 2)])
def test_a_kill_while_a_step_is_replaced_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool, moment: int
) -> None:
    """Before each of the acts of replacing it: there is a whole step, or the next start puts it there."""
    make_step(tmp_path, 1)
    temporary = rd.begin_step(tmp_path / "step_1", force=True)
    done: list[object] = []

    def deadly(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            if len(done) == moment:
                raise SystemExit
            done.append(act)
            return act(*args, **keywords)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", deadly(Path.rename))
        patch.setattr(files, "_exchange", deadly(files._exchange) if can_exchange else lambda *_: False)
        patch.setattr(files.shutil, "rmtree", deadly(files.shutil.rmtree))
        with pytest.raises(SystemExit):
            rd.commit_step(temporary, tmp_path / "step_1", rd.Manifest(step=1))
    if can_exchange and not files._exchange(*[make_step(tmp_path / "try", n) for n in (1, 2)]):
        pytest.skip("this file system does not exchange names")
    rd.remove_unfinished(tmp_path)
    assert rd.list_steps(tmp_path) == [1]
    rd.verify_step(tmp_path / "step_1")
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("name", ["model", "manifest.json"])
def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_step(tmp_path, 1)
    make_step(tmp_path, 2)

    def bad_sector(read: Callable[..., Any]) -> Callable[..., Any]:
        def fail(path: Path, *rest: Any) -> Any:
            if path == tmp_path / "step_2" / name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(path, *rest)

        return fail

    monkeypatch.setattr(rd, "sha256_file", bad_sector(rd.sha256_file))
    monkeypatch.setattr(Path, "read_bytes", bad_sector(Path.read_bytes))
    told: list[str] = []
    found = rd.newest_verified(tmp_path, warn=told.append)
    assert found is not None
    assert found.step == 1
    assert f"step_2/{name}: Input/output error" in told[0]


def test_steps_set_aside_are_no_steps_of_the_run(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_step(tmp_path, step)
    moved = rd.set_aside(tmp_path, 1)
    assert [path.name.partition("-")[0] for path in moved] == ["step_2.aside", "step_3.aside"]
    assert rd.list_steps(tmp_path) == [1]
    assert (tmp_path / "latest").readlink() == Path("step_1")
    assert rd.remove_unfinished(tmp_path) == []
    assert all(rd.verify_step(path) for path in moved)  # nothing of them is lost
    assert rd.set_aside(tmp_path, 1) == []


def test_prune_keeps_the_newest_and_what_is_protected(tmp_path: Path) -> None:
    for step in range(1, 7):
        make_step(tmp_path, step)
    assert rd.prune(tmp_path, 2, protect=[1]) == [2, 3, 4]
    assert rd.list_steps(tmp_path) == [1, 5, 6]
    (tmp_path / "step_6" / "model").unlink()
    make_step(tmp_path, 4)
    with pytest.raises(IntegrityError):
        rd.prune(tmp_path, 1)
    assert rd.list_steps(tmp_path) == [1, 4, 5, 6]


def test_one_trainer_at_a_time_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from libneox import run_directory as rd\n"
        "with rd.lock(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputExists, match=f"process {holder.pid}"), rd.lock(tmp_path):
            pass
        holder.kill()
        holder.wait(10)
        with rd.lock(tmp_path):
            pass


def test_metrics_are_cut_to_the_resumed_step_and_at_a_torn_line(tmp_path: Path) -> None:
    lines = [json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    rd.cut_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "lo')
    rd.cut_metrics(tmp_path, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])


def test_status_round_trip(tmp_path: Path) -> None:
    assert rd.read_status(tmp_path) is None
    rd.write_status(tmp_path, state="stopped", code=75)
    assert rd.read_status(tmp_path) == {"state": "stopped", "code": 75}


def test_ten_thousand_steps_are_listed_within_a_second(tmp_path: Path) -> None:
    import time

    for step in range(10_000):
        (tmp_path / f"step_{step}").mkdir()
    started = time.monotonic()
    assert len(rd.list_steps(tmp_path)) == 10_000
    assert time.monotonic() - started < 1.0
