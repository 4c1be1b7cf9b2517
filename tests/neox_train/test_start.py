# SPDX-License-Identifier: Apache-2.0
"""Starting a run of several processes: wrong environments, ranks that disagree, clocks that differ, changed configs."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Ranks = Callable[..., list[tuple[int, str, str]]]

# A clock that is off by an hour and a second for each rank, and another day for the last.
SKEWED = """
import os, time
shift = 3601.0 * int(os.environ.get("RANK", 0)) + 86400.0 * (os.environ.get("RANK") == "1")
real, real_ns, local, utc, text = time.time, time.time_ns, time.localtime, time.gmtime, time.strftime
time.time = lambda: real() + shift
time.time_ns = lambda: real_ns() + int(shift * 1e9)
time.localtime = lambda seconds=None: local(time.time() if seconds is None else seconds)
time.gmtime = lambda seconds=None: utc(time.time() if seconds is None else seconds)
time.strftime = lambda form, when=None: text(form, time.localtime() if when is None else when)
"""


@pytest.fixture
def ranks(start, command_env: dict[str, str]) -> Iterator[Ranks]:
    """Start a process for each list of arguments, as a launcher would; (exit code, stdout, stderr) of each."""
    processes: list[subprocess.Popen[str]] = []

    def run(
        arguments: Sequence[Sequence[Any]], env: Mapping[str, str] | None = None, folders: Sequence[Path] = ()
    ) -> list[tuple[int, str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(len(arguments)), "LOCAL_WORLD_SIZE": str(len(arguments))}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank, args in enumerate(arguments):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            place = {"cwd": folders[rank]} if folders else {}
            processes.append(start(*args, env={**command_env, **world, **meeting, **own, **(env or {})}, **place))
        ended = [(process, *process.communicate(timeout=100)) for process in processes]
        return [(process.returncode, out, errors) for process, out, errors in ended]

    yield run
    for process in processes:
        process.kill()


PAIR = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (PAIR, "RANK is not set"),
        (PAIR | {"RANK": "2"}, "rank 2 of 2"),
        (PAIR | {"RANK": "-1"}, "rank -1 of 2"),
        (PAIR | {"RANK": "one"}, "RANK='one' is no number"),
        (PAIR | {"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        (PAIR | {"RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "set MASTER_ADDR"),
        # four samples a step of two each cannot be spread over three
        (PAIR | {"RANK": "0", "WORLD_SIZE": "3"}, "3 data-parallel ranks"),
        (PAIR | {"RANK": "2", "WORLD_SIZE": "3"}, "3 data-parallel ranks"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_environment_ends_at_once(run_command, config, env: dict[str, str], message: str) -> None:
    path = config(train_micro_batch_size_per_gpu=2)
    began = time.monotonic()
    done = run_command(["neox-train", path], env=env)
    assert time.monotonic() - began < 5
    assert done.returncode == 2, done.stderr
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("neox-train: error: ")
    assert message in line


def test_a_world_that_model_parallelism_does_not_divide() -> None:
    from libneox.config import load_config
    from libneox.errors import UsageError

    loaded = load_config(["pythia/14M"], overrides=["model_parallel_size=2", "train_batch_size=4"])
    with pytest.raises(UsageError, match=r"3.*model_parallel_size"):
        loaded.batch_plan(3)


def test_ranks_of_different_configs_name_the_key_and_themselves(ranks: Ranks, config, tmp_path: Path) -> None:
    same = config("0.yml", train_batch_size=6)
    other = config(
        "2.yml",
        train_batch_size=6,
        optimizer={"type": "adam", "params": {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}},
    )
    ended = ranks([[same], [same], [other]])
    for code, out, errors in ended:
        assert (code, out) == (2, ""), errors
        assert len(errors.splitlines()) == 1, errors
        assert "rank 0 and rank 2 differ in optimizer" in errors
    assert not (tmp_path / "RUN").exists()


def test_what_one_rank_misses_ends_all_with_its_code(ranks: Ranks, config, corpus, tmp_path: Path) -> None:
    """The data is there for rank 0 alone, which waits for the other and must not call it lost."""
    (tmp_path / "empty").mkdir()
    path = config(data_path=corpus.name)
    first, second = ranks([[path], [path]], folders=[corpus.parent, tmp_path / "empty"])
    assert (first[0], second[0]) == (66, 66), (first, second)
    assert "neox-train: error: text" in second[2]
    assert "error" not in first[2]
    status = json.loads((tmp_path / "RUN" / "run_status.json").read_text())
    assert (status["state"], status["code"], status["rank"]) == ("failed", 66, 1)


def test_what_the_first_rank_finds_missing_ends_all_with_its_code(ranks: Ranks, config, tmp_path: Path) -> None:
    path = config(load=str(tmp_path / "nothing"), train_micro_batch_size_per_gpu=2)
    first, second = ranks([[path], [path]])
    assert (first[0], second[0]) == (66, 66), (first, second)
    assert "nothing: no such run or checkpoint directory" in first[2]
    assert "failed" not in first[2] + second[2]
    status = json.loads((tmp_path / "RUN" / "run_status.json").read_text())
    assert (status["state"], status["code"], status["rank"]) == ("failed", 66, 0)


def test_clocks_do_not_name_the_run(ranks: Ranks, config, losses, tmp_path: Path) -> None:
    """Processes that start on either side of a second, an hour, a day make one run directory and one step."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(SKEWED)
    path = config(train_iters=2, save=None)
    before = set(tmp_path.iterdir())
    ended = ranks([[path], [path]], env={"PYTHONPATH": str(tmp_path / "clock")})
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [out for _, out, _ in ended] == ["run/step_2\n", ""]
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"run"}
    names = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")}
    assert names == {"step_2", "latest", "metrics.jsonl", "run_status.json"}
    assert len(losses(tmp_path / "run")) == 2


def test_resuming_with_another_learning_rate_is_allowed_and_told(train, config, metrics, tmp_path: Path) -> None:
    train(config(lr_decay_style="constant", warmup=0), "-q")
    done = train(config(lr_decay_style="constant", warmup=0, train_iters=10), "--set", "optimizer.params.lr=0.001")
    (line,) = [line for line in done.stderr.splitlines() if "the learning rate changes from" in line]
    before, after = line.split(" to ")
    assert "0.006" in before
    assert "0.001" in after
    rates = [record["lr"] for record in metrics(tmp_path / "RUN")]
    assert rates == [0.006] * 8 + [0.001] * 2


def test_resuming_with_another_width_is_refused_on_every_rank(ranks: Ranks, train, config, tmp_path: Path) -> None:
    train(config(train_iters=1), "-q")
    kept = {p: p.read_bytes() for p in (tmp_path / "RUN" / "step_1").iterdir()}
    wider = config("wider.yml", train_iters=2, hidden_size=64)
    first, second = ranks([[wider], [wider]])
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert "hidden_size is 64, the checkpoint has 32" in first[2] + second[2]
    assert "Traceback" not in first[2] + second[2]
    assert {p: p.read_bytes() for p in (tmp_path / "RUN" / "step_1").iterdir()} == kept
    status = json.loads((tmp_path / "RUN" / "run_status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 2)
