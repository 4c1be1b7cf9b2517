# SPDX-License-Identifier: Apache-2.0
"""Training runs of the original, replayed: loss, learning rate, gradient norm and tokens of every step."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LOSS, NORM, LR = 1e-4, 1e-4, 1e-9


@pytest.fixture(scope="module")
def imported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """RUN that neox-convert made of a golden checkpoint."""
    made: dict[tuple[str, int], Path] = {}

    def convert(case: str, step: int) -> Path:
        if (case, step) not in made:
            run = tmp_path_factory.mktemp("imported") / "RUN"
            source = golden / "model" / "train" / case / "ckpt" / f"global_step{step}"
            tokenizer = golden / "model" / "data" / "tiny_bpe_500.json"
            words = [sys.executable, "-m", "neox_convert", "from-neox", source, run, "--tokenizer", tokenizer]
            subprocess.run([str(word) for word in words], check=True, timeout=120, capture_output=True)
            made[case, step] = run
        return made[case, step]

    return convert


def replay(train: Any, golden: Path, case: str, source: Path, run: Path, *more: str) -> None:
    """Train with the golden's own configuration from an imported checkpoint."""
    folder = golden / "model" / "train" / case
    text = (folder / "config.yml").read_text()
    for name in ("tiny_text_document", "tiny_bpe_500.json"):
        text = text.replace(f"../../data/{name}", str(golden / "model" / "data" / name))
    config = run.parent / f"{case}.yml"
    config.write_text(text)
    settings = [f"save={run}", f"load={source}", *more]
    train(config, "-q", *(word for setting in settings for word in ("--set", setting)))


def differences(golden: Path, case: str, run: Path, norm: str = "grad_norm_preclip") -> list[str]:
    """What of metrics.jsonl and of the evaluations is not as in the trace, row by row."""
    folder = golden / "model" / "train" / case
    rows = list(csv.DictReader((folder / "trace.csv").open()))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records}
    if [int(row["iteration"]) for row in rows] != sorted(record["step"] for record in records):
        return [f"{len(records)} steps instead of {len(rows)}, or others"]
    found = []
    for row in rows:
        record = steps[int(row["iteration"])]
        wanted = {
            "loss": pytest.approx(float(row["lm_loss"]), abs=LOSS),
            "lr": pytest.approx(float(row["lr_used"]), rel=LR),
            "grad_norm": pytest.approx(float(row[norm]), abs=NORM),
        }
        found += [f"step {record['step']}: {k} {record[k]}, not {v}" for k, v in wanted.items() if record[k] != v]
    closing = json.loads((run / "run_status.json").read_text())["evaluation"]
    losses = [r[key] for r in [*records, closing] for key in ("valid_loss", "test_loss") if key in r]
    traced = [value["lm_loss"] for _, value in json.loads((folder / "trace_eval.json").read_text())]
    # resumed at 10: its evaluation there belongs to the run before; pytest's own tolerance is relative
    return found if losses == pytest.approx(traced, abs=LOSS) else [*found, f"evaluations {losses}, not {traced}"]


CASES = [
    ("pythia_fp32", "pythia_fp32", 0, "grad_norm_preclip", ()),
    ("pythia_fp32", "pythia_fp32", 0, "grad_norm_preclip", ("engine=deepspeed",)),
    ("pythia_fp32_noclip", "pythia_fp32", 0, "raw_grad_norm", ("gradient_clipping=0",)),
    ("pythia_fp32_resume10", "pythia_fp32", 10, "grad_norm_preclip", ()),
    ("pythia_fp32_resume10", "pythia_fp32", 10, "grad_norm_preclip", ("engine=deepspeed",)),
    ("opt_cpuadam", "pythia_fp32", 0, "grad_norm_preclip", ()),
    ("opt_madgrad", "pythia_fp32", 0, "grad_norm_preclip", ()),
    ("opt_sm3", "pythia_fp32", 0, "grad_norm_preclip", ()),
    ("llama_fp32", "llama_fp32", 0, "grad_norm_preclip", ()),
]


@pytest.mark.parametrize(
    ("case", "origin", "step", "norm", "more"), CASES, ids=[case[0] + "".join(case[4]) for case in CASES]
)
def test_a_run_of_the_original(
    train, golden: Path, imported, tmp_path: Path, case: str, origin: str, step: int, norm: str, more: tuple[str, ...]
) -> None:
    run = tmp_path / "RUN"
    replay(train, golden, case, imported(origin, step), run, *more)
    assert differences(golden, case, run, norm) == []


def test_two_data_parallel_ranks(train_apart, golden: Path, imported, tmp_path: Path) -> None:
    def train(*args: Any) -> None:
        train_apart(*args, ranks=2)

    run = tmp_path / "RUN"
    replay(train, golden, "pythia_fp32_dp2", imported("pythia_fp32", 0), run)
    assert differences(golden, "pythia_fp32_dp2", run) == []


@pytest.mark.parametrize(("case", "rank", "ranks"), [("pythia_fp32", 0, 1), ("pythia_fp32_dp2", 0, 2)])
def test_the_same_tokens(golden: Path, case: str, rank: int, ranks: int) -> None:
    import torch

    from libneox.config import load_config
    from libneox.data.splits import build_splits, samples_wanted
    from neox_train.batches import batches_of

    folder = golden / "model" / "train" / case
    data = golden / "model" / "data" / "tiny_text_document"
    config = load_config([folder / "config.yml"], overrides=[f"data_path={data}"])
    plan = config.batch_plan(ranks)
    wanted = np.load(folder / "trace_tokens.npy")
    samples = samples_wanted(config.train.train_iters, plan.global_batch, 10, 2)
    sets = build_splits(config, train_samples=samples[0])
    batches = batches_of(config, sets.train, plan, data_rank=rank, device=torch.device("cpu"), vocab_size=500, eod_id=0)
    for step, tokens in enumerate(wanted):
        (batch,) = batches.step(step * plan.global_batch)
        assert torch.equal(batch.ids, torch.from_numpy(tokens[:, :-1].astype(np.int64)))
        assert torch.equal(batch.targets, torch.from_numpy(tokens[:, 1:].astype(np.int64)))
