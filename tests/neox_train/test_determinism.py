# SPDX-License-Identifier: Apache-2.0
"""The same bits from the same command, and the same samples however ranks, batches and interruptions fall."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from libneox import run_directory
from neox_train.batches import sample_numbers


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], dict[str, bytes]]:
    """Files of a run's last step that tell no paths."""

    def read(name: str) -> dict[str, bytes]:
        step = run_directory.step_path(tmp_path / name, run_directory.list_steps(tmp_path / name)[-1])
        return {p.name: p.read_bytes() for p in step.iterdir() if p.name not in ("config.yml", "manifest.json")}

    return read


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_bits(train, config, losses, weights, threads, count: int, tmp_path: Path) -> None:
    threads(count)
    wide = {
        "hidden_size": 128,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.1,
        "train_iters": 4,
    }
    for name in ("a", "b"):
        train(config(save=str(tmp_path / name), **wide), "-q")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights("a") == weights("b")


def test_clock_and_time_zone_have_no_effect(train, config, losses, weights, monkeypatch, tmp_path: Path) -> None:
    keys = {"checkpoint_factor": 3, "keep_last_n_checkpoints": 1}
    train(config("a.yml", save=str(tmp_path / "a"), **keys), "-q")
    chosen, now = random.Random(0), time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + chosen.uniform(-1e9, 1e9))
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        train(config("b.yml", save=str(tmp_path / "b"), **keys), "-q", "--set", "exit_interval=5", code=75)
        train(config("b.yml", save=str(tmp_path / "b"), **keys), "-q")
    time.tzset()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights("a") == weights("b")
    assert run_directory.list_steps(tmp_path / "b") == [8]


@pytest.mark.slow
def test_hash_seed_locale_and_place_have_no_effect(train_apart, config, losses, weights, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    train_apart(config("a.yml", save=str(tmp_path / "a")), "-q", env={"PYTHONHASHSEED": "1", "LC_ALL": "C"})
    env = {"PYTHONHASHSEED": "77", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "HOSTNAME": "elsewhere"}
    train_apart(config("b.yml", save=str(tmp_path / "b")), "-q", env=env, cwd=tmp_path / "elsewhere")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights("a") == weights("b")


def test_resumed_over_the_end_of_an_epoch(train, config, losses, metrics, tmp_path: Path) -> None:
    """About 60 samples an epoch and 16 a step: stopped before, in and after the second epoch."""
    keys = {"split": "2,98,0", "train_batch_size": 16, "train_iters": 12}
    train(config("whole.yml", save=str(tmp_path / "whole"), **keys), "-q")
    stored = json.loads((tmp_path / "whole/latest/trainer.json").read_text())
    assert max(epochs for (epochs, *_) in stored["epochs"]["train"]) > 2
    path = config(**keys)
    for stop in (3, 4, 9):
        train(path, "-q", "--set", f"exit_interval={stop}", code=75)
    train(path, "-q", "--set", "train_micro_batch_size_per_gpu=2", "--set", "num_workers=3")
    assert losses(tmp_path / "RUN")[:9] == losses(tmp_path / "whole")[:9]
    assert losses(tmp_path / "RUN")[9:] == pytest.approx(losses(tmp_path / "whole")[9:], rel=1e-6)
    assert [record["samples"] for record in metrics(tmp_path / "RUN")] == [16 * step for step in range(1, 13)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_is_the_same_samples_on_any_number_of_ranks(config, ranks: int, accumulated: int) -> None:
    from libneox.config import load_config

    keys = {"train_batch_size": 24, "gradient_accumulation_steps": accumulated}
    plan = load_config([config(**keys)]).batch_plan(ranks)
    for first in (0, 24, 960):
        numbers = [
            number
            for micro_step in range(plan.grad_accum)
            for rank in range(ranks)
            for number in sample_numbers(plan, first, micro_step, rank)
        ]
        assert numbers == list(range(first, first + 24))


@pytest.fixture
def logging_script(script, tmp_path: Path) -> Path:
    """neox-train that writes the sample numbers it reads to RUN/samples-RANK.jsonl."""
    return script(
        "import json, numpy",
        "from pathlib import Path",
        "from neox_train.batches import Batches",
        "make = Batches.make",
        "def noted(self, numbers, *more):",
        f"    with open(Path({str(tmp_path)!r}) / ('samples-' + os.environ.get('RANK', '0')), 'a') as file:",
        "        file.write(json.dumps([numbers.start, numbers.stop]) + '\\n')",
        "    return make(self, numbers, *more)",
        "Batches.make = noted",
    )


def drawn(folder: Path) -> list[int]:
    """All samples that were read since the last call, in order."""
    found = []
    for path in folder.glob("samples-*"):
        for line in path.read_text().splitlines():
            found += range(*json.loads(line))
        path.unlink()
    return sorted(found)


@pytest.mark.slow
def test_the_same_losses_on_one_two_and_four_ranks(train_apart, train, config, losses, tmp_path: Path) -> None:
    train(config("one.yml", save=str(tmp_path / "one")), "-q")
    for ranks in (2, 4):
        path = config(save=str(tmp_path / f"on{ranks}"), train_micro_batch_size_per_gpu=4 // ranks)
        train_apart(path, "-q", ranks=ranks)
        assert losses(tmp_path / f"on{ranks}") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_no_sample_is_skipped_or_repeated_between_layouts(
    train, train_apart, config, losses, logging_script, tmp_path: Path
) -> None:
    """Four ranks, then two, then three with accumulation; each but the last is stopped."""
    # what is made ahead and never computed would count as drawn
    keys = {"train_batch_size": 12, "train_iters": 9, "prefetch": False}
    train(config("whole.yml", save=str(tmp_path / "whole"), **keys), "-q")
    path = config(**keys)
    seen = []
    for ranks, micro_batch, stop in ((4, 3, 3), (2, 3, 5), (3, 2, 9)):
        words = ["--set", f"train_micro_batch_size_per_gpu={micro_batch}", "--set", f"exit_interval={stop}"]
        train_apart(path, "-q", *words, ranks=ranks, script=logging_script, code=None)
        seen.append(drawn(tmp_path))
    assert seen == [list(range(36)), list(range(36, 60)), list(range(60, 108))]
    assert losses(tmp_path / "RUN") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_another_global_batch_is_told(train, config, tmp_path: Path) -> None:
    train(config(), "-q", "--set", "train_iters=4")
    done = train(config(train_batch_size=2, train_iters=6))
    assert "going on at sample 16 of the order, 2 samples a step from here" in done.stderr
    assert run_directory.verify_step(tmp_path / "RUN/step_6").samples == 20
