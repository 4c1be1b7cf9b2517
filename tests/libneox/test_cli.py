# SPDX-License-Identifier: Apache-2.0
"""The manners of a command, on a small command of the tests' own, each in a process of its own."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from libneox.cli import flat

COMMAND = """
    from __future__ import annotations
    import os, sys, time
    from typing import Annotated, BinaryIO
    import typer
    from libneox import cli, errors, files

    def main(
        what: Annotated[str, typer.Argument(help="What to do.")],
        out: Annotated[str, typer.Option("--out")] = "",
        *,
        stdout: BinaryIO,
    ) -> None:
        '''Do what the argument says.'''
        if what == "print":
            print("a library's chatter")
            os.system("echo chatter of a child")
            stdout.write(b"data\\n")
        elif what == "flood":
            while True:
                stdout.write(b"data\\n" * 1000)
        elif what == "write":
            with files.atomic_write(out) as file:
                file.write(b"half")
                file.flush()
                print("writing", file=sys.stderr, flush=True)
                time.sleep(60)
        elif what == "chatter":
            with files.atomic_write(out) as file:
                file.write(b"half")
                os.system("echo chatter of a child")
        elif what == "memory":
            raise MemoryError
        elif what == "memory of torch":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\\nmore")
        elif what == "bug":
            raise ValueError("oh")
        elif what == "full":
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"x")
        elif what == "missing":
            open(os.path.join(out, "missing"))
        else:
            raise getattr(errors, what)("where: what; how to mend it")

    def other(n: int) -> None:
        '''Do something else.'''
        print(n, file=sys.stderr)

    cli.run("libneox", main, {"other": other})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is one small command."""
    path = tmp_path_factory.mktemp("command") / "command.py"
    path.write_text(textwrap.dedent(COMMAND))
    return path


def run(script: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=60, check=False)


def test_only_data_reaches_stdout(script: Path) -> None:
    done = run(script, "print")
    assert (done.returncode, done.stdout) == (0, "data\n")
    assert "library's chatter" in done.stderr
    assert "chatter of a child" in done.stderr


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("UsageError", 2),
        ("DataError", 65),
        ("InputMissing", 66),
        ("PeerLost", 69),
        ("OutOfMemory", 71),
        ("OutputExists", 73),
        ("StorageError", 74),
        ("StoppedEarly", 75),
        ("UnsafeInput", 77),
        ("NonFiniteLoss", 80),
        ("IntegrityError", 81),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(script: Path, name: str, code: int) -> None:
    done = run(script, name)
    assert done.returncode == code
    assert done.stderr == "libneox: error: where: what; how to mend it\n"
    assert done.stdout == ""


def test_other_failures(script: Path, tmp_path: Path) -> None:
    assert run(script, "memory").returncode == 71
    torchs = run(script, "memory of torch")
    assert (torchs.returncode, torchs.stderr.count("\n")) == (71, 1)
    assert run(script, "full").returncode == 74
    missing = run(script, "missing", "--out", str(tmp_path))
    assert missing.returncode == 66
    assert str(tmp_path / "missing") in missing.stderr
    bug = run(script, "bug")
    assert bug.returncode == 1
    assert bug.stderr.count("\n") == 1
    assert "Traceback" in run(script, "bug", "--debug").stderr


def test_help_version_and_usage(script: Path) -> None:
    shown = run(script, "--help")
    assert shown.returncode == 0
    assert "Do something else." in shown.stdout
    assert "exit codes:" in shown.stdout
    assert shown.stderr == ""
    version = run(script, "--version")
    assert version.returncode == 0
    assert version.stdout.startswith("libneox ")
    wrong = run(script, "print", "--no-such-option")
    assert wrong.returncode == 2
    assert "--no-such-option" in wrong.stderr
    assert wrong.stdout == ""
    assert run(script, "other", "x").returncode == 2
    assert run(script, "other", "5").stderr == "5\n"


def test_a_reader_that_goes_away_is_silent(script: Path) -> None:
    with subprocess.Popen([sys.executable, script, "flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(100)
        process.stdout.close()
        assert process.wait(timeout=30) == -signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_temporary_file(script: Path, tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, script, "write", "--out", str(tmp_path / "file")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"writing\n"
        assert [path.name for path in tmp_path.iterdir()] == [f"file.tmp-{process.pid}"]
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_closed_and_full_stdout(script: Path) -> None:
    line = f"{sys.executable} {script} print"
    assert (
        subprocess.run(["bash", "-c", f"{line} >/dev/full"], capture_output=True, timeout=60, check=False).returncode
        == 74
    )
    closed = subprocess.run(["bash", "-c", f"{line} >&-"], capture_output=True, text=True, timeout=60, check=False)
    assert closed.returncode == 74
    assert "stdout" in closed.stderr


@dataclass(frozen=True)
class Shared:
    """Options of several commands."""

    size: Annotated[int, typer.Option(min=1)] = 3
    name: str | None = None


def test_options_that_commands_share() -> None:
    seen = []

    def command(first: str, last: bool = False, *, shared: Shared) -> None:
        seen.append((first, last, shared))

    parameters = inspect.signature(flat(command)).parameters
    assert list(parameters) == ["first", "last", "size", "name"]
    assert parameters["size"].annotation == Annotated[int, parameters["size"].annotation.__metadata__[0]]
    assert parameters["first"].default is inspect.Parameter.empty
    flat(command)(first="a", size=5)
    flat(command)(first="b", last=True, name="n")
    assert seen == [("a", False, Shared(5)), ("b", True, Shared(3, "n"))]


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_a_closed_stderr_is_as_good_as_none(script: Path, tmp_path: Path, closed: str) -> None:
    """Neither is its number given to a file, nor do its lines go to stdout, nor is stdout taken for closed."""
    line = f"{sys.executable} {script}"
    done = subprocess.run(["bash", "-c", f"{line} print {closed}"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"data\n")
    done = subprocess.run(["bash", "-c", f"{line} DataError {closed}"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (65, b"")


def test_a_closed_stdout_does_not_give_its_number_to_a_file(script: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} {script} chatter --out {tmp_path}/file >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b"half"
    assert "chatter of a child" in done.stderr
