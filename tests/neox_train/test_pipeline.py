# SPDX-License-Identifier: Apache-2.0
"""A pipeline trains the model that one rank trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox.checkpoint.store import open_tensors

SLOW = pytest.mark.slow
# four micro-batches a step; the padding of the vocabulary must not follow the number of ranks, or the losses would
SAME: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "train_iters": 10, "padded_vocab_size": 384}


def pipe(stages: int = 2, **more: Any) -> list[str]:
    """Arguments that make a pipeline of the same run."""
    keys = {"pipe_parallel_size": stages} | more
    return ["-q", *(word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}"))]


def compare(ours: list[dict[str, Any]], whole: list[dict[str, Any]], close: float = 1e-5) -> None:
    assert [record["samples"] for record in ours] == [record["samples"] for record in whole]
    for name in ("loss", "grad_norm", "valid_loss"):
        found, wanted = ([record[name] for record in records if name in record] for records in (ours, whole))
        assert found == pytest.approx(wanted, rel=close if name != "grad_norm" else 10 * close), name


def test_two_stages_equal_one_rank_and_a_run_moves_between_them(
    train, train_apart, config, metrics, tmp_path: Path
) -> None:
    """Losses, gradient norms and validation of ten steps, the second half resumed on one rank; then the weights."""
    more = SAME | {"eval_interval": 3, "eval_iters": 2}
    train(config("one.yml", save=str(tmp_path / "one"), **more), "-q")
    path = config(**more)
    train_apart(path, *pipe(), "--set", "exit_interval=6", ranks=2, code=None)
    train(path, "-q")
    assert sum("valid_loss" in record for record in metrics(tmp_path / "RUN")) == 3
    compare(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"))
    for group in ("model", "optimizer"):
        with open_tensors(tmp_path / "RUN/latest", group) as a, open_tensors(tmp_path / "one/latest", group) as b:
            assert set(a) == set(b)
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4, msg=name)


LLAMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "ffn_hidden_size": 48,
    "num_kv_heads": 2,
    "gpt_j_residual": False,
    "no_weight_tying": True,
    "pos_emb": "learned",
}
# SGD shows what Adam hides: a tied weight or a shard that counts twice in the norm, or not at all
SGD = {"optimizer": {"type": "sgd", "params": {"lr": 0.5}}, "gradient_clipping": 0.1}


@SLOW
@pytest.mark.parametrize(
    ("ranks", "model", "layout"),
    [
        (2, {"precision": "bfloat16"}, {}),
        (
            2,
            LLAMA | {"num_layers": 4, "reset_position_ids": True, "document_mask": True},
            {"pipe_partition_method": "parameters", "checkpoint_activations": True, "checkpoint_num_layers": 2},
        ),
        (3, SGD | {"pos_emb": "rpe", "num_layers": 3, "eod_mask_loss": True}, {"pipe_partition_method": "uniform"}),
        (4, SGD, {"train_micro_batch_size_per_gpu": 2}),
        (4, SGD, {"model_parallel_size": 2}),
        (4, LLAMA | SGD | {"precision": "bfloat16"}, {"model_parallel_size": 2, "sequence_parallel": True}),
        (2, SGD | {"pos_emb": "rpe", "num_layers": 3}, {"pipe_schedule": "dualpipev"}),
        (4, LLAMA, {"pipe_schedule": "dualpipev", "model_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=[
        "bf16", "documents-recomputed", "three-stages", "PP-DP", "PP-TP", "PP-TP-sequence-bf16", "dualpipev",
        "dualpipev-TP-sequence",
    ],
)  # fmt: skip
def test_layouts_and_models(
    train, train_apart, config, metrics, ranks: int, model: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    """Ten steps equal those of one rank; less than four ranks stop and resume halfway."""
    more = SAME | {"eval_interval": 5, "eval_iters": 1, "zero_optimization": {"stage": 1}} | model
    train(config("one.yml", save=str(tmp_path / "one"), **more), "-q")
    path, stages = config(**more), 3 if ranks == 3 else 2
    if ranks < 4:
        train_apart(path, *pipe(stages, **layout), "--set", "exit_interval=5", ranks=ranks, code=None, timeout=300)
    train_apart(path, *pipe(stages, **layout), ranks=ranks, timeout=300)
    one = metrics(tmp_path / "one")
    compare(metrics(tmp_path / "RUN"), one, 2e-2 if "precision" in model else 1e-5)
    if "gradient_clipping" in model:
        assert min(record["grad_norm"] for record in one) > 0.1  # so that clipping acts


@SLOW
def test_a_run_moves_through_all_layouts(train_apart, script, config, metrics, tmp_path: Path) -> None:
    """Two data-parallel ranks, two tensor-parallel ones, a pipeline, one rank: samples and losses of one run."""
    seen = tmp_path / "seen"
    path = script(
        "import hashlib",
        "from neox_train.batches import Batches",
        "make = Batches.make",
        "def noted(self, numbers, *rest):",
        "    batch = make(self, numbers, *rest)",
        f"    with open({str(seen)!r} + os.environ.get('RANK', '0'), 'a') as file:",
        "        for number, row in zip(numbers, batch.ids):",
        "            print(number, hashlib.sha256(row.numpy().tobytes()).hexdigest(), file=file)",
        "    return batch",
        "Batches.make = noted",
    )

    def samples() -> list[list[str]]:
        found = {line for file in tmp_path.glob("seen*") for line in file.read_text().splitlines()}
        for file in tmp_path.glob("seen*"):
            file.unlink()
        return sorted((line.split() for line in found), key=lambda words: int(words[0]))

    more = SAME | {"train_iters": 12, "prefetch": False}
    train_apart(config("one.yml", save=str(tmp_path / "one"), **more), "-q", script=path)
    whole, legs = samples(), []
    for step, ranks, layout in ((3, 2, {}), (6, 2, {"model_parallel_size": 2}), (9, 2, {"pipe_parallel_size": 2})):
        words = [*pipe(1, **layout), "--set", f"exit_interval={step}"]
        train_apart(config(**more), *words, ranks=ranks, script=path, code=None)
        legs.append(samples())
    train_apart(config(**more), "-q", script=path)
    legs.append(samples())
    assert [len(leg) for leg in legs] == [12] * 4
    assert [sample for leg in legs for sample in leg] == whole
    compare(metrics(tmp_path / "RUN"), metrics(tmp_path / "one"))


@SLOW
def test_a_loss_that_is_no_number_ends_all_stages(train_apart, config, tmp_path: Path) -> None:
    more = SAME | {"optimizer": {"type": "sgd", "params": {"lr": 1e30}}, "warmup": 0.0}
    done = train_apart(config(**more), *pipe(), ranks=2, code=None)
    assert json.loads((tmp_path / "RUN/run_status.json").read_text())["code"] == 80, done.stderr
    assert "lower the learning rate" in done.stderr


@SLOW
def test_a_step_too_short_for_dualpipev_is_refused(train_apart, config) -> None:
    done = train_apart(config(train_micro_batch_size_per_gpu=4), *pipe(pipe_schedule="dualpipev"), ranks=2, code=None)
    assert "needs 4 micro-batches a step, there are 1" in done.stderr
