# SPDX-License-Identifier: Apache-2.0
"""The command line of `neox-eval`: what goes where, what is refused, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_results_samples_and_a_second_run(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    """JSON and nothing else on stdout, the table on stderr, the files whole; the same line again costs nothing."""
    command = ["neox-eval", hf_models["pythia"], "--tasks", f"{task_files['choice']},{task_files['greedy']}"]
    command += ["-o", tmp_path / "out", "-s", "--limit", "4", "--bootstrap-iters", "10"]
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    run = run_command(command, env={"HOME": str(home), "LC_ALL": "C", "TMPDIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    (results,) = lines(run.stdout)
    assert set(results["results"]) == {"choice", "greedy"}
    assert results["n-samples"]["choice"] == {"original": 16, "effective": 4}
    assert results["config"]["model_args"] == {"checkpoint": str(hf_models["pythia"])}
    assert b"|choice|" in run.stderr
    assert b"acc_norm" in run.stderr
    folder = tmp_path / "out" / "pythia"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "samples_choice.jsonl",
        "samples_greedy.jsonl",
    }
    assert json.loads((folder / "results.json").read_text()) == results
    assert len((folder / "samples_choice.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out", "home"}, "a temporary directory was left"
    assert list(home.iterdir()) == []

    again = run_command(command)
    assert (again.returncode, again.stdout) == (0, run.stdout)
    assert b"already evaluated" in again.stderr
    other = run_command([*command, "--num-fewshot", "1"])
    assert other.returncode == 73, other.stderr
    assert b"--force" in other.stderr


def test_checkpoints_from_stdin(hf_models: dict[str, Path], task_files: dict[str, Path], run_command: Any) -> None:
    """One line of results a line of input, as soon as it is there; an unknown one ends the command."""
    jsonl = task_files["choice"].with_suffix(".jsonl")
    data = f"{hf_models['pythia']}\n\n{hf_models['llama']}\n/nowhere\n".encode()
    run = run_command(["neox-eval", "-", "-t", jsonl, "-L", "3", "--bootstrap-iters", "0", "-q"], input=data)
    assert run.returncode == 66, run.stderr
    assert [result["neox"]["checkpoint"] for result in lines(run.stdout)] == [
        str(hf_models["pythia"]),
        str(hf_models["llama"]),
    ]
    assert b"neox-eval: error: /nowhere" in run.stderr


@pytest.mark.slow
def test_killed_and_run_again(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    """SIGKILL in the middle: the second run asks only what is not answered, and its results are the same."""
    documents = (task_files["texts"].parent / "texts.jsonl").read_text() * 40
    (tmp_path / "many.jsonl").write_text(documents)
    common = ["-t", str(tmp_path / "many.jsonl"), "-b", "1", "-q"]
    clean = run_command(["neox-eval", hf_models["pythia"], *common, "-o", tmp_path / "clean.json"])
    assert clean.returncode == 0, clean.stderr
    command = [sys.executable, "-m", "neox_eval", str(hf_models["pythia"]), *common, "-o", str(tmp_path / "r.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "r.answers.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait(timeout=30)
    assert not (tmp_path / "r.json").exists()
    with journal.open("ab") as file:
        file.write(b'{"q": "cut off')
    again = subprocess.run([c for c in command if c != "-q"], capture_output=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert b"going on behind" in again.stderr
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("clean.json", "r.json"))
    assert first["results"] == second["results"]
    assert not journal.exists()


def test_interrupt(hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path) -> None:
    """SIGINT while it waits for checkpoints: 130 at once, nothing left behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "neox_eval", "-", "-t", str(task_files["choice"])],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:  # its temporary directory: it is at work
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130, complaint
    assert b"Traceback" not in complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no checkpoint given"),
        (["x"], 2, "no tasks given"),
        (["x", "-t", "t.yaml", "-s"], 2, "--output-path"),
        (["x", "-t", "t.yaml", "-L", "2", "--samples", "{}"], 2, "exclude"),
        (["x", "-t", "t.yaml", "-L", "0"], 2, "--limit 0"),
        (["x", "-t", "t.yaml", "-L", "nan"], 2, "--limit nan"),
        (["x", "-t", "t.yaml", "--seed", "1,2"], 2, "--seed 1,2"),
        (["x", "-t", "t.yaml", "--samples", "[1]"], 2, "--samples"),
        (["x", "-t", "gone/t.yaml"], 66, "gone/t.yaml: no such task file"),
        (["x", "-t", "odd.jsonl"], 65, "odd.jsonl: line 1 has the fields ['a']"),
        (["x", "-t", "bad.yaml"], 65, "bad.yaml: not a task file"),
    ],
)
def test_errors_before_anything_is_loaded(
    arguments: list[str], code: int, words: str, tmp_path: Path, run_command: Any
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bad.yaml").write_text("just: a\nmapping: here\n")
    run = run_command(["neox-eval", *arguments], cwd=tmp_path)
    assert run.returncode == code, run.stderr
    assert words in run.stderr.decode()
    assert run.stdout == b""
    assert b"Traceback" not in run.stderr


def test_errors_of_the_evaluation(hf_models: dict[str, Path], tmp_path: Path, run_command: Any) -> None:
    (tmp_path / "t.yaml").write_text(
        json.dumps({"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}},
                    "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
                    "doc_to_target": "{{text}}"})
    )  # fmt: skip
    run = run_command(["neox-eval", hf_models["pythia"], "-t", "t.yaml"], cwd=tmp_path)
    assert run.returncode == 66, run.stderr
    assert b"gone.jsonl" in run.stderr
    (tmp_path / "empty").mkdir()
    run = run_command(["neox-eval", tmp_path / "empty", "-t", "t.yaml"], cwd=tmp_path)
    assert run.returncode == 66, run.stderr


@pytest.mark.slow
def test_harness_command_line(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    """`neox-eval harness run --model neox` is `lm_eval run --model neox`, options and output its own."""
    arguments = [
        "--model",
        "neox",
        "--model_args",
        f"checkpoint={hf_models['pythia']}",
        "--tasks",
        task_files["choice"],
    ]
    run = run_command(
        ["neox-eval", "harness", "run", *arguments, "--limit", "2", "--output_path", tmp_path / "o"],
        cwd=task_files["choice"].parent,
        env={"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    assert b"|choice|" in run.stdout
    assert list((tmp_path / "o").rglob("results_*.json"))


@pytest.mark.slow
def test_two_processes_share_the_documents(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path
) -> None:
    """torchrun with two processes: the same results, printed once."""
    tasks = ",".join(str(task_files[name]) for name in ("choice", "texts", "write"))
    arguments = [str(hf_models["pythia"]), "-t", tasks, "-q", "--bootstrap-iters", "0", "-s"]
    results = []
    for processes in (1, 2):
        out = ["-o", str(tmp_path / f"{processes}.json")]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "neox_eval"]
        run = subprocess.run(
            [sys.executable, *launcher, *arguments, *out], capture_output=True, timeout=240, check=False
        )
        assert run.returncode == 0, run.stderr
        (line,) = lines(run.stdout)
        results.append(line["results"])
        samples = (tmp_path / f"{processes}.samples_choice.jsonl").read_text().splitlines()
        assert sorted(json.loads(sample)["doc_id"] for sample in samples) == list(range(16))
    assert results[0].keys() == results[1].keys()
    for task, metrics in results[0].items():
        for name, value in metrics.items():
            assert results[1][task][name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert {path.name for path in tmp_path.iterdir() if "answers" in path.name} == set()


@pytest.mark.slow
def test_two_processes_hold_one_model(hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path) -> None:
    """Every kind of question, some answered by an earlier run, and perplexity: what one process says."""
    folder = hf_models["llama"]
    tasks = ["-t", ",".join(map(str, task_files.values())), "--bootstrap-iters", "0"]

    def run(processes: int, *words: str) -> tuple[dict[str, Any], bytes]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "neox_eval"]
        words = (*words, "--tensor-parallel", str(processes))
        done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        (line,) = lines(done.stdout)
        return line, done.stderr

    whole, _ = run(1, str(folder), *tasks)
    answer_one_task(folder, task_files["choice"], tmp_path / "2.answers.jsonl")
    shared, said = run(2, str(folder), *tasks, "-o", str(tmp_path / "2.json"))
    assert said.count(b"going on behind 78 answers") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["2.json"]
    for task, metrics in whole["results"].items():
        for name, value in metrics.items():
            wanted = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert shared["results"][task][name] == wanted, name
    words = ("perplexity", str(folder), str(task_files["texts"].with_suffix(".jsonl")), "-q")
    assert run(2, *words)[0]["loss"] == pytest.approx(run(1, *words)[0]["loss"], rel=1e-5)


def answer_one_task(folder: Path, task: Path, journal: Path) -> None:
    """What an evaluation killed behind its first task leaves."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from neox_eval.answers import AnswerLog
    from neox_eval.lm import NeoxLM
    from neox_eval.request import Request
    from neox_eval.tasks import read_specs

    lm = NeoxLM(folder, quiet=True)
    lm.answers = AnswerLog(journal, model=f"{lm.identity} {lm.max_length} {lm.model.dtype} {Request().seeds[2]}")
    manager = TaskManager(include_defaults=False)
    simple_evaluate(model=lm, tasks=read_specs([str(task)])[0], task_manager=manager, bootstrap_iters=0)
    lm.answers.close()


def test_processes_that_cannot_be_grouped_are_refused(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path: Path, run_command: Any
) -> None:
    run = run_command(["neox-eval", hf_models["pythia"], "-t", task_files["choice"], "--tensor-parallel", "2"])
    assert run.returncode == 2
    assert b"1 processes cannot be cut into groups of 2" in run.stderr
