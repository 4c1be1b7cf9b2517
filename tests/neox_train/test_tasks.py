# SPDX-License-Identifier: Apache-2.0
"""`eval_tasks`: another process evaluates what was just saved, and its figures come back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Stand = Callable[[str], None]

# In place of neox-eval: answers with what it was asked, the name of the step as a number and who it thinks it is.
ANSWER = """
import json, os, sys
step = int(sys.argv[1].rpartition("_")[2])
assert "RANK" not in os.environ and "MASTER_ADDR" not in os.environ and os.path.isfile(sys.argv[1] + "/manifest.json")
sums = {"alias": "sums", "acc,none": step / 10, "em,strict": 1, "acc_stderr,none": "N/A"}
print(json.dumps({"results": {"sums": sums}, "asked": sys.argv[2:]}))
"""


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_env: dict[str, str]) -> Stand:
    """Put a program in the place of neox-eval."""

    def stand(program: str) -> None:
        folder = tmp_path / "instead" / "neox_eval"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))
        monkeypatch.setitem(command_env, "PYTHONPATH", str(folder.parent))

    return stand


def test_figures_of_each_evaluation(train, config, metrics, evaluator: Stand, tmp_path: Path) -> None:
    evaluator(ANSWER)
    done = train(config(train_iters=5, eval_interval=2, eval_tasks=["sums.jsonl", "x.yaml"]))
    run = tmp_path / "RUN"
    assert done.lines == [str(run / f"step_{step}") for step in (2, 4, 5)]
    tasks = {record["step"]: record["tasks"] for record in metrics(run) if "tasks" in record}
    assert tasks == {
        3: {"step": 2, "sums/acc": 0.2, "sums/em,strict": 1.0},
        5: {"step": 4, "sums/acc": 0.4, "sums/em,strict": 1.0},
    }
    closing = json.loads((run / "run_status.json").read_text())["evaluation"]["tasks"]
    assert (closing["step"], closing["sums/acc"]) == (5, 0.5)
    asked = json.loads((run / "eval_results_step_4.json").read_text())["asked"]
    assert asked[:2] == ["--tasks", "sums.jsonl,x.yaml"]
    assert "step 4: sums/acc 0.4" in done.stderr
    assert not list(run.glob(".eval*"))


def test_results_go_where_the_prefix_says(train, config, evaluator: Stand, tmp_path: Path) -> None:
    evaluator(ANSWER)
    train(config(train_iters=2, eval_tasks=["sums.jsonl"], eval_results_prefix="results/tiny"))
    assert json.loads((tmp_path / "results" / "tiny_eval_results_step_2.json").read_text())["results"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('neox-eval: error: sums.jsonl: No such file')", "neox-eval exits 1: neox-eval: error"),
        ("print('nonsense')", "eval_tasks: step 2: "),
    ],
)
def test_an_evaluation_that_fails_costs_a_warning(
    program: str, message: str, train, config, metrics, evaluator: Stand, tmp_path: Path
) -> None:
    evaluator(program)
    done = train(config(train_iters=3, eval_interval=2, eval_tasks=["sums.jsonl"]))
    assert message in done.stderr
    assert len(metrics(tmp_path / "RUN")) == 3


def test_a_signal_ends_the_evaluation_too(start, config, evaluator: Stand, tmp_path: Path) -> None:
    evaluator("import time, pathlib, os; pathlib.Path('begun').write_text(str(os.getpid())); time.sleep(300)")
    process = start(config(train_iters=5, eval_interval=2, eval_tasks=["sums.jsonl"]))
    deadline = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the evaluation of step 2 was stopped with the run" in errors
    child = Path("/proc") / (tmp_path / "begun").read_text()
    assert not child.exists()
    assert not list((tmp_path / "RUN").glob(".eval*"))


def test_who_waits_shows_that_it_lives(config, evaluator: Stand, tmp_path: Path) -> None:
    """An evaluation may take longer than a step may, which is for ranks that hang."""
    from libneox.config import load_config
    from libneox.parallel.group import Group
    from libneox.parallel.launch import discover
    from neox_train.tasks import Tasks

    evaluator("import sys, time; time.sleep(1); sys.exit('done')")
    marks: list[int] = []
    warnings: list[str] = []
    (tmp_path / "RUN").mkdir()
    group = Group(discover({}), timeout_s=1)
    loaded = load_config([config(eval_tasks=["sums.jsonl"])])
    tasks = Tasks(loaded, tmp_path / "RUN", group, "cpu", asked=lambda: False, mark=marks.append, warn=warnings.append)
    assert tasks.evaluate(7) == {}
    assert len(marks) >= 4
    assert set(marks) == {7}
    assert warnings == ["eval_tasks: step 7: neox-eval exits 1: done; training goes on"]


@pytest.mark.slow
def test_other_ranks_stand_by(train_apart, config, metrics, evaluator: Stand, tmp_path: Path) -> None:
    evaluator("import time; time.sleep(2)\n" + ANSWER)
    train_apart(config(train_iters=3, eval_interval=2, eval_tasks=["sums.jsonl"]), ranks=2)
    assert metrics(tmp_path / "RUN")[-1]["tasks"] == {"step": 2, "sums/acc": 0.2, "sums/em,strict": 1.0}


@pytest.mark.slow
def test_neox_eval_itself(train, config, metrics, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"question": "import sub", "choices": ["process", "zzzzzzz"], "answer": 0}\n')
    train(config(train_iters=2, eval_interval=1, eval_tasks=["sums.jsonl"]))
    assert set(metrics(tmp_path / "RUN")[1]["tasks"]) == {"step", "sums/acc", "sums/acc_norm"}
    results = json.loads((tmp_path / "RUN" / "eval_results_step_2.json").read_text())
    assert results["results"]["sums"]["acc,none"] in (0.0, 1.0)
