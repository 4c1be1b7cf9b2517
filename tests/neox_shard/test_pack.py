# SPDX-License-Identifier: Apache-2.0
"""neox-shard pack: streams in, whole datasets or nothing out."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from libneox.data.check import check_pair
from libneox.data.manifest import read_manifest
from libneox.data.mmap import MMapDataset

DOCUMENTS = [[k % 250 + 2] * (k % 9) + [0] for k in range(50)]
PAIR = {"out.bin", "out.idx", "out.json", "out.tokenizer.json"}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_a_flag_the_output_is_dataset(run_command, make_stream, read, tmp_path: Path) -> None:
    run = run_command(["neox-shard"], input=make_stream(DOCUMENTS), cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, b"")
    assert b"writing ./dataset" in run.stderr
    assert b"50 documents" in run.stderr
    assert read(tmp_path / "dataset") == DOCUMENTS
    again = run_command(["neox-shard"], input=make_stream(DOCUMENTS), cwd=tmp_path)
    assert again.returncode == 73
    assert b"--force" in again.stderr
    forced = run_command(["neox-shard", "--force", "--json"], input=make_stream(DOCUMENTS[:3]), cwd=tmp_path)
    assert forced.returncode == 0
    assert json.loads(forced.stdout)["dataset"]["documents"] == 3
    assert read(tmp_path / "dataset") == DOCUMENTS[:3]


def test_pairs_of_the_original_come_through_a_pipe_unchanged(golden: Path, run_command, tmp_path: Path) -> None:
    source = golden / "data/a_preprocess/sample_eod_text_document"
    tokenizer = golden / "data/e_mask_chat/chat_tokenizer/tokenizer.json"
    stream = run_command(["neox-shard", "cat", str(source), "--tokenizer", str(tokenizer)])
    assert stream.returncode == 0, stream.stderr
    packed = run_command(["neox-shard", "pack", "-o", str(tmp_path / "out")], input=stream.stdout)
    assert packed.returncode == 0, packed.stderr
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == Path(f"{source}{suffix}").read_bytes()
    assert (tmp_path / "out.tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize("damage", ["no trailer", "cut in a batch", "text", "empty", "flipped"])
def test_a_stream_that_is_not_whole_commits_nothing(run_command, make_stream, tmp_path: Path, damage: str) -> None:
    whole = make_stream(DOCUMENTS)
    stream = {
        "no trailer": make_stream(DOCUMENTS, trailer=False),
        "cut in a batch": whole[: len(whole) * 6 // 10],
        "text": b'{"text": "hello"}\n',
        "empty": b"",
        "flipped": whole[:4] + bytes([whole[4] ^ 255]) + whole[5:],
    }[damage]
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert run.returncode == 65, run.stderr
    assert run.stderr.count(b"\n") == 1
    assert b"Traceback" not in run.stderr
    assert _names(tmp_path) == set()


def test_streams_one_behind_the_other_are_one(run_command, make_stream, read, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(make_stream(DOCUMENTS[30:]))
    both = make_stream(DOCUMENTS[:20]) + make_stream(DOCUMENTS[20:30])
    run = run_command(["neox-shard", "-", "b", "-o", "out"], input=both, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert read(tmp_path / "out") == DOCUMENTS


def test_streams_of_different_tokenizers_are_refused(run_command, make_stream, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(make_stream(DOCUMENTS, data=tokenizer.data + b" "))
    run = run_command(["neox-shard", "-", "b", "-o", "out"], input=make_stream(DOCUMENTS), cwd=tmp_path)
    assert run.returncode == 2
    assert b"tokenizer" in run.stderr
    assert _names(tmp_path) == {"b"}


def test_labels_and_rewards_go_to_pairs_of_their_own(run_command, make_stream, read, tmp_path: Path) -> None:
    labels = [[-100] * (len(document) - 1) + document[-1:] for document in DOCUMENTS]
    rewards = [0.5 * k for k in range(len(DOCUMENTS))]
    stream = make_stream(DOCUMENTS, labels=labels, rewards=rewards)
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert read(tmp_path / "out") == DOCUMENTS
    assert read(tmp_path / "out_label") == labels
    assert read(tmp_path / "out_reward") == [[reward] for reward in rewards]
    dtypes = [MMapDataset(tmp_path / name).dtype for name in ("out", "out_label", "out_reward")]
    assert dtypes == [np.int32, np.int32, np.float32]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "out.idx").unlink()  # as if killed between the renames of the two pairs
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert run.returncode == 73


def test_a_dataset_of_its_own_is_no_part_to_be_replaced(run_command, make_stream, make_dataset, tmp_path: Path) -> None:
    make_dataset("out_label", [[1]], "int32")
    stream = make_stream(DOCUMENTS, labels=DOCUMENTS)
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert run.returncode == 73
    assert b"out_label" in run.stderr
    assert not list(tmp_path.glob("out.*"))


def test_keys_go_to_pairs_of_their_own(run_command, make_stream, read, tmp_path: Path) -> None:
    run = run_command(["neox-shard", "-o", "out"], input=make_stream(DOCUMENTS, keys=("a", "b")), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert read(tmp_path / "out_a") == DOCUMENTS
    assert read(tmp_path / "out_b") == [[token + 1 for token in document] for document in DOCUMENTS]
    assert not (tmp_path / "out.idx").exists()


def test_what_was_left_out_is_recorded(run_command, make_stream, tmp_path: Path) -> None:
    stream = make_stream(DOCUMENTS, rejects={"empty": 3}) + make_stream(DOCUMENTS, rejects={"empty": 1, "broken": 2})
    run = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
    assert b"4 left out (empty), 2 left out (broken)" in run.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.rejects == {"empty": 4, "broken": 2}
    assert manifest.command == ("neox-shard", "-o", "out")
    assert manifest.sources == ({"engine": "test"},)


def test_an_id_outside_the_vocabulary_is_never_packed(run_command, make_stream, tmp_path: Path) -> None:
    run = run_command(["neox-shard", "-o", "out"], input=make_stream([[1]] * 9 + [[2, 258]]), cwd=tmp_path)
    assert run.returncode == 65
    assert b"document 9: id 258" in run.stderr
    assert _names(tmp_path) == set()


def test_no_documents(run_command, make_stream, tmp_path: Path) -> None:
    run = run_command(["neox-shard", "-o", "out"], input=make_stream([]), cwd=tmp_path)
    assert run.returncode == 0
    assert b"warning" in run.stderr
    assert len(MMapDataset(tmp_path / "out")) == 0
    run = run_command(["neox-shard", "-o", "no", "--fail-on-empty"], input=make_stream([]), cwd=tmp_path)
    assert run.returncode == 65
    assert not list(tmp_path.glob("no*"))


def test_places_where_nothing_can_be_written(run_command, make_stream, tmp_path: Path) -> None:  # B-11
    (tmp_path / "file").write_bytes(b"x")
    for out in ("missing/out", "file/out"):
        run = run_command(["neox-shard", "-o", out], input=make_stream(DOCUMENTS), cwd=tmp_path)
        assert run.returncode == 73, run.stderr
    assert _names(tmp_path) == {"file"}


def test_names_that_no_dataset_can_have(run_command, make_stream, tmp_path: Path) -> None:
    for out, keys in ((".", ("",)), ("out", ("a/b", "c"))):
        run = run_command(["neox-shard", "-o", out], input=make_stream(DOCUMENTS, keys=keys), cwd=tmp_path)
        assert run.returncode == 2, run.stderr
        assert run.stderr.count(b"\n") == 1
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("name", [b"sp ace", b"new\nline", b"caf\xc3\xa9", b"raw\xff", b"x" * 235])
def test_unusual_names(run_command, make_stream, tmp_path: Path, name: bytes) -> None:
    out = os.fsdecode(name)
    run = run_command(["neox-shard", "-o", out], input=make_stream(DOCUMENTS), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for verb in ("verify", "info"):
        assert run_command(["neox-shard", verb, out], cwd=tmp_path).returncode == 0
    assert read_manifest(tmp_path / out) is not None


def test_a_full_disk_keeps_the_older_output(make_stream, tmp_path: Path) -> None:  # B-12
    """A limit on the size of files stands in for a disk that fills up: the same OSError, on every machine."""

    def pack(stream: bytes, limit: int | None = None) -> subprocess.CompletedProcess[bytes]:
        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "neox_shard", "-o", "out", "--force"]
        return subprocess.run(
            command, input=stream, capture_output=True, cwd=tmp_path, preexec_fn=limited, timeout=60, check=False
        )

    assert pack(make_stream(DOCUMENTS)).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = pack(make_stream([[5] * 10_000] * 300, batch=10), limit=1 << 20)
    assert run.returncode == 74, run.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_interrupted_nothing_is_left(make_stream, tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stream = make_stream(DOCUMENTS * 20)
        with _start(tmp_path) as process:
            assert process.stdin is not None
            process.stdin.write(stream[: len(stream) // 2])
            process.stdin.flush()
            _wait_for(lambda: any(".tmp-" in name for name in _names(tmp_path)))
            process.send_signal(number)
            process.wait(10)
            assert process.returncode == code
        assert _names(tmp_path) == set()


def test_pandas_is_not_imported(make_stream, tmp_path: Path) -> None:
    """Arrow imports it for its own conversions where it is installed, and drops signals that arrive meanwhile."""
    command = [sys.executable, "-X", "importtime", "-m", "neox_shard", "-o", "out"]
    run = subprocess.run(
        command, input=make_stream(DOCUMENTS), capture_output=True, cwd=tmp_path, timeout=60, check=True
    )
    assert b"pyarrow" in run.stderr
    assert b"pandas.core" not in run.stderr


def test_a_second_writer_is_refused(run_command, make_stream, tmp_path: Path) -> None:  # B-14
    stream = make_stream(DOCUMENTS * 20)
    with _start(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(stream[: len(stream) // 2])
        process.stdin.flush()
        _wait_for(lambda: "out.lock" in _names(tmp_path))
        second = run_command(["neox-shard", "-o", "out"], input=stream, cwd=tmp_path)
        assert second.returncode == 73
        assert b"another process" in second.stderr
        process.stdin.write(stream[len(stream) // 2 :])
        process.stdin.close()
        assert process.wait(30) == 0
    assert _names(tmp_path) == PAIR


def test_killed_at_twenty_moments(run_command, make_stream, tmp_path: Path) -> None:  # B-13
    """After kill -9 there is nothing or a whole valid pair, and the same command again gives the same bytes."""
    stream = tmp_path / "stream"
    stream.write_bytes(make_stream([[k % 200] * 400 for k in range(10_000)], batch=100))
    (tmp_path / "clean").mkdir()
    started = time.perf_counter()
    seen, ended = _pack_and_kill(stream, tmp_path / "clean", None)
    assert seen is not None
    window = ended - seen
    clean = {path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()}
    assert set(clean) == PAIR
    rng, committed = random.Random(started), 0
    for number in range(20):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        _pack_and_kill(stream, folder, rng.random() * window * 1.1)
        if (folder / "out.idx").exists():
            committed += 1
            (folder / "out.lock").unlink(missing_ok=True)  # killed between the commit and letting go; the next takes it
            assert check_pair(folder / "out").documents == 10_000
        else:
            run = run_command(["neox-shard", str(stream), "-o", "out"], cwd=folder)
            assert run.returncode == 0, run.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == clean
    assert committed < 20, "no kill came before the commit"


def _pack_and_kill(stream: Path, folder: Path, after: float | None) -> tuple[float | None, float]:
    """Start a pack, and kill it some seconds after its first output; the times of the first output and of the end."""
    command = [sys.executable, "-m", "neox_shard", str(stream), "-o", "out"]
    seen = None
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if seen is None and any(folder.iterdir()):
                seen = time.perf_counter()
            if seen is not None and after is not None and time.perf_counter() >= seen + after:
                process.kill()
            time.sleep(0.001)
    return seen, time.perf_counter()


def _start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "neox_shard", "-o", "out"]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
