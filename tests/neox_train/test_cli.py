# SPDX-License-Identifier: Apache-2.0
"""The command line: what is answered without training, and errors before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_presets_are_listed(run_command) -> None:
    done = run_command(["neox-train", "--list-presets"])
    assert done.returncode == 0
    assert any(line.startswith(b"pythia/160M ") for line in done.stdout.splitlines())
    lines = run_command(["neox-train", "--list-presets", "--json"]).stdout.splitlines()
    assert {"name", "parameters"} <= set(json.loads(lines[0]))


def test_a_key_is_explained(run_command) -> None:
    done = run_command(["neox-train", "--help-config", "checkpoint_factor"])
    assert done.returncode == 0
    assert b"checkpoint_factor" in done.stdout


def test_the_printed_config_is_a_config(run_command, tmp_path: Path) -> None:
    done = run_command(["neox-train", "pythia/14M", "--set", "train_iters=3", "--print-config"])
    (tmp_path / "printed.yml").write_bytes(done.stdout)
    again = run_command(["neox-train", tmp_path / "printed.yml", "--print-config"])
    assert again.stdout == done.stdout
    assert b"train_iters: 3" in done.stdout


def test_a_dry_run_trains_nothing(run_command, tmp_path: Path) -> None:
    words = ["neox-train", "pythia/14M", "--set", "data_path=nowhere", "--set", "train_iters=3", "--dry-run"]
    done = run_command([*words, "--json"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, b"no configuration"),
        (["pythia/14M", "--set", "num_layer=3"], 2, b"num_layers"),
        (["pythia/14M"], 2, b"data_path"),
        (["no-such-file.yml"], 66, b"no-such-file"),
        (
            ["pythia/14M", "--set", "data_path=x", "--set", "train_batch_size=3", "--set", "gas=2"],
            2,
            b"train_batch_size",
        ),
    ],
)
def test_errors_come_before_torch(run_command, args: list[str], code: int, message: bytes, tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.mkdir()
    for name in ("torch", "deepspeed", "transformers"):
        (block / f"{name}.py").write_text("raise SystemExit('imported')")
    done = run_command(["neox-train", *args], env={"PYTHONPATH": str(block)}, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert b"imported" not in done.stderr
    assert done.stderr.count(b"Traceback") == 0


def test_data_that_is_not_there(train, config, tmp_path: Path) -> None:
    done = train(config(data_path=str(tmp_path / "nothing")), code=66)
    assert "nothing" in done.stderr


def test_data_of_another_tokenizer(train, config, golden: Path) -> None:
    tokenizer = golden / "model" / "data" / "tiny_bpe_500.json"
    done = train(config(vocab_file=str(tokenizer), tokenizer_type="HFTokenizer"), code=2)
    assert "made with tokenizer" in done.stderr


def test_ranks_that_differ_are_told(start, config, command_env, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    processes = [
        start(
            config(f"{rank}.yml", train_micro_batch_size_per_gpu=2, seed=rank),
            env={**command_env, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "differ in seed" in errors
