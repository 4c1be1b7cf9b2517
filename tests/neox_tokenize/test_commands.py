# SPDX-License-Identifier: Apache-2.0
"""neox-tokenize as a command: pipes, signals, exit codes, and its verbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from tests.peak_memory import measured

JSONL = b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(50))
COMMAND = [sys.executable, "-m", "neox_tokenize"]


def test_pipe_and_back(run_command) -> None:
    made = run_command(["neox-tokenize", "--append-eod"], input=zstandard.ZstdCompressor().compress(JSONL))
    assert made.returncode == 0
    assert b"built-in byte tokenizer" in made.stderr
    back = run_command(["neox-tokenize", "--decode"], input=made.stdout * 2)
    assert [json.loads(line)["text"] for line in back.stdout.splitlines()] == [f"document {i}" for i in range(50)] * 2


def test_the_environment_names_the_tokenizer(run_command, tmp_path: Path) -> None:
    made = run_command(["neox-tokenize"], input=JSONL, env={"NEOX_TOKENIZER": "charlevel"})
    assert b"built-in" not in made.stderr
    counted = run_command(["neox-tokenize", "count", "--json"], input=made.stdout)
    assert json.loads(counted.stdout) == {"documents": 50, "tokens": 540, "longest_document": 11, "skipped": {}}


def test_failure_leaves_no_trailer(run_command) -> None:  # D-08
    made = run_command(["neox-tokenize", "--quiet"], input=JSONL + b"{broken")
    assert made.returncode == 65
    assert made.stderr.startswith(b"neox-tokenize: error: stdin:51: broken JSON")
    assert b"Traceback" not in made.stderr
    back = run_command(["neox-tokenize", "--decode"], input=made.stdout)
    assert back.returncode == 65


def test_out_is_whole_or_absent(run_command, tmp_path: Path) -> None:
    out = tmp_path / "o.tok"
    bad = run_command(["neox-tokenize", "-o", out], input=zstandard.ZstdCompressor().compress(JSONL)[:-5])
    assert (bad.returncode, list(tmp_path.iterdir())) == (65, [])
    assert b"truncated zstd frame at byte" in bad.stderr
    assert run_command(["neox-tokenize", "-o", out], input=JSONL).returncode == 0
    first = out.read_bytes()
    again = run_command(["neox-tokenize", "-o", out], input=JSONL)
    assert (again.returncode, out.read_bytes()) == (73, first)
    assert run_command(["neox-tokenize", "-o", out, "--force"], input=JSONL[:100]).returncode == 65
    assert out.read_bytes() == first
    assert run_command(["neox-tokenize", "-o", tmp_path / "no" / "dir"], input=JSONL).returncode == 73


@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        ("</dev/null", 0, "no document"),
        ("<&-", 66, "closed"),
        (">/dev/full </dev/null", 74, "No space left"),
    ],
)
def test_odd_descriptors(redirect: str, code: int, says: str) -> None:
    target = "" if ">" in redirect else ">/dev/null"
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m neox_tokenize {redirect} {target}', sys.executable],
        capture_output=True, timeout=60, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stdin_is_no_output_file(tmp_path: Path) -> None:
    """Its number would fall to the first file that is opened."""
    line = f'"$0" -m neox_tokenize -t bytes -o {tmp_path}/o <&-'
    done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True, timeout=60, check=False)
    assert done.returncode == 66
    assert b"stdin is closed or a directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    file = tmp_path / "big.jsonl"
    file.write_bytes(JSONL * 20000)
    script = '"$0" -m neox_tokenize -q "$1" | head -c 100 | wc -c; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", script, sys.executable, file], capture_output=True, timeout=60, check=False)
    assert done.stdout.split() == [b"100", b"141"]
    assert (
        done.stderr
        == b"neox-tokenize: no --tokenizer and no $NEOX_TOKENIZER: using the built-in byte tokenizer (258 ids)\n"
        or not done.stderr
    )  # noqa: E501


def test_a_slow_reader_holds_the_writer() -> None:  # L-07
    """The input never ends; 64 KiB of output are taken every quarter of a second."""
    endless = subprocess.Popen(["yes", json.dumps({"text": "words of a document " * 500})], stdout=subprocess.PIPE)
    with endless, subprocess.Popen([*COMMAND, "-q"], stdin=endless.stdout, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        sizes = []
        for _ in range(8):
            process.stdout.read(1 << 16)
            time.sleep(0.25)
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
        process.kill()
        endless.kill()
    print(f"L-07: {sizes} MB while the reader was slow")
    assert max(sizes) < 200
    assert max(sizes) - sizes[1] < 16


def test_interrupt_is_quick_and_leaves_nothing(tmp_path: Path) -> None:  # D-05
    out = tmp_path / "o.tok"
    with subprocess.Popen([*COMMAND, "-o", out], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(JSONL)
        process.stdin.flush()
        for _ in range(100):
            if list(tmp_path.iterdir()):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["stdin", "stdout"])
def test_a_terminal_is_refused(end: str) -> None:
    leader, follower = os.openpty()
    ends = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, end: follower}
    done = subprocess.run(COMMAND, **ends, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(leader)
    os.close(follower)
    assert done.returncode == 2
    assert f"{end} is a terminal".encode() in done.stderr


def test_train(run_command, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    arguments = ["neox-tokenize", "train", "--vocab-size", "300", "-o", out]
    made = run_command(arguments, input=JSONL)
    assert made.returncode == 0, made.stderr
    first = out.read_bytes()
    assert run_command([*arguments, "--force"], input=JSONL).returncode == 0
    assert out.read_bytes() == first  # the same input, the same file
    content = json.loads(first)
    assert [(token["id"], token["content"]) for token in content["added_tokens"]] == [
        (0, "<|endoftext|>"),
        (1, "<|padding|>"),
    ]
    assert b"texts hold no more pairs" in made.stderr
    back = run_command(["neox-tokenize", "-t", out, "--append-eod"], input=JSONL)
    counted = json.loads(run_command(["neox-tokenize", "count", "--json"], input=back.stdout).stdout)
    assert counted["documents"] == 50
    assert counted["tokens"] < 300
    assert run_command(["neox-tokenize", "train", "--vocab-size", "257", "-o", "-"], input=JSONL).returncode == 2
    broken = run_command(["neox-tokenize", "train", "-o", tmp_path / "x.json"], input=JSONL + b"{")
    assert (broken.returncode, b"stdin:51" in broken.stderr) == (65, True)
    assert not (tmp_path / "x.json").exists()
    assert run_command(["neox-tokenize", "train", "-o", "-"], input=b"").returncode == 65


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_is_interrupted(tmp_path: Path, number: int, code: int) -> None:  # D-05
    """The library that trains looks at no signal: without care the command would go on to the end of its input."""
    arguments = ["train", "-o", tmp_path / "t.json", "--on-error", f"quarantine={tmp_path}/bad"]
    with subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(JSONL + b"{broken\n")
        process.stdin.flush()
        for _ in range(200):
            if list(tmp_path.iterdir()):
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_train_takes_documents_up_to_its_limit(run_command, tmp_path: Path) -> None:
    source = b'{"a": "x", "b": "y"}\n' * 5 + b"{broken"
    arguments = ["neox-tokenize", "train", "-k", "a", "-k", "b", "--limit", "5", "--vocab-size", "300", "-o", "-"]
    made = run_command(arguments, input=source)
    assert made.returncode == 0, made.stderr
    assert b"from 5 documents, 10 B of text" in made.stderr


def test_train_with_own_specials(run_command) -> None:
    arguments = ["neox-tokenize", "train", "--vocab-size", "270", "--special", "<eos>", "--special", "<a>", "-o", "-"]
    content = json.loads(run_command(arguments, input=JSONL).stdout)
    assert [token["content"] for token in content["added_tokens"]] == ["<eos>", "<a>"]


def test_count_texts(run_command) -> None:
    counted = run_command(
        ["neox-tokenize", "count", "--json", "-q", "-t", "bytes", "--append-eod"], input=JSONL + b'{"text": ""}'
    )
    assert json.loads(counted.stdout) == {
        "documents": 50,
        "text_bytes": 540,
        "tokens": 590,
        "longest_document": 12,
        "skipped": {"empty document": 1},
    }


def test_count_up_to_a_limit(run_command) -> None:
    counted = run_command(["neox-tokenize", "count", "--json", "-t", "bytes", "--limit", "3"], input=JSONL)
    assert json.loads(counted.stdout) == {
        "documents": 3,
        "text_bytes": 30,
        "tokens": 30,
        "longest_document": 10,
        "skipped": {},
    }


def test_count_a_directory(run_command, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    counted = run_command(["neox-tokenize", "count", "--json", "-t", "bytes", str(tmp_path)])
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)["documents"] == 100


def test_options_that_do_nothing_with_a_stream_are_refused(run_command, tmp_path: Path) -> None:
    stream = run_command(["neox-tokenize", "-t", "bytes"], input=JSONL).stdout
    for options in (["--limit", "3"], ["--append-eod"], ["-t", "bytes"]):
        done = run_command(["neox-tokenize", "count", *options], input=stream)
        assert done.returncode == 2, options
        assert b"does nothing with a token stream" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--on-error", "ignore"],
        ["--on-error", "quarantine="],
        ["--errors", "ignore"],
        ["--compat", "megatron"],
        ["--format", "xml"],
        ["--max-doc-bytes", "much"],
        ["--workers", "0"],
        ["--engine", "fastest"],
        ["--engine", "gigatoken"],
        ["--eod", "<nothing>"],
        ["--mask-before", "300"],
        ["--only-last"],
        ["--binary-reward"],
        ["--chat", "--only-last", "--no-mask"],
        ["--chat", "--for-rm", "--only-last"],
        ["--chat", "--append-eod"],
        ["--chat", "--allow-special"],
        ["--compat", "neox", "--format", "text"],
        ["--decode", "--tokenizer", "bytes"],
        ["--dtype", "uint16", "--mask-before", "1"],
    ],
)
def test_wrong_options_are_usage_errors(run_command, arguments: list[str]) -> None:
    done = run_command(["neox-tokenize", *arguments], input=JSONL)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.decode().strip().splitlines()) <= 2


@pytest.mark.parametrize(
    "name", [b"with space.jsonl", b"new\nline.jsonl", b"not-utf8-\xff.jsonl", b"x" * 249 + b".jsonl"]
)
def test_odd_names(tmp_path: Path, name: bytes) -> None:  # D-07
    file = os.path.join(os.fsencode(tmp_path), name)
    with open(file, "wb") as sink:
        sink.write(JSONL + b"{broken")
    command = [*COMMAND, "--on-error", f"quarantine={tmp_path}/bad", "-o", tmp_path / "o", file]
    done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "LC_ALL": "C"}, check=False)
    assert done.returncode == 0, done.stderr
    assert ":51" in json.loads((tmp_path / "bad").read_bytes())["where"]
    counted = subprocess.run([*COMMAND, "count", "--json", tmp_path / "o"], capture_output=True, timeout=60, check=True)
    assert json.loads(counted.stdout)["skipped"] == {"broken JSON": 1}


@pytest.mark.slow
def test_many_small_documents_in_flat_memory(tmp_path: Path) -> None:  # L-01
    """10 million documents of 20 tokens."""
    producer = subprocess.Popen(
        [sys.executable, "-c", "import sys\nline = b'{\"text\": \"%s\"}\\n' % (b'twenty bytes of text' )\n"
         "for _ in range(1000): sys.stdout.buffer.write(line * 10000)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    command = measured([*COMMAND, "-j", "2", "-t", "bytes"], tmp_path / "peak")
    started = time.monotonic()
    done = subprocess.run(
        command, stdin=producer.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=280, check=False
    )
    megabytes = int((tmp_path / "peak").read_text()) >> 20
    print(f"L-01: 10 M documents in {time.monotonic() - started:.0f} s, {megabytes} MB; {done.stderr.decode().strip()}")
    assert producer.wait() == 0
    assert done.returncode == 0
    assert megabytes < 600
    assert b"10,000,000 documents" in done.stderr
