# SPDX-License-Identifier: Apache-2.0
"""neox-gen as its users run it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest


def test_lines_in_jsonl_out_in_order(gen: Any, records: Any) -> None:
    result = gen(input="hello\n\n  caf\u00e9 \nlast".encode())
    made = records(result)
    assert [record["context"] for record in made] == ["hello", "caf\u00e9", "last"]
    fields = ["context", "text", "length", "finished", "message", "duration_seconds", "reason"]
    assert [list(record) for record in made] == [fields] * 3
    assert all(record["length"] <= 12 for record in made)  # the checkpoint's own maximum_tokens
    assert b"3 completions" in result.stderr


def test_jsonl_passes_other_keys_on(gen: Any, records: Any) -> None:
    lines = b'{"id": 7, "prompt": "hello", "text": "mine"}\n\n{"prompt": [106, 103], "n": [1]}\n{"context": ""}\n'
    made = records(gen("-m", "4", "--ids", input=lines))
    assert [record["context"] for record in made] == ["hello", "he", ""]
    assert made[0]["id"] == 7
    assert made[1]["n"] == [1]
    assert made[0]["text"] != "mine"
    assert [len(record["tokens"]) for record in made] == [record["length"] for record in made]


def test_greedy_does_not_depend_on_batch_guesses_or_order(gen: Any, records: Any) -> None:
    prompts = [b"hello", b"a much longer prompt than that", b"x", b"ab ab ab"]
    texts = {}
    for options in ([], ["-t", "0", "--seed", "9"], ["-b", "1"], ["-b", "1", "--guess", "3"]):
        made = records(gen("-m", "30", *options, input=b"\n".join(prompts)))
        texts[str(options)] = [record["text"] for record in made]
    backwards = records(gen("-m", "30", input=b"\n".join(prompts[::-1])))
    texts["backwards"] = [record["text"] for record in backwards][::-1]
    assert len(set(map(tuple, texts.values()))) == 1


def test_seeds_and_copies(gen: Any, records: Any) -> None:
    options = ("-t", "1", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--num-return", "2", "-m", "8")
    first, again, other = (
        [record["text"] for record in records(gen(*options, "--seed", seed, input=b"a\nb\n"))] for seed in "112"
    )
    assert first == again != other
    assert len(set(first)) == 4


def test_texts_from_nothing(gen: Any, records: Any) -> None:
    made = records(gen("-n", "3", "-t", "1", "-m", "5"))
    assert [record["context"] for record in made] == [""] * 3
    assert len({record["text"] for record in made}) == 3


def test_stop_strings_logprobs_and_prompt_end(gen: Any, records: Any) -> None:
    whole = records(gen("-m", "20", "--logprobs", "2", "--prompt-end", "@@", input=b"hello\nyou@@ and @@ \n"))
    assert [record["context"] for record in whole] == ["hello\nyou", "and"]
    record = whole[0]
    assert len(record["token_logprobs"]) == len(record["top_logprobs"]) == record["length"] == 20
    for token, logprob, best in zip(record["tokens"], record["token_logprobs"], record["top_logprobs"], strict=True):
        assert best[0] == [token, pytest.approx(logprob)]  # greedy: the best is what was taken
    letter = next(c for c in record["text"] if c.isascii() and c.isalnum())
    cut = records(gen("-m", "20", "--stop", letter, "--stop", r"\n\n", "--prompt-end", "@@", input=b"hello\nyou"))[0]
    assert cut["text"] == record["text"].partition(letter)[0]
    assert (cut["finished"], cut["reason"]) == (True, "stop")


def test_text_alone(gen: Any, records: Any) -> None:
    made = records(gen("-m", "9", input=b"hello\nb\n"))
    result = gen("-m", "9", "--text", "-q", input=b"hello\nb\n")
    assert result.stdout.decode() == "".join(record["text"] + "\n" for record in made)
    assert result.stderr == b""


def test_prompts_too_long_fail_or_are_skipped(gen: Any, records: Any) -> None:
    lines = b"ok\n" + b"x" * 200 + b"\nalso ok\n"
    failed = gen(input=lines)
    assert failed.returncode == 65
    assert b"line 2: the prompt has 200 tokens, the model's context 128" in failed.stderr
    made = records(gen("--on-error", "skip", input=lines))
    assert [record["reason"] == "error" for record in made] == [False, True, False]
    assert "200 tokens" in made[1]["message"]


def test_bad_prompts_are_one_line_and_65(gen: Any) -> None:
    for lines, message in [(b"ok\n\xff\n", b"stdin: line 2: not UTF-8"), (b'{"prompt": [5, 999]}\n', b"id 999")]:
        result = gen(input=lines)
        assert result.returncode == 65
        assert message in result.stderr
        assert result.stderr.count(b"\n") == 1


def test_half_a_character_fails_or_is_skipped(gen: Any, records: Any) -> None:
    """JSON can say a lone surrogate; no tokenizer can encode it."""
    lines = b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n'
    failed = gen(input=lines)
    assert failed.returncode == 65, failed.stderr
    assert b"line 2: the text holds U+D83D" in failed.stderr
    made = records(gen("--on-error", "skip", input=lines))
    assert [record["reason"] == "error" for record in made] == [False, True]
    line = b'{"context": "a", "continuation": "\\udc00"}\n'
    assert "U+DC00" in records(gen("logprobs", "--on-error", "skip", input=line))[0]["message"]


@pytest.mark.parametrize(
    "args",
    [
        ("-n", "2", "prompts.txt"),
        ("--text", "--ids"),
        ("--top-p", "1.5"),
        ("--prompt-end", ""),
        ("-t", "1e-30"),
        ("--repetition-penalty", "nan"),
        ("--device", "abacus"),
        ("--device", "cuda:99"),
    ],
)
def test_usage_errors(args: tuple[str, ...], gen: Any) -> None:
    result = gen(*args, input=b"a\n")
    assert result.returncode == 2, result.stderr
    assert result.stdout == b""


def test_missing_things(run_command: Any, gen: Any, tmp_path: Path) -> None:
    assert run_command(["neox-gen", tmp_path / "none"], input=b"a\n").returncode == 66
    assert gen(str(tmp_path / "no prompts")).returncode == 66
    assert run_command(["neox-gen", tmp_path], input=b"a\n").returncode == 66


def test_no_prompts_no_output(gen: Any) -> None:
    result = gen(input=b"")
    assert (result.returncode, result.stdout) == (0, b"")


def test_zero_tokens(gen: Any, records: Any) -> None:
    record = records(gen("-m", "0", input=b"a\n"))[0]
    assert (record["text"], record["length"], record["finished"]) == ("", 0, False)


def test_reader_that_goes_away(run_folder: Path, tmp_path: Path) -> None:
    """`neox-gen | head -1` ends at once and silently, although there are prompts for an hour."""
    prompts = tmp_path / "prompts"
    prompts.write_text("hello\n" * 100_000)
    command = f"{sys.executable} -m neox_gen {run_folder} -q -b 2 -m 60 < {prompts} | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
    assert result.stderr == b""
    assert result.stdout.splitlines()[-1] == b"141"
    result = subprocess.run(
        ["bash", "-c", f"echo hi | {sys.executable} -m neox_gen {run_folder} -q | head -1"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.startswith(b'{"context": "hi"')
    assert result.stderr == b""


def test_a_live_pipe_is_answered(run_folder: Path) -> None:
    """A prompt is answered before the next one is written: neox-gen as a co-process."""
    command = [sys.executable, "-m", "neox_gen", str(run_folder), "-q", "-m", "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for word in (b"one", b"two"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            assert b'"context": "' + word in process.stdout.readline()
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def test_interrupt(run_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("hello\n" * 100_000)
    command = [sys.executable, "-m", "neox_gen", str(run_folder), str(prompts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_logprobs_verb(gen: Any, records: Any) -> None:
    lines = b'{"context": "hello", "continuation": " you", "id": 1}\n{"prompt": "", "completion": "ab"}\n'
    first, second = records(gen("logprobs", input=lines))
    assert first["id"] == 1
    assert first["logprob"] == pytest.approx(sum(first["token_logprobs"]))
    assert (first["length"], second["length"]) == (4, 2)
    made = records(gen("-m", "1", input="\n".join(ascii_letters).encode()))
    first = next(one for one in made if one["length"] and one["text"].isascii() and one["text"].isprintable())
    other = chr(ord(first["text"]) ^ 1)
    asked = [{"context": first["context"], "continuation": text} for text in (first["text"], other)]
    scored = records(gen("logprobs", input="\n".join(map(json.dumps, asked)).encode()))
    assert [score["is_greedy"] for score in scored] == [True, False]
    bad = gen("logprobs", input=b'{"context": "a"}\n')
    assert bad.returncode == 65
    assert b"line 1: no `context` and `continuation`" in bad.stderr


def test_talk_from_a_pipe_keeps_history(gen: Any, records: Any) -> None:
    result = gen("--interactive", "-m", "6", "-q", input=b"hello\n more\n/reset\nhello\n")
    assert result.returncode == 0, result.stderr
    plain = records(gen("-m", "6", input=b"hello"))[0]["text"]
    lines = result.stdout.decode()
    assert lines.startswith(plain + "\n")
    assert lines.endswith(plain + "\n")


def test_talk_from_a_pipe_that_is_no_text(gen: Any, run_folder: Path) -> None:
    result = gen("--interactive", "-q", input=b"hello\r\n\xff\n")
    assert result.returncode == 65
    assert b"stdin: line 2: not UTF-8" in result.stderr
    assert result.stdout
    command = f"{sys.executable} -m neox_gen {run_folder} -i <&-"
    closed = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert (closed.returncode, closed.stdout) == (66, b"")
    assert b"stdin is closed" in closed.stderr


def test_talk_on_a_terminal(run_folder: Path) -> None:
    """The prompt and help go to the terminal's stderr, answers to stdout, Ctrl-D ends."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "neox_gen", str(run_folder), "-i", "-m", "4"]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(terminal)
        os.write(controller, b"hello\n")
        answer = process.stdout.readline()
        os.write(controller, b"\x04")
        _, errors = process.communicate(timeout=30)
        os.close(controller)
    assert process.returncode == 0, errors
    assert answer.strip()
    assert b"Ctrl-D ends" in errors


@pytest.mark.parametrize("options", [[], ["--jsonl"]])
def test_a_terminal_gets_text_unless_told_otherwise(run_folder: Path, options: list[str]) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "neox_gen", str(run_folder), "-q", "-m", "3", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal) as process:
        os.close(terminal)
        process.communicate(b"hello\n", timeout=60)
    shown = os.read(controller, 1 << 16)
    os.close(controller)
    assert process.returncode == 0
    assert shown.startswith(b'{"context": "hello"') == bool(options)
    assert shown.endswith(b"\n")


def test_terminal_without_prompts_is_a_usage_error(run_folder: Path) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "neox_gen", str(run_folder)]
    result = subprocess.run(command, stdin=terminal, capture_output=True, timeout=60, check=False)
    os.close(terminal)
    os.close(controller)
    assert result.returncode == 2
    assert b"stdin is a terminal" in result.stderr
