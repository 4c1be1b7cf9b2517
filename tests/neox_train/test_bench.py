# SPDX-License-Identifier: Apache-2.0
"""`neox-train bench` at toy size: every figure is there, and is what the arithmetic says."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from libneox.config import load_config
from libneox.errors import UsageError
from neox_train import benchmark as bench
from neox_train.ceiling import Ceiling

TOY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "max_position_embeddings": 16,
    "pos_emb": "rotary", "gpt_j_residual": True, "train_batch_size": 64, "train_iters": 10, "vocab_size": 300,
    "optimizer": {"type": "adam", "params": {"lr": 0.001}}, "cpu_products": "torch", "precision": "fp32",
}  # fmt: skip


def prepared(asked: dict[str, Any] | None = None, batch: int | None = None) -> Any:
    config = load_config([TOY | (asked or {})])
    return bench.prepared(config, set(asked or {}), batch, cpu_batch=2)


def test_one_micro_batch_unless_asked_for_more() -> None:
    if torch.cuda.is_available():
        pytest.skip("defaults of a CPU")
    plan = prepared().batch_plan(1)
    assert (plan.micro_batch, plan.grad_accum) == (2, 1)
    plan = prepared({"gradient_accumulation_steps": 3, "zero_optimization": {"stage": 1}}, batch=5).batch_plan(1)
    assert (plan.micro_batch, plan.grad_accum) == (5, 3)
    assert prepared({"zero_optimization": {"stage": 1}}).zero_stage == 1
    assert bench.Task.of(prepared({"seq_length": None})).tokens == 2 * 16  # as many as the model has positions


@pytest.mark.parametrize("dtype", ["fp32", "bfloat16"])
def test_figures(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = prepared({"precision": dtype, "gradient_accumulation_steps": 2})
    result = bench.benchmark(config, versus=True, steps=1, rounds=2)
    assert result["tokens_per_step"] == 2 * 2 * 16
    model = config.model_config(300)
    for side in ("neox", "transformers"):
        figures = result[side]
        flops = model.flops_per_token(16)
        assert figures["tokens_per_s"] == pytest.approx(64 / figures["step_s"], rel=0.02)
        assert figures["tflops_palm"] == pytest.approx(figures["tokens_per_s"] * flops.palm / 1e12, abs=1e-4)
        assert figures["mfu_palm"] / figures["mfu_causal"] == pytest.approx(flops.palm / flops.causal, rel=0.3)
        assert figures["best_step_s"] <= figures["step_s"]
        assert figures["share_of_roofline"] > 0
    assert result["neox_over_transformers"] > 0
    assert result["process_peak_gb"] > 0.05
    text = bench.render(result)
    assert json.loads(json.dumps(result)) == result
    assert all(word in text for word in ("tokens_per_s", "transformers", "ceiling copy_gb_per_s"))


def test_both_sides_train_the_same_model() -> None:
    """Equal weights give equal losses: the peer is given the same work."""
    task = bench.Task.of(prepared())
    ours, theirs = bench.ours(task), bench._transformers_model(task.model)
    assert sum(p.numel() for p in theirs.parameters()) == task.model.num_parameters()
    first = ours.step().item()
    assert [ours.step().item() for _ in range(20)][-1] < first  # it does train
    peer = bench.transformers(task)
    first = peer.step().item()
    assert [peer.step().item() for _ in range(20)][-1] < first


def test_other_families_have_no_peer() -> None:
    for keys in ({"norm": "rmsnorm"}, {"document_mask": True}):
        with pytest.raises(UsageError, match="--vs hf"):
            bench.transformers(bench.Task.of(prepared(keys)))


def test_documents_are_kept_apart() -> None:
    task = bench.Task.of(prepared({"document_mask": True, "seq_length": 1024, "max_position_embeddings": 1024}))
    (batch,) = task.batches()
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == 2 * 1024
    assert len(set(bounds)) > 3, "each row is a document, and some end within a row"
    assert {batch.ids.flatten()[bound - 1].item() for bound in set(bounds) - {0, 1024, 2048}} == {0}
    bench.ours(task).step()


def test_roofline_is_the_sum_of_its_parts() -> None:
    model = prepared().model_config(300)
    huge = float("inf")
    tokens, dtype = 64, torch.bfloat16
    one = Ceiling(1.0, 100.0, huge, huge).seconds_per_token(model, 16, dtype, tokens)
    assert one == pytest.approx(6 * model.num_parameters_matmul() / 100)
    one = Ceiling(1.0, huge, 100.0, huge).seconds_per_token(model, 16, dtype, tokens)
    assert one == pytest.approx(6 * 2 * 32 * 16 / 100)  # 6 L h s
    one = Ceiling(1.0, huge, huge, 100.0).seconds_per_token(model, 16, dtype, tokens)
    moved = 60 * 32 * 2 * 2 + 12 * model.padded_vocab_size + 28 * model.num_parameters() / tokens
    assert one == pytest.approx(moved / 100)


@pytest.mark.slow
def test_command() -> None:
    words = [f"--set={key}={json.dumps(value)}" for key, value in TOY.items() if key != "train_batch_size"]
    done = subprocess.run(
        [sys.executable, "-m", "neox_train", "bench", "pythia/14M", *words, "--json", "--steps=1", "--rounds=1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["neox"]["tokens_per_s"] > 0


def test_not_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match="without a launcher"):
        bench.Task.of(prepared())
