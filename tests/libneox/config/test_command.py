# SPDX-License-Identifier: Apache-2.0
"""The reliability catalogue's series C at the command line: exit codes, messages, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]
SHAPE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nmax_position_embeddings: 64\nvocab_size: 100\n"


@pytest.fixture
def dry(run_command: Run, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`neox-train c.yml --dry-run` of a text: exit code, stdout, stderr."""

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "c.yml").write_text(text)
        done = run_command(["neox-train", "c.yml", "--dry-run", *arguments], cwd=tmp_path, timeout=60)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layer: 2\n", "c.yml:1: num_layer: is not a key; did you mean num_layers?"),
        ("optimizer:\n  type: adam\n  prams: {}\n", "c.yml:3: optimizer.prams: is not a key of optimizer"),
        ("seed: 1\nseed: 2\n", "c.yml:2: seed: is given twice (first on line 1)"),
        (
            SHAPE + "train_batch_size: 10\ntrain_micro_batch_size_per_gpu: 4\nglobal_num_gpus: 2\n",
            "10 is not micro-batch 4 * accumulation 1 * 2 data-parallel ranks = 8",
        ),
        ("warmup: '1e-4'\n", "c.yml:1: warmup: expected a number, found the text '1e-4'"),
        ("save: !!python/object/apply:os.system ['touch canary']\n", "no objects are made from a config"),
        (SHAPE.replace("64\nnum_att", "63\nnum_att"), "4 does not divide hidden_size 63"),
        (SHAPE + "seq_length: 128\n", "is 128, more than max_position_embeddings 64"),
        (SHAPE + "padded_vocab_size: 99\n", "99 rows are too few for a vocabulary of 100"),
    ],
)
def test_refused_with_2(dry: Callable[..., tuple[int, str, str]], tmp_path: Path, text: str, message: str) -> None:
    code, stdout, stderr = dry(text)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("neox-train: error: ")
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "canary").exists()


def test_same_key_in_two_files(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("seed: 1\n")
    (tmp_path / "b.yml").write_text("\nseed: 1\n")
    done = run_command(["neox-train", "-d", str(tmp_path), "a", "b.yml", "--dry-run"])
    assert done.returncode == 2
    assert f"{tmp_path}/b.yml:2: seed: is set in {tmp_path}/a.yml:1 already" in done.stderr.decode()


def test_dry_run_says_everything(dry: Callable[..., tuple[int, str, str]]) -> None:
    text = SHAPE + "train-iters: 10\ntrain-micro-batch-size-per-gpu: 2\nwandb_group: no\n"
    code, stdout, _ = dry(text, "--json")
    report = json.loads(stdout)
    assert code == 0
    assert report["config"]["wandb_group"] == "no"
    assert report["memory_per_rank"][0]["total"] > 0
    assert report["flops_per_token"]["palm"] > 6 * report["parameters"]
    assert report["tokens"]["total"] == 10 * 2 * 64


def test_a_missing_file_is_66(run_command: Run) -> None:
    done = run_command(["neox-train", "pythia/161M", "--dry-run"])
    assert done.returncode == 66
    assert b"did you mean pythia/160M?" in done.stderr


@pytest.mark.timeout(120)
def test_a_config_error_costs_half_a_second_at_most(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("num_layer: 2\n")
    check = (
        "import sys, runpy; sys.argv = ['neox-train', 'c.yml']\n"
        "try: runpy.run_module('neox_train', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)), file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, timeout=60, env=os.environ
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2
        assert done.stderr.decode().splitlines()[-1] == "[]"
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5, f"{min(spent):.2f} s of processor time"
