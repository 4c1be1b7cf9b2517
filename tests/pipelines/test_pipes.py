# SPDX-License-Identifier: Apache-2.0
"""tokenize | shard | cat | decode in real pipes: what goes in comes out, what breaks is never half a dataset."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., subprocess.CompletedProcess[bytes]]
PAIR = {"dataset.bin", "dataset.idx", "dataset.json", "dataset.tokenizer.json"}


def texts(data: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in data.splitlines()]


def made(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()} - {"docs.jsonl"}


def test_the_literal_line(shell: Shell, documents: Path, work: Path) -> None:
    """No flag at all, and one line on stderr for every default taken."""
    run = shell("cat docs.jsonl | neox-tokenize | neox-shard; exit $((${PIPESTATUS[1]} + ${PIPESTATUS[2]}))")
    assert run.returncode == 0, run.stderr
    assert run.stdout == b""
    assert made(work) == PAIR
    assert b"byte tokenizer" in run.stderr
    assert b"./dataset" in run.stderr


def test_round_trip(shell: Shell, documents: Path) -> None:
    line = "neox-tokenize docs.jsonl --append-eod | neox-shard pack -o d && neox-shard cat d | neox-tokenize --decode"
    run = shell(f"set -o pipefail; {line}")
    assert run.returncode == 0, run.stderr
    assert texts(run.stdout) == texts(documents.read_bytes())


def test_compressed_input_and_environment_tokenizer(shell: Shell, documents: Path, work: Path) -> None:
    run = shell(
        "set -o pipefail; neox-tokenize train docs.jsonl --vocab-size 300 -o t.json && export NEOX_TOKENIZER=t.json && "
        "gzip -k docs.jsonl && neox-tokenize docs.jsonl.gz | neox-shard && "
        "neox-shard cat dataset | neox-tokenize --decode"
    )
    assert run.returncode == 0, run.stderr
    assert texts(run.stdout) == texts(documents.read_bytes())
    assert (work / "dataset.tokenizer.json").read_bytes() == (work / "t.json").read_bytes()


def test_concatenated_streams_are_one(shell: Shell, documents: Path) -> None:
    run = shell(
        "set -o pipefail; neox-tokenize docs.jsonl > a; neox-tokenize docs.jsonl --limit 7 > b; "
        "cat a b | neox-shard && neox-shard cat dataset | neox-tokenize --decode"
    )
    assert run.returncode == 0, run.stderr
    expected = texts(documents.read_bytes())
    assert texts(run.stdout) == expected + expected[:7]


def test_streams_of_different_tokenizers_do_not_mix(shell: Shell, documents: Path, work: Path) -> None:
    run = shell(
        "neox-tokenize train docs.jsonl --vocab-size 300 -o t.json && neox-tokenize docs.jsonl > a; "
        "neox-tokenize docs.jsonl -t t.json > b; cat a b | neox-shard"
    )
    assert run.returncode == 2, run.stderr
    assert made(work) == {"a", "b", "t.json"}


def test_workers_change_no_byte(shell: Shell, documents: Path) -> None:
    run = shell(
        "for n in 1 2 5; do neox-tokenize docs.jsonl -j $n | neox-shard -o d$n || exit; done; cat d?.bin | sha256sum"
    )
    assert run.returncode == 0, run.stderr
    check = shell("cmp d1.bin d2.bin && cmp d1.bin d5.bin && cmp d1.idx d2.idx && cmp d1.idx d5.idx")
    assert check.returncode == 0, check.stdout + check.stderr


def test_reader_goes_away(shell: Shell, work: Path, silent: Callable[[bytes], bool]) -> None:
    (work / "big.jsonl").write_text("".join(f'{{"text": "{n:040d}"}}\n' for n in range(60000)))
    run = shell("neox-tokenize big.jsonl -q | head -c 100 > h; echo ${PIPESTATUS[@]}")
    assert run.stdout.split() == [b"141", b"0"], run.stderr
    assert run.stderr == b""
    assert (work / "h").stat().st_size == 100


def test_reader_of_cat_and_decode_goes_away(shell: Shell, work: Path) -> None:
    (work / "big.jsonl").write_text("".join(f'{{"text": "{n:040d}"}}\n' for n in range(60000)))
    assert shell("neox-tokenize big.jsonl -q | neox-shard -q").returncode == 0
    run = shell("neox-shard cat dataset -q | neox-tokenize --decode -q | head -1; echo ${PIPESTATUS[@]}")
    text, codes = run.stdout.splitlines()
    assert json.loads(text)["text"] == f"{0:040d}"
    assert codes.split()[1:] == [b"141", b"0"], run.stderr
    assert codes.split()[0] in (b"141", b"0")
    assert run.stderr == b""


def test_failed_producer_commits_nothing(shell: Shell, documents: Path, work: Path) -> None:
    """A broken line in the middle: stage 1 says 65 and where, stage 2 says 65, no file appears."""
    lines = documents.read_text().splitlines(keepends=True)
    (work / "broken.jsonl").write_text("".join([*lines, '{"text": "cut', "\n", *lines]))
    run = shell("neox-tokenize broken.jsonl | neox-shard; echo ${PIPESTATUS[@]}")
    assert run.stdout.split() == [b"65", b"65"], run.stderr
    assert b"301" in run.stderr, "the line is not named"
    assert made(work) == {"broken.jsonl"}


def test_producer_killed_between_batches(environment: dict[str, str], work: Path, documents: Path) -> None:
    """SIGKILL after whole batches went through: a stream without its end mark is no dataset."""
    tokenize = subprocess.Popen(
        ["neox-tokenize"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=work,
    )
    shard = subprocess.Popen(
        ["neox-shard"], stdin=tokenize.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=work
    )
    assert tokenize.stdin is not None
    assert tokenize.stdout is not None
    tokenize.stdout.close()
    line = b'{"text": "' + b"x" * 4000 + b'"}\n'
    tokenize.stdin.write(line * 2000)
    tokenize.stdin.flush()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # some of it has reached the other end and lies in an unfinished file
        if any(".tmp-" in path.name and path.stat().st_size > 0 for path in work.iterdir()):
            break
        time.sleep(0.05)
    else:
        pytest.fail("nothing came through the pipe")
    tokenize.kill()
    _, complaint = shard.communicate(timeout=30)
    tokenize.communicate(timeout=30)
    assert tokenize.returncode == -signal.SIGKILL
    assert shard.returncode == 65, complaint
    assert b"neox-shard: error: " in complaint
    assert made(work) == set()


def test_truncated_stream(shell: Shell, documents: Path, work: Path) -> None:
    assert shell("neox-tokenize docs.jsonl -q > s").returncode == 0
    size = (work / "s").stat().st_size
    for cut in (1, 100, size // 2, size - 1):
        run = shell(f"head -c {cut} s | neox-shard -q")
        assert run.returncode == 65, (cut, run.stderr)
        assert made(work) == {"s"}


def test_text_into_shard_gets_the_hint(shell: Shell, documents: Path) -> None:
    run = shell("cat docs.jsonl | neox-shard")
    assert run.returncode == 65
    assert b"neox-tokenize" in run.stderr
    assert len(run.stderr.splitlines()) <= 2


def test_empty_input_is_an_empty_dataset_and_a_warning(shell: Shell, work: Path) -> None:
    run = shell("set -o pipefail; neox-tokenize < /dev/null | neox-shard")
    assert run.returncode == 0, run.stderr
    assert made(work) == PAIR
    assert b"0 documents" in run.stderr
    run = shell("neox-tokenize --fail-on-empty < /dev/null | neox-shard -o e; echo ${PIPESTATUS[@]}")
    assert run.stdout.split() == [b"65", b"65"]


def test_existing_output_stays(shell: Shell, documents: Path, work: Path) -> None:
    assert shell("neox-tokenize docs.jsonl | neox-shard").returncode == 0
    before = {path.name: path.read_bytes() for path in work.glob("dataset.*")}
    run = shell("neox-tokenize docs.jsonl --limit 3 -q | neox-shard; echo ${PIPESTATUS[@]}")
    assert run.stdout.split()[1] == b"73", run.stderr
    assert {path.name: path.read_bytes() for path in work.glob("dataset.*")} == before
    assert shell("set -o pipefail; neox-tokenize docs.jsonl --limit 3 | neox-shard --force").returncode == 0
    assert (work / "dataset.bin").read_bytes() != before["dataset.bin"]


def test_process_substitution(shell: Shell, documents: Path) -> None:
    run = shell(
        "neox-shard pack -q -o d <(neox-tokenize docs.jsonl -q) <(neox-tokenize docs.jsonl --limit 2 -q) && "
        "neox-shard info d --json"
    )
    assert run.returncode == 0, run.stderr
    assert b"302" in run.stdout
