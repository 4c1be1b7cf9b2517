# SPDX-License-Identifier: Apache-2.0
"""neox-train from a configuration to a checkpoint, and on from there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from libneox import load_model, run_directory
from libneox.checkpoint.store import open_tensors
from tests.neox_train.conftest import same_checkpoint


def test_stdout_is_the_paths_of_checkpoints(train_apart, config, tmp_path: Path) -> None:
    """In an environment where builds of extensions were killed: nobody looks at their locks, nothing is built."""
    locks = [
        tmp_path / "extensions" / name / "lock" for name in ("fused_adam", "deepspeed_shm_comm", "py311_cpu/utils")
    ]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    done = train_apart(config(checkpoint_factor=3), "-q", env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")})
    assert sorted(path for path in (tmp_path / "extensions").rglob("*") if path.is_file()) == sorted(locks)
    run = tmp_path / "RUN"
    assert done.lines == [str(run / f"step_{step}") for step in (3, 6, 8)]
    assert run_directory.list_steps(run) == [3, 6, 8]
    assert json.loads((run / "run_status.json").read_text())["state"] == "finished"
    assert not list(run.glob("*.tmp-*"))
    assert run_directory.verify_step(run / "step_8").samples == 32


def test_a_checkpoint_is_a_model(train, config, tmp_path: Path) -> None:
    train(config(), "-q")
    model = load_model(tmp_path / "RUN")
    ids = torch.arange(64).reshape(2, 32)
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 32, model.config.padded_vocab_size)
    assert model.config.vocab_size == 258
    from libneox.tokenizer import load_tokenizer

    assert load_tokenizer(tmp_path / "RUN" / "latest").vocab_size == 258  # the tokenizer travelled


def test_metrics_have_one_object_a_step(train, config, metrics, tmp_path: Path) -> None:
    train(config(eval_interval=4, eval_iters=1), "-q")
    records = metrics(tmp_path / "RUN")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["samples"] for record in records] == [4 * step for step in range(1, 9)]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "tflops", "mfu", "memory_gb", "eta_s"} <= set(
        records[0]
    )
    assert ["valid_loss" in record for record in records] == [False, False, False, True] * 2
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_run_in_pieces_equals_a_run_in_one(train, config, losses, precision: str, tmp_path: Path) -> None:
    changes = {"precision": precision, "hidden_dropout": 0.1, "checkpoint_factor": 3}
    train(config("whole.yml", save=str(tmp_path / "whole"), **changes), "-q")
    pieces = config("pieces.yml", **changes)
    train(pieces, "-q", "--set", "exit_interval=3", code=75)
    train(pieces, "-q", "--set", "exit_interval=6", code=75)
    done = train(pieces)
    assert "after step 6" in done.stderr
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    assert same_checkpoint(tmp_path / "RUN" / "step_8", tmp_path / "whole" / "step_8")


def test_a_finished_run_started_again_does_nothing(train, config, tmp_path: Path) -> None:
    train(config(), "-q")
    before = (tmp_path / "RUN" / "step_8" / "manifest.json").stat().st_mtime_ns
    done = train(config(), "-q")
    assert done.lines == [str(tmp_path / "RUN" / "step_8")]
    assert (tmp_path / "RUN" / "step_8" / "manifest.json").stat().st_mtime_ns == before


def test_without_save_the_run_goes_to_run(train, config, tmp_path: Path) -> None:
    done = train(config(save=None, train_iters=1))
    assert done.lines == ["run/step_1"]
    assert "./run" in done.stderr
    assert (tmp_path / "run" / "latest").resolve().name == "step_1"


def test_accumulation_changes_nothing(train, config, losses, tmp_path: Path) -> None:
    train(config("a.yml", save=str(tmp_path / "a")), "-q")
    train(config("b.yml", save=str(tmp_path / "b"), train_micro_batch_size_per_gpu=1), "-q")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-6)


def test_recomputed_activations_change_nothing(train, config, losses, tmp_path: Path) -> None:
    train(config("a.yml", save=str(tmp_path / "a"), hidden_dropout=0.1), "-q")
    more = {"checkpoint_activations": True, "checkpoint_num_layers": 2, "hidden_dropout": 0.1}
    train(config("b.yml", save=str(tmp_path / "b"), **more), "-q")
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_clipping_clips(train, config, metrics, tmp_path: Path) -> None:
    sgd = {"optimizer": {"type": "sgd", "params": {"lr": 1.0}}, "lr_decay_style": "constant", "warmup": 0.0}
    train(config(gradient_clipping=0.01, weight_decay=0.0, train_iters=1, extra_save_iters=[0], **sgd), "-q")
    with open_tensors(tmp_path / "RUN/step_0") as before, open_tensors(tmp_path / "RUN/step_1") as after:
        moved = torch.stack([(before[name] - after[name]).norm() for name in before]).norm()
    assert metrics(tmp_path / "RUN")[0]["grad_norm"] > 0.1
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_the_save_cadence(train, config, tmp_path: Path) -> None:
    keys = {"checkpoint_scale": "log", "checkpoint_factor": 2, "extra_save_iters": [0, 3, 7]}
    train(config(**keys), "-q")
    assert run_directory.list_steps(tmp_path / "RUN") == [0, 1, 2, 3, 4, 7, 8]


def test_retention_spares_milestones(train, config, tmp_path: Path) -> None:
    train(config(checkpoint_factor=1, keep_last_n_checkpoints=2, extra_save_iters=[3]), "-q")
    assert run_directory.list_steps(tmp_path / "RUN") == [3, 7, 8]


def test_a_damaged_newest_step_is_passed_over_with_a_word(train, config, losses, tmp_path: Path) -> None:
    path = config(checkpoint_factor=2)
    train(path, "-q")
    whole = losses(tmp_path / "RUN")
    for step in (6, 8):
        file = tmp_path / "RUN" / f"step_{step}" / "model-00001-of-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    done = train(path, "-q")
    assert "step_8" in done.stderr
    assert done.stderr.count("falling back to an older step") == 2
    assert losses(tmp_path / "RUN") == whole
    for step in (2, 4, 6, 8):
        (tmp_path / "RUN" / f"step_{step}" / "trainer.json").write_text("{}")
    done = train(path, "-q", code=81)
    assert "none of its 4 checkpoints verifies" in done.stderr
    done = train(path, "-q", "--set", "iteration=4", code=81)
    assert "trainer.json" in done.stderr


@pytest.mark.parametrize("latest", ["missing", "empty", "garbage", "dangling"])
def test_latest_is_not_needed(train, config, tmp_path: Path, latest: str) -> None:
    train(config(), "-q")
    link = tmp_path / "RUN" / "latest"
    link.unlink()
    if latest == "dangling":
        link.symlink_to("nowhere")
    elif latest != "missing":
        link.write_text("" if latest == "empty" else "\x00garbage")
    done = train(config(), "--set", "train_iters=9")
    assert "after step 8" in done.stderr


def test_load_from_another_run(train, config, losses, tmp_path: Path) -> None:
    train(config(checkpoint_factor=4), "-q")
    other = {"save": str(tmp_path / "other"), "load": str(tmp_path / "RUN")}
    train(config("c.yml", iteration=4, **other), "-q")
    assert losses(tmp_path / "other") == losses(tmp_path / "RUN")[4:]
    done = train(config("f.yml", finetune=True, **(other | {"save": str(tmp_path / "tuned")})), "-q")
    assert done.lines == [str(tmp_path / "tuned" / "step_8")]
    assert losses(tmp_path / "tuned")[0] < losses(tmp_path / "RUN")[0] - 0.5
    done = train(config("m.yml", load=str(tmp_path / "nothing"), save=str(tmp_path / "x")), code=66)
    assert "nothing" in done.stderr
    done = train(config("s.yml", load=str(tmp_path / "y"), save=str(tmp_path / "y"), train_iters=1))
    assert "starting afresh" in done.stderr


def test_checkpoints_of_gpt_neox_are_not_passed_over(train, config, tmp_path: Path) -> None:
    """Neither as `load` nor where `save` points to: training afresh there would look like continuing."""
    step = tmp_path / "old" / "global_step7"
    step.mkdir(parents=True)
    (step / "mp_rank_00_model_states.pt").touch()
    old = str(tmp_path / "old")
    for name, places in (("a.yml", {"load": old}), ("b.yml", {"load": old, "save": old}), ("c.yml", {"save": old})):
        assert f"neox-convert from-neox {old} RUN" in train(config(name, **places), code=66).stderr


def test_a_longer_run_goes_on(train, config, losses, tmp_path: Path) -> None:
    train(config(lr_decay_iters=12), "-q")
    before = losses(tmp_path / "RUN")
    train(config(lr_decay_iters=12, train_iters=12), "-q")
    after = losses(tmp_path / "RUN")
    assert len(after) == 12
    assert after[:8] == before


def test_another_global_batch_goes_on_at_the_same_sample(train, config, metrics, tmp_path: Path) -> None:
    train(config(), "-q")
    train(config(train_batch_size=2, train_iters=10), "-q")
    assert [r["samples"] for r in metrics(tmp_path / "RUN")][7:] == [32, 34, 36]


def test_another_model_is_refused(train, config) -> None:
    train(config(train_iters=1), "-q")
    done = train(config(train_iters=2, hidden_size=64), code=2)
    assert "hidden_size is 64, the checkpoint has 32" in done.stderr


def test_other_data_or_order_is_refused(train, config, tmp_path: Path) -> None:
    train(config(), "-q", "--set", "train_iters=2")
    before = (tmp_path / "RUN" / "step_2" / "trainer.json").read_bytes()
    done = train(config(seed=5), code=2)
    assert "changed since step 2" in done.stderr
    assert (tmp_path / "RUN" / "step_2" / "trainer.json").read_bytes() == before


def test_another_learning_rate_is_told(train, config) -> None:
    train(config(), "-q")
    optimizer = {"type": "adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8}}
    done = train(config(train_iters=9, optimizer=optimizer))
    assert "the learning rate changes" in done.stderr
    done = train(config(train_iters=10, optimizer={"type": "lion", "params": {"lr": 0.001}}), code=2)
    assert "no_load_optim" in done.stderr


def test_a_closed_stdout_does_not_end_the_run(start, config, tmp_path: Path) -> None:
    with start(config(checkpoint_factor=2)) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(60) == 0, errors
    assert run_directory.list_steps(tmp_path / "RUN") == [2, 4, 6, 8]
    assert "Broken pipe" in errors


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_is_pickled(train_apart, config, ranks: int, tmp_path: Path) -> None:
    """Beginning, saving in both ways, copying and going on; torchrun itself pickles, its ranks must not."""
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'torch.distributed.run' not in sys.orig_argv:\n"
        "    import pickle, torch\n"
        "    def refuse(*a, **k):\n"
        f"        open({str(tmp_path / 'pickled')!r}, 'a').write(repr(a)[:200])\n"
        "        raise RuntimeError('pickle')\n"
        "    pickle.load = pickle.loads = pickle.dump = refuse\n"
        "    torch.load = torch.save = refuse\n"
        f"    open({str(tmp_path / 'watched')!r}, 'a').write('x')\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "canary"), os.environ.get("PYTHONPATH", "")])}
    keys = {"train_micro_batch_size_per_gpu": 4 // ranks, "checkpoint_factor": 1}
    train_apart(config(train_iters=2, **keys), "-q", env=env, ranks=ranks)
    keys |= {"async_save": True, "replica_check_interval": 1, "s3_path": f"file://{tmp_path}/copies"}
    train_apart(config(train_iters=4, **keys), "-q", env=env, ranks=ranks)
    assert (tmp_path / "watched").read_text() == "xx" * ranks
    assert not (tmp_path / "pickled").exists()
    for path in (tmp_path / "RUN").rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".yml", ".safetensors") or path.name == ".lock"
