# SPDX-License-Identifier: Apache-2.0
"""Micro-batches replayed as CUDA graphs: the same numbers, and what cannot be recorded is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from libneox.config import load_config
from libneox.errors import UsageError
from libneox.model.init import initial_value
from libneox.parallel.mesh import Mesh
from neox_train import plain, speed
from neox_train.engines import build_engine
from neox_train.objective import MicroBatch
from neox_train.recorded import Recorded
from neox_train.steps import Engine

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "max_position_embeddings": 16,
    "pos_emb": "rotary", "gpt_j_residual": True, "train_batch_size": 4, "gradient_accumulation_steps": 2,
    "train_iters": 10, "vocab_size": 50, "zero_optimization": {"stage": 0},
}  # fmt: skip
CPU = torch.device("cpu")


def steps(engine: Engine, device: torch.device, names: list[str]) -> list[Tensor]:
    """Losses of three steps of two micro-batches, one with a mask and one without, an evaluation, and the weights."""
    for name in names:
        engine.restore_master(name, initial_value(engine.objective.model.config, name, 0))
    engine.train(True)
    drawn = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        ids = torch.randint(0, 50, (2, 2, 17), generator=drawn).to(device)
        mask = torch.rand(2, 16, generator=drawn).to(device)
        torch.manual_seed(1)
        batches = [MicroBatch(ids[0, :, :-1], ids[0, :, 1:], mask), MicroBatch(ids[1, :, :-1], ids[1, :, 1:])]
        found.append(engine.backward(batches))
        assert not engine.step(1e-2).skipped
    engine.train(False)
    return [*found, engine.evaluate(batches), *(engine.weight(name).clone() for name in names)]


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_the_same_numbers(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recording that calls the work again on the tensors it was recorded with, as a device does."""
    recordings: list[int] = []

    def record(
        work: Callable[[], Tensor], undo: Callable[[], object], device: torch.device, pool: Any
    ) -> Callable[[], Tensor]:
        recordings.append(1)
        for _ in range(3):
            result = work()
            undo()
        return lambda: result.copy_(work())

    config = load_config([SHAPE | {"precision": precision}])
    model = config.model_config(50)
    names = list(model.parameter_shapes())
    wanted = steps(build_engine(config, model, CPU, Mesh()), CPU, names)
    monkeypatch.setattr(plain, "Recorded", functools.partial(Recorded, record=record))
    monkeypatch.setattr(speed, "check_graphs", lambda *a, **k: None)
    engine = build_engine(config.replace(cuda_graphs=True), model, CPU, Mesh())
    for ours, theirs in zip(steps(engine, CPU, names), wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert len(recordings) == 2  # with a mask, and without
    at = {name: weight.grad.data_ptr() for name, weight in engine.local().items() if weight.grad is not None}
    assert len(at) == len(names)
    steps(engine, CPU, names)
    assert {name: weight.grad.data_ptr() for name, weight in engine.local().items() if weight.grad is not None} == at


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", "off"), ("bfloat16", "off"), ("bfloat16", "on")])
def test_the_same_numbers_on_a_gpu(precision: str, compiled: str) -> None:
    device = torch.device("cuda", 0)
    config = load_config([SHAPE | {"precision": precision, "compile": compiled, "hidden_dropout": 0.1}])
    model = config.model_config(50)
    names = list(model.parameter_shapes())
    wanted = steps(build_engine(config, model, device, Mesh()), device, names)
    engine = build_engine(config.replace(cuda_graphs=True), model, device, Mesh())
    for ours, theirs in zip(steps(engine, device, names), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_recorded_is_refused() -> None:
    gpu = torch.device("cuda")

    def check(device: torch.device = gpu, *, plain: bool = True, **keys: Any) -> None:
        speed.check_graphs(load_config([SHAPE | {"cuda_graphs": True} | keys]), device, plain=plain)

    check()
    check(CPU, cuda_graphs=False)
    for device, on_plain, keys, why in (
        (CPU, True, {}, "there is no GPU"),
        (gpu, False, {}, "DeepSpeed"),
        (gpu, True, {"model_parallel_size": 2}, "ranks that share a model"),
        (gpu, True, {"checkpoint_activations": True}, "what is computed again"),
        (gpu, True, {"curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8,
                                             "max_difficulty": 16, "schedule_type": "fixed_linear",
                                             "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 8}}},
         "a curriculum"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"cuda_graphs: {why}.*; set .*cuda_graphs: false"):
            check(device, plain=on_plain, **keys)


def test_a_run_without_a_gpu_says_so(config: Any, train: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = train(config(zero_optimization={"stage": 0}, cuda_graphs=True), code=2)
    assert "cuda_graphs: there is no GPU to record on; set cuda_graphs: false" in done.stderr
