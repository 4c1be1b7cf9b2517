# SPDX-License-Identifier: Apache-2.0
"""Unix behaviour of the data tools and, where it costs little, of all commands: descriptors, signals, paths, homes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., subprocess.CompletedProcess[bytes]]
ROUND = "neox-tokenize docs.jsonl | neox-shard && neox-shard cat dataset | neox-tokenize --decode"


def test_closed_stdin_and_missing_files(shell: Shell) -> None:
    for line in ("neox-tokenize <&-", "neox-shard <&-", "neox-tokenize gone.jsonl", "neox-shard gone"):
        run = shell(line)
        assert run.returncode == 66, (line, run.stderr)
        assert len(run.stderr.strip().splitlines()) <= 2, run.stderr


@pytest.mark.parametrize("command", ["neox-tokenize", "neox-shard"])
def test_directory_on_stdin(command: str, shell: Shell, work: Path) -> None:
    """66 where Python lets us say it; CPython 3.11 ends by itself, with 1, before a line of ours runs."""
    run = shell(f"{command} < .")
    assert run.returncode == 66 or (run.returncode == 1 and b"<stdin> is a directory" in run.stderr), run.stderr
    assert list(work.iterdir()) == []


def test_terminal_on_stdin_is_told_what_to_do(shell: Shell) -> None:
    """`script` gives the command a terminal; nothing else is given, so it must not wait for a person to type."""
    if not shutil.which("script"):
        pytest.skip("no script(1) here to make a terminal")
    run = shell("script -qec 'neox-tokenize -q > out' /dev/null < /dev/null", timeout=20)
    assert run.returncode == 2, run.stdout
    assert b"stdin is a terminal" in run.stdout


def test_binary_is_refused_on_a_terminal(shell: Shell, documents: Path) -> None:
    if not shutil.which("script"):
        pytest.skip("no script(1) here to make a terminal")
    run = shell("script -qec 'neox-tokenize docs.jsonl' /dev/null < /dev/null", timeout=20)
    assert run.returncode == 2, run.stdout
    assert b"terminal" in run.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_74(shell: Shell, documents: Path) -> None:
    assert shell("neox-tokenize docs.jsonl | neox-shard").returncode == 0
    lines = (
        "neox-tokenize docs.jsonl",
        "neox-shard cat dataset",
        "neox-shard info dataset --json",
        "neox-tokenize docs.jsonl | neox-tokenize --decode",
    )
    for line in lines:
        run = shell(f"{line} > /dev/full")
        assert run.returncode == 74, (line, run.returncode, run.stderr)
        assert b"Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["neox-tokenize", "neox-shard"])
def test_interrupt_leaves_nothing(command: str, shell: Shell, documents: Path, environment: dict[str, str]) -> None:
    """SIGINT in the middle of the work: 130 within two seconds, no traceback, no unfinished file."""
    folder: Path = shell.cwd  # type: ignore[attr-defined]
    assert shell("neox-tokenize docs.jsonl -q > s").returncode == 0
    beginning = documents.read_bytes() if command == "neox-tokenize" else (folder / "s").read_bytes()[:-200]
    before = set(folder.iterdir())
    arguments = ["-o", "out"]
    process = subprocess.Popen(
        [command, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folder
    )
    assert process.stdin is not None
    process.stdin.write(beginning)
    process.stdin.flush()
    time.sleep(2.0)
    assert process.poll() is None, process.stderr
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 130, complaint
    assert time.monotonic() - started < 2
    assert b"Traceback" not in complaint
    assert set(folder.iterdir()) == before


def test_no_home_no_language_no_terminal(shell: Shell, documents: Path) -> None:
    run = shell(f"set -o pipefail; unset HOME LANG LC_ALL; export LC_ALL=C TERM=dumb; {ROUND}")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 300


def test_read_only_home(shell: Shell, documents: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    run = shell(f"set -o pipefail; {ROUND}", env={"HOME": str(home)})
    assert run.returncode == 0, run.stderr
    assert list(home.iterdir()) == []


def test_non_ascii_text_in_the_c_locale(shell: Shell, work: Path) -> None:
    (work / "docs.jsonl").write_text(json.dumps({"text": "naïve 雪 🜁"}, ensure_ascii=False) + "\n")
    run = shell(f"set -o pipefail; export LC_ALL=C PYTHONUTF8=0; {ROUND}")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["text"] == "naïve 雪 🜁"


@pytest.mark.parametrize(
    "name",
    [b"with space", b"new\nline", b"not utf-8 \xff\xfe", b"-dash", b"a" * 240, "雪".encode()],
    ids=["space", "newline", "bytes", "dash", "long", "unicode"],
)
def test_odd_paths(name: bytes, shell: Shell, documents: Path, environment: dict[str, str]) -> None:
    folder = os.fsencode(shell.cwd)  # type: ignore[attr-defined]
    source, prefix = os.path.join(folder, name + b".jsonl"), os.path.join(folder, name)
    shutil.copy(documents, source)

    def run(*arguments: bytes | str, **more: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(list(arguments), capture_output=True, env=environment, timeout=60, check=False, **more)  # type: ignore[call-overload, no-any-return]

    tokenized = run("neox-tokenize", source)
    assert tokenized.returncode == 0, tokenized.stderr
    packed = run("neox-shard", "pack", "-o", prefix, input=tokenized.stdout)
    assert packed.returncode == 0, packed.stderr
    info = run("neox-shard", "info", prefix, "--json")
    assert info.returncode == 0, info.stderr
    json.loads(info.stdout)
    decoded = run("neox-tokenize", "--decode", input=run("neox-shard", "cat", prefix).stdout)
    assert len(decoded.stdout.splitlines()) == 300, decoded.stderr


def test_name_too_long_is_told(shell: Shell, documents: Path) -> None:
    run = shell(f"neox-tokenize docs.jsonl -q | neox-shard -o {'a' * 255}; echo ${{PIPESTATUS[1]}}")
    assert run.stdout.split() in ([b"2"], [b"73"]), run.stderr
    assert b"too long" in run.stderr


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode,
    reason="unshare -rn does not work here",
)
def test_without_network(shell: Shell, documents: Path) -> None:
    run = shell(f"unshare -rn bash -c 'set -o pipefail; {ROUND}'")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 300


def test_data_on_stdout_talk_on_stderr(shell: Shell, documents: Path) -> None:
    run = shell("neox-tokenize docs.jsonl | neox-shard --json")
    assert run.returncode == 0
    assert json.loads(run.stdout.splitlines()[-1])["dataset"]["documents"] == 300
    run = shell("neox-shard info dataset")
    assert run.returncode == 0
    assert b"300" in run.stdout
    assert run.stderr == b""
    run = shell("neox-tokenize docs.jsonl -q 2>&1 >/dev/null")
    assert run.stdout == b"" or run.stdout.count(b"\n") == 1  # quiet: at most the default it took


@pytest.mark.parametrize(
    "command", ["neox-tokenize", "neox-shard", "neox-train", "neox-eval", "neox-convert", "neox-gen"]
)
def test_debug_shows_where(command: str, shell: Shell) -> None:
    """One line without --debug, a traceback with it."""
    bad = {"neox-tokenize": "gone.jsonl", "neox-shard": "gone", "neox-train": "gone.yml", "neox-eval": "gone -t x.yaml"}
    line = f"{command} {bad.get(command, 'gone' if command == 'neox-gen' else 'to-hf gone out')}"
    plain, debug = shell(f"{line} < /dev/null"), shell(f"{line} --debug < /dev/null")
    assert plain.returncode == debug.returncode
    assert plain.returncode in (2, 66), plain.stderr
    last = plain.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{command}: error: ".encode())
    assert b"gone" in last or command == "neox-eval"
    assert b"Traceback" not in plain.stderr
    assert b"Traceback" in debug.stderr
