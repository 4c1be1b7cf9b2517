# SPDX-License-Identifier: Apache-2.0
"""Copies of checkpoints at an address: a directory, memory, and S3 as a local server plays it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from libneox import run_directory
from libneox.errors import InputMissing, IntegrityError, UsageError
from neox_train import remote


def make_step(run: Path, step: int, data: bytes = b"0123456789") -> Path:
    target = run_directory.step_path(run, step)
    temporary = run_directory.begin_step(target)
    files = dict([run_directory.add_file(temporary, name, data + name.encode()) for name in ("model", "trainer.json")])
    return run_directory.commit_step(temporary, target, run_directory.Manifest(step=step, files=files))


def contents(step: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in step.iterdir()}


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is sent to a file system, in order; `fail` may raise instead."""

    def watch(url: str, fail: Callable[[str], None] = lambda name: None) -> list[str]:
        filesystem = type(fsspec.core.url_to_fs(url)[0])
        put, sent = filesystem.put_file, []

        def put_file(self: Any, source: str, target: str, **more: Any) -> None:
            name = "/".join(target.split("/")[-2:])
            fail(name)
            put(self, source, target, **more)
            sent.append(name)

        monkeypatch.setattr(filesystem, "put_file", put_file)
        return sent

    return watch


def uploads(run: Path, url: str, told: list[str]) -> remote.Uploads:
    return remote.Uploads(run, url, part_bytes=5 * 2**20, warn=told.append)


def test_a_step_is_sent_with_its_manifest_last_and_only_once(tmp_path: Path, puts) -> None:
    run, url = tmp_path / "RUN", f"file://{tmp_path}/there"
    sent, told = puts(url), []
    make_step(run, 1)
    copies = uploads(run, url, told)
    copies.offer(run_directory.step_number(make_step(run, 2)))
    copies.finish()
    expected = [f"step_{step}/{name}" for step in (1, 2) for name in ("model", "trainer.json", "manifest.json")]
    assert sent == expected
    for step in (1, 2):
        assert contents(tmp_path / f"there/step_{step}") == contents(run / f"step_{step}")
    uploads(run, url, told).finish()
    assert sent == expected
    assert told == []


def test_what_was_interrupted_goes_on_where_it_was(tmp_path: Path, puts) -> None:
    run, url = tmp_path / "RUN", f"file://{tmp_path}/there"
    make_step(run, 1)
    make_step(run, 2)
    left = ["step_1/trainer.json"]

    def fail(name: str) -> None:
        if name in left:
            left.remove(name)
            raise ConnectionResetError("reset by peer")

    told: list[str] = []
    sent = puts(url, fail)
    copies = uploads(run, url, told)
    copies.wait(None)
    assert sent == ["step_1/model"]
    assert copies.pending == {1, 2}
    assert "ConnectionResetError: reset by peer; tried again with the next checkpoint" in told[0]
    uploads(run, url, told).finish()  # another process, say
    assert sent[1:3] == ["step_1/trainer.json", "step_1/manifest.json"]
    assert contents(tmp_path / "there/step_2") == contents(run / "step_2")


def test_a_step_of_another_run_is_no_step_while_it_is_replaced(tmp_path: Path, puts) -> None:
    url = f"file://{tmp_path}/there"
    make_step(tmp_path / "other", 1, b"another run")
    uploads(tmp_path / "other", url, []).finish()

    def fail(name: str) -> None:
        assert not (tmp_path / "there/step_1/manifest.json").exists()
        if name == "step_1/trainer.json":
            raise OSError("down")

    puts(url, fail)
    make_step(tmp_path / "RUN", 1)
    copies = uploads(tmp_path / "RUN", url, [])
    with pytest.raises(Exception, match="step_1 not copied, OSError: down; run the same command again"):
        copies.finish()
    with pytest.raises(InputMissing, match="no checkpoint there"):
        remote.fetch(url, tmp_path / "back", step=None, warn=print)


def test_a_damaged_step_here_does_not_hold_up_the_others(tmp_path: Path) -> None:
    make_step(tmp_path / "RUN", 1)
    make_step(tmp_path / "RUN", 2)
    (tmp_path / "RUN/step_1/manifest.json").unlink()
    told: list[str] = []
    uploads(tmp_path / "RUN", f"file://{tmp_path}/there", told).finish()
    assert (tmp_path / "there/step_2/manifest.json").exists()
    assert "step_1" in told[0]


def test_the_newest_whole_step_comes_back(tmp_path: Path) -> None:
    run, there, back = tmp_path / "RUN", tmp_path / "there", tmp_path / "back"
    for step in (9, 10, 11):
        make_step(run, step)
    uploads(run, f"file://{there}", []).finish()
    (there / "step_11/manifest.json").unlink()  # was not finished
    (there / "step_10/model").write_bytes(b"x" * 15)
    (back / "step_7.tmp-killed").mkdir(parents=True)
    told: list[str] = []
    assert remote.fetch(f"file://{there}", back, step=None, warn=told.append) == back / "step_9"
    assert [path.name for path in back.iterdir() if ".tmp-" in path.name] == []
    assert "step_10/model" in told[0]
    assert run_directory.verify_step(back / "step_9").step == 9
    assert run_directory.list_steps(back) == [9]
    with pytest.raises(IntegrityError, match="step_10/model"):
        remote.fetch(f"file://{there}", back, step=10, warn=print)
    with pytest.raises(InputMissing, match="of step 11"):
        remote.fetch(f"file://{there}", back, step=11, warn=print)
    assert remote.fetch(f"file://{there}/step_9", tmp_path / "one", step=None, warn=print).name == "step_9"
    with pytest.raises(InputMissing):
        remote.fetch(f"file://{tmp_path}/nowhere", back, step=None, warn=print)


def test_a_manifest_from_afar_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    step = make_step(tmp_path / "there", 1)
    record = run_directory.record_file(step / "model")
    manifest = run_directory.Manifest(step=1, files={"../../escaped": record})
    (step / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(IntegrityError, match=r"none of its checkpoints|outside"):
        remote.fetch(f"file://{tmp_path}/there", tmp_path / "a/b/back", step=None, warn=print)
    assert not list(tmp_path.rglob("escaped"))


def test_addresses_that_nobody_opens_are_said_at_once(train, config, monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonsense"):
        remote.open_address("nonsense://bucket/x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    done = train(config(s3_path="s3://bucket/run"), code=66)
    assert "pip install 'neox-train[s3]'" in done.stderr


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in memory."""
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def test_a_run_is_copied_and_goes_on_elsewhere(train, config, losses, memory: str, tmp_path: Path) -> None:
    """Only the newest step stays here, all are there; another machine begins with what it finds there."""
    keys = {"checkpoint_factor": 3, "s3_path": memory, "extra_save_iters": [0]}
    train(config(keep_last_n_checkpoints=1, **keys), "-q")
    there = fsspec.filesystem("memory")
    assert sorted(name.rpartition("/")[2] for name in there.ls("/bucket/run", detail=False)) == [
        "step_0", "step_3", "step_6", "step_8",
    ]  # fmt: skip
    whole = losses(tmp_path / "RUN")
    second = config("second.yml", save=str(tmp_path / "second"), load=memory, **keys)
    for step in (6, 8):
        there.rm(f"/bucket/run/step_{step}", recursive=True)
    done = train(second)
    assert f"a copy of {memory}" in done.stderr
    assert losses(tmp_path / "second") == whole[3:]
    assert there.exists("/bucket/run/step_8/manifest.json")
    third = {"save": str(tmp_path / "third"), "load": memory, "finetune": True, "train_iters": 1}
    train(config("third.yml", **third), "-q")
    assert run_directory.list_steps(tmp_path / "third") == [1]
    assert run_directory.list_steps(tmp_path / "third/loaded") == [8]


def test_a_server_that_is_down_does_not_stop_the_run(train, config, puts, memory: str, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise TimeoutError("no answer")

    puts(memory, fail)
    done = train(config(checkpoint_factor=3, keep_last_n_checkpoints=1, s3_path=memory), "-q", code=74)
    assert "tried again with the next checkpoint" in done.stderr
    assert "step_3, step_6, step_8 not copied, TimeoutError: no answer; run the same command again" in done.stderr
    assert run_directory.list_steps(tmp_path / "RUN") == [3, 6, 8]  # kept until they are copied


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 bucket on this host."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    threaded = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"checkpoints-{secrets.token_hex(4)}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/run"
    s3fs.S3FileSystem.clear_instance_cache()
    threaded.stop()


def test_s3(train, config, losses, bucket: str, tmp_path: Path) -> None:
    train(config(checkpoint_factor=4, s3_path=bucket), "-q")
    there = fsspec.filesystem("s3")
    for step in (4, 8):
        for name, data in contents(tmp_path / f"RUN/step_{step}").items():
            assert there.cat_file(f"{bucket}/step_{step}/{name}") == data
    for path in (tmp_path / "RUN").rglob("*"):
        assert not path.is_file() or b"canary-secret" not in path.read_bytes()
    there.rm(f"{bucket}/step_8", recursive=True)
    train(config("second.yml", save=str(tmp_path / "second"), load=bucket), "-q")
    assert losses(tmp_path / "second") == losses(tmp_path / "RUN")[4:]


def test_s3_takes_a_large_file_in_parts(bucket: str, tmp_path: Path) -> None:
    make_step(tmp_path / "RUN", 1, os.urandom(12 * 2**20))
    uploads(tmp_path / "RUN", bucket, []).finish()
    etag = fsspec.filesystem("s3").info(f"{bucket}/step_1/model")["ETag"]
    assert etag.strip('"').endswith("-3")  # three parts
    assert remote.fetch(bucket, tmp_path / "back", step=1, warn=print) == tmp_path / "back/step_1"
    assert contents(tmp_path / "back/step_1") == contents(tmp_path / "RUN/step_1")
