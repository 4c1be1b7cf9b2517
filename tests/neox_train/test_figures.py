# SPDX-License-Identifier: Apache-2.0
"""Figures of single tensors, and the gradient noise scale, where the answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from libneox.checkpoint.store import open_tensors
from neox_train.noise_scale import NoiseScale

ASKED = {"log_param_norm": True, "log_grad_norm": True, "log_grad_pct_zeros": True, "log_optimizer_states": True}


@pytest.mark.parametrize(("stage", "precision"), [(0, "bfloat16"), (1, "fp32"), (2, "bfloat16"), (3, "fp32")])
def test_figures_agree_with_the_checkpoint(train, config, metrics, stage: int, precision: str, tmp_path: Path) -> None:
    cut = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "precision": precision}
    cut["no_weight_tying"] = True
    train(
        config(**ASKED, **cut, log_interval=2, extra_save_iters=[1], gradient_clipping=0.01),
        "-q",
        "--set",
        "train_iters=3",
    )
    first, second, third = metrics(tmp_path / "RUN")
    assert not {"param_norm", "tensor_grad_norm"} & (set(first) | set(third))
    step, group = tmp_path / "RUN" / "step_1", "model" if precision == "fp32" else "optimizer"
    prefix = "" if precision == "fp32" else "master/"
    with open_tensors(step) as model, open_tensors(step, group) as masters, open_tensors(step, "optimizer") as states:
        assert set(second["param_norm"]) == set(second["tensor_grad_norm"]) == set(model)
        for name in model:
            assert second["param_norm"][name] == pytest.approx(masters[prefix + name].norm().item(), rel=1e-5)
            for key in ("exp_avg", "exp_avg_sq"):
                found = second["optimizer_state_norm"][key][name]
                assert found == pytest.approx(states[f"{key}/{name}"].norm().item(), rel=1e-5)
    total = math.sqrt(sum(norm**2 for norm in second["tensor_grad_norm"].values()))
    assert total == pytest.approx(second["grad_norm"], rel=1e-4 if precision == "fp32" else 1e-2)
    # rows of the embedding whose tokens are not in the batch, at least the padding
    assert second["grad_pct_zeros"]["embed.weight"] > 100 * (384 - 258) / 384 - 1
    assert second["grad_pct_zeros"]["layers.0.mlp.up.weight"] < 1


class Noisy:
    """An engine whose gradients are a known mean plus noise of known variance."""

    device = torch.device("cpu")

    def __init__(self, mean: float, deviation: float, batch: int):
        self._mean, self._deviation = mean, deviation / math.sqrt(batch)
        self._random = torch.Generator().manual_seed(1)
        self._values: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        """Two tensors, 2000 numbers in all."""
        return ["a", "b"]

    def gradient(self, name: str) -> Tensor:
        """Another draw each time."""
        shape = (20, 50) if name == "a" else (1000,)
        return self._mean + self._deviation * torch.randn(shape, generator=self._random)


class Alone:
    """A group of one."""

    rank, world_size = 0, 1

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Of one."""
        return values


@pytest.mark.parametrize(("mean", "deviation", "batch"), [(0.1, 1.0, 8), (1.0, 1.0, 8), (0.1, 3.0, 64)])
@pytest.mark.parametrize("batches", [2, 5])
def test_noise_scale_of_a_known_case(mean: float, deviation: float, batch: int, batches: int) -> None:
    """tr(S) / |G|^2 is deviation^2 / mean^2 here, whatever the number of elements."""
    engine = Noisy(mean, deviation, batch)
    observer = NoiseScale(Alone(), batch, batches)
    found = [observer.before_update(engine) for _ in range(600 * batches)]
    assert [len(fields) for fields in found[: 2 * batches]] == ([0] * (batches - 1) + [1]) * 2
    assert found[-1]["noise_scale"] == pytest.approx((deviation / mean) ** 2, rel=0.1)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    engine = Noisy(1.0, 1.0, 8)
    observer = NoiseScale(Alone(), 8, 2)
    observer.before_update(engine)
    engine._mean = math.inf
    assert observer.before_update(engine) == {}
    engine._mean = 1.0
    assert observer.before_update(engine) == {}  # the first of two
    assert math.isfinite(observer.before_update(engine)["noise_scale"])


@pytest.mark.parametrize("offload", [False, True])
def test_noise_scale_in_a_run(train, config, metrics, offload: bool, tmp_path: Path) -> None:
    """The same at every stage; null is possible, so only its places and the agreement are certain."""
    found = {}
    for stage in (0, 1) if offload else (2, 3):
        run = tmp_path / str(stage)
        keys = {"log_gradient_noise_scale": True, "gradient_noise_scale_n_batches": 4, "save": str(run)}
        keys |= {"gradient_noise_scale_cpu_offload": offload, "zero_optimization": {"stage": stage}}
        train(config(**keys), "-q")
        found[stage] = [record.get("noise_scale", "none") for record in metrics(run)]
    first, second = found.values()
    assert [isinstance(value, str) for value in first] == [True, True, True, False] * 2
    for a, b in zip(first, second, strict=True):
        assert a == b if isinstance(a, str) or a is None else a == pytest.approx(b, rel=1e-2)
    assert first[-1] is not None


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(train, train_apart, config, metrics, tmp_path: Path) -> None:
    keys = ASKED | {"log_gradient_noise_scale": True, "gradient_noise_scale_n_batches": 2}
    train(config("one.yml", **keys, save=str(tmp_path / "one")), "-q", "--set", "train_iters=2")
    whole = metrics(tmp_path / "one")[-1]
    layouts = {"plain": {"engine": "plain"}, "zero2": {"zero_optimization": {"stage": 2}}}
    layouts["pipe"] = {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}}
    for name, more in layouts.items():
        run = tmp_path / name
        cut = {"train_micro_batch_size_per_gpu": 1, "train_iters": 2, "save": str(run)}
        layout = {"zero_optimization": {"stage": 0}} | more
        train_apart(config(f"{name}.yml", **keys, **cut, **layout), "-q", ranks=2)
        ours = metrics(run)[-1]
        assert ours["noise_scale"] == pytest.approx(whole["noise_scale"], rel=1e-2)
        for figure in ("param_norm", "tensor_grad_norm"):
            for tensor, value in whole[figure].items():
                assert ours[figure][tensor] == pytest.approx(value, rel=1e-3, abs=1e-6)
