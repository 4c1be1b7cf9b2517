# SPDX-License-Identifier: Apache-2.0
"""The same numbers however a run is laid out, and from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from libneox.checkpoint.load import load_model
from libneox.checkpoint.store import open_tensors
from libneox.config import load_config
from libneox.data.splits import build_splits


@pytest.fixture
def whole(train, config, losses, tmp_path: Path) -> list[float]:
    """Losses of the uninterrupted run at ZeRO 1 on one rank."""
    train(config("whole.yml", save=str(tmp_path / "whole")), "-q")
    return losses(tmp_path / "whole")


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


TP, PP = {"model_parallel_size": 2}, {"pipe_parallel_size": 2}
SEVERAL = [
    *((2, zero(stage), "fp32") for stage in (1, 2, 3)),
    *((2, keys, "fp32") for keys in (TP, PP)),
    (4, TP | PP, "fp32"),
    *((2, keys, "bfloat16") for keys in (zero(1), zero(3), TP)),
    (4, TP | PP, "bfloat16"),
]
MATRIX = [
    *((1, zero(stage), "fp32") for stage in (0, 2, 3)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SEVERAL),
]


@pytest.mark.parametrize(("ranks", "keys", "precision"), MATRIX, ids=str)
def test_ten_steps_equal_those_of_one_process(
    train, train_apart, config, losses, ranks: int, keys: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    """Beside ZeRO 1 on one rank. Four samples a step, one or two in each micro-batch of several ranks."""
    # the padding of the vocabulary must not follow the number of ranks, or the losses would
    same = {"train_iters": 10, "padded_vocab_size": 384, "precision": precision}
    train(config("whole.yml", save=str(tmp_path / "whole"), **same), "-q")
    if ranks == 1:
        train(config(**same | keys), "-q")
    else:
        batch = 1 if "pipe_parallel_size" in keys else 2
        train_apart(config(**same | keys, train_micro_batch_size_per_gpu=batch), "-q", ranks=ranks, timeout=300)
    found, wanted = losses(tmp_path / "RUN"), losses(tmp_path / "whole")
    assert len(wanted) == 10
    assert found == pytest.approx(wanted, rel=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_equals_one_of_plain_torch(train, config, metrics, stage: int, tmp_path: Path) -> None:
    """Loss, norm and weights; with SGD and no decay the change of a weight is its gradient."""
    lr = 0.5
    path = config(
        zero_optimization={"stage": stage}, train_iters=1, optimizer={"type": "sgd", "params": {"lr": lr}},
        gradient_clipping=0, weight_decay=0.0, lr_decay_style="constant", warmup=0.0, extra_save_iters=[0],
        train_micro_batch_size_per_gpu=2,
    )  # fmt: skip
    train(path, "-q")
    tokens = build_splits(load_config([path]), train_samples=4).train.read(np.arange(4)).tokens.astype(np.int64)
    model = load_model(tmp_path / "RUN/step_0").train()
    logits = model(torch.from_numpy(tokens[:, :-1].copy()))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:].copy()).flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    (record,) = metrics(tmp_path / "RUN")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    with open_tensors(tmp_path / "RUN/step_0") as before, open_tensors(tmp_path / "RUN/step_1") as after:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-6, atol=1e-7, msg=name)
            gradient = (before[name] - after[name]) / lr
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_the_plain_engine_is_the_reference(train, config, metrics, precision: str, stage: int, tmp_path: Path) -> None:
    """Losses, gradient norms and weights of five steps. With SGD a wrong gradient is a wrong weight."""
    more = {"precision": precision, "train_iters": 5, "train_micro_batch_size_per_gpu": 2}
    if precision == "fp32":
        more |= {"optimizer": {"type": "sgd", "params": {"lr": 0.5, "momentum": 0.9}}, "gradient_clipping": 0.5}
    train(config("z.yml", zero_optimization={"stage": stage}, **more), "-q")
    train(config("p.yml", save=str(tmp_path / "plain"), engine="plain", **more), "-q")
    close = 1e-6 if precision == "fp32" else 2e-2
    for ours, reference in zip(metrics(tmp_path / "RUN"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=close)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=close)
    group = "model" if precision == "fp32" else "optimizer"
    with (
        open_tensors(tmp_path / "RUN/latest", group) as a,
        open_tensors(tmp_path / "plain/latest", group) as b,
    ):
        assert set(a) == set(b)
        for name in a:
            if precision == "fp32" or name.startswith("master/"):
                wide = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.1, "atol": 2e-3}
                ours, reference = a[name], b[name]
                if name.endswith("qkv.bias") and precision != "fp32":
                    # softmax does not see the keys' bias: its gradient is rounding, of which Adam makes whole steps
                    ours, reference = (torch.stack((t.chunk(3)[0], t.chunk(3)[2])) for t in (ours, reference))
                torch.testing.assert_close(ours, reference, **wide)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_every_stage_resumes_exactly(train, config, losses, precision: str, stage: int, tmp_path: Path) -> None:
    more = {"precision": precision, "zero_optimization": {"stage": stage}, "train_iters": 6}
    train(config("w.yml", save=str(tmp_path / "w"), **more), "-q")
    path = config(**more)
    train(path, "-q", "--set", "exit_interval=3", code=75)
    train(path, "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "w")


def test_gradients_summed_in_float32_resume_exactly(train, config, losses, tmp_path: Path) -> None:
    more = {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}, "train_micro_batch_size_per_gpu": 1}
    train(config("w.yml", save=str(tmp_path / "w"), train_iters=6, **more), "-q")
    path = config(train_iters=6, **more)
    train(path, "-q", "--set", "exit_interval=3", code=75)
    train(path, "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "w")


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("adamw", {"lr": 0.006, "amsgrad": True, "fused": False}),
        ("sgd", {"lr": 0.5, "momentum": 0.9}),
        ("sgd", {"lr": 1.0}),
        ("lion", {"lr": 0.003}),
        ("madgrad_wd", {"lr": 0.02}),
        ("sm3", {"lr": 0.1, "momentum": 0.9}),
        ("adafactor", {"lr": 0.3}),
        ("muon", {"lr": 0.02, "adam_lr": 0.006}),
    ],
)
def test_every_optimizer_learns_and_resumes_exactly(
    train, config, losses, kind: str, params: dict[str, float], tmp_path: Path
) -> None:
    more = {"optimizer": {"type": kind, "params": params}, "zero_optimization": {"stage": 0}, "warmup": 0.0}
    train(config("w.yml", save=str(tmp_path / "w"), **more), "-q")
    path = config(**more)
    train(path, "-q", "--set", "exit_interval=4", code=75)
    train(path, "-q")
    found = losses(tmp_path / "w")
    assert losses(tmp_path / "RUN") == found
    assert found[-1] < found[0] - 0.05


def test_a_run_moves_between_layouts(train, train_apart, config, losses, metrics, whole, tmp_path: Path) -> None:
    """Two ranks at ZeRO 3, then one at ZeRO 1, then two at ZeRO 2: the losses of the uninterrupted run."""
    path = config(train_micro_batch_size_per_gpu=2)

    def stage(number: int, stop: int) -> tuple[str, ...]:
        return "-q", "--set", f"zero_optimization.stage={number}", "--set", f"exit_interval={stop}"

    train_apart(path, *stage(3, 3), ranks=2, code=None)
    train(path, *stage(1, 6), code=75)
    train_apart(path, *stage(2, 100), ranks=2)
    assert losses(tmp_path / "RUN") == pytest.approx(whole, rel=1e-5)
    assert [record["samples"] for record in metrics(tmp_path / "RUN")] == [4 * i for i in range(1, 9)]


def test_fp16_scales_the_loss(train, config, metrics, monkeypatch, tmp_path: Path) -> None:
    """A CPU has no fast fp16, but enough of it to see the scaler work and resume."""
    from deepspeed.accelerator import get_accelerator

    from neox_train import session

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(session, "pick_device", lambda launch, config: torch.device("cpu"))
    fp16 = {"initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1, "loss_scale": 0}
    more = {"precision": "fp16", "fp16": fp16, "train_iters": 12}
    done = train(config("w.yml", save=str(tmp_path / "w"), **more))
    assert "grad inf" in done.stderr  # the line of a step that was skipped
    path = config(**more)
    train(path, "-q", "--set", "exit_interval=2", code=75)
    train(path, "-q", "--set", "exit_interval=9", code=75)
    train(path, "-q")
    whole, pieces = metrics(tmp_path / "w"), metrics(tmp_path / "RUN")
    assert [r["loss"] for r in pieces] == [r["loss"] for r in whole]
    skipped = [r["step"] for r in whole if r.get("skipped")]
    assert 0 < len(skipped) < 10
    first = whole[len(skipped)]
    assert first["lr"] == whole[0]["lr"]  # skipped steps do not move the schedule


def test_fp16_that_no_scale_saves_ends_with_80(train, config, monkeypatch) -> None:
    from deepspeed.accelerator import get_accelerator

    from neox_train import session

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(session, "pick_device", lambda launch, config: torch.device("cpu"))
    fp16 = {"initial_scale_power": 40, "min_loss_scale": 2**39, "hysteresis": 1, "loss_scale": 0}
    done = train(config(precision="fp16", fp16=fp16), code=80)
    assert "not finite at the smallest loss scale either" in done.stderr


@pytest.mark.slow
def test_the_plain_engine_averages_over_ranks_and_moves_to_zero(
    train, train_apart, config, losses, whole, tmp_path: Path
) -> None:
    path = config(train_micro_batch_size_per_gpu=2)
    train_apart(path, "-q", "--set", "engine=plain", "--set", "exit_interval=4", ranks=2, code=None)
    train(path, "-q", "--set", "engine=deepspeed")
    assert losses(tmp_path / "RUN") == pytest.approx(whole, rel=1e-5)


def test_engines_that_cannot_be_are_refused(train, config) -> None:
    done = train(config(engine="plain", zero_optimization={"stage": 2}), code=2)
    assert "partitions nothing" in done.stderr
    done = train(config(engine="deepspeed", optimizer={"type": "sm3", "params": {"lr": 0.1}}), code=2)
    assert "whole matrices" in done.stderr


def test_what_deepspeed_does_not_take_is_refused(train, config) -> None:
    for changes, message in (
        ({"deepspeed_extra_args": {"nebula": {"enabled": True}}}, "Nebula checkpointing has been removed"),
        ({"csv_monitor": {"enabled": True, "colour": "red"}}, "colour"),
    ):
        done = train(config(**changes), code=2)
        assert "DeepSpeed does not take its settings: " in done.stderr
        assert message in done.stderr


def test_fp16_on_a_cpu_is_refused_with_the_remedy(train, config) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = train(config(precision="fp16"), code=2)
    assert "--set precision=fp32" in done.stderr


def test_what_deepspeed_alone_does_is_done_by_it_or_told(train, config, tmp_path: Path) -> None:
    from libneox.config import load_config
    from neox_train.engines import runs_plain

    offload = {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    for stage in (0, 1):
        own = load_config([config(engine="auto", zero_optimization={"stage": stage, "reduce_scatter": True})])
        assert (runs_plain(own, 1), runs_plain(own, 2)) == (True, False)
    assert not runs_plain(load_config([config(zero_optimization=offload)]), 1)
    assert not runs_plain(load_config([config(zero_optimization={"stage": 0}, fp32_allreduce=True)]), 1)
    path = config(zero_optimization=offload, data_types={"grad_accum_dtype": "fp32"}, engine="plain", train_iters=1)
    done = train(path)
    told = "data_types, zero_optimization.offload_optimizer: the plain engine runs this and does nothing about it"
    assert told in done.stderr
