# SPDX-License-Identifier: Apache-2.0
"""What is done for speed changes no number, and can be switched off."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox import host_memory
from libneox.config import BatchPlan, load_config
from libneox.errors import DataError, UsageError
from libneox.model import Transformer, cpu_attention, init_weights, loss, products
from libneox.parallel.group import Group
from libneox.parallel.launch import discover
from libneox.run_directory import CheckpointRef
from neox_train import speed
from neox_train.ahead import Ahead
from neox_train.recompute import recompute_blocks
from neox_train.resume import Start, made_by_same_command
from neox_train.setup import with_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "max_position_embeddings": 16,
    "pos_emb": "rotary", "gpt_j_residual": True, "train_batch_size": 2, "train_iters": 10, "vocab_size": 50,
}  # fmt: skip
OFF = {"cpu_products": "torch", "freeze_gc": False, "prefetch": False, "attention_kernel": "torch", "compile": "off"}


def config_of(**keys: Any) -> Any:
    return load_config([SHAPE | keys])


def test_same_run_without_any(config: Callable[..., Path], train: Callable[..., Any], losses: Any, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Everything on, beside everything off."""
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    fast, plain = tmp_path / "fast", tmp_path / "plain"
    shared = {"zero_optimization": {"stage": 0}, "hidden_dropout": 0.1}
    tiles: list[int] = []
    attention = cpu_attention.attention
    monkeypatch.setattr(cpu_attention, "attention", lambda *a: tiles.append(1) or attention(*a))
    train(config("fast.yml", save=str(fast), **shared, cpu_products="onednn"))
    assert tiles
    tiles.clear()
    assert gc.isenabled()
    train(config("plain.yml", save=str(plain), **shared, **OFF))
    assert not tiles
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "dtype", "limit"),
    [
        (False, torch.float32, 1e-5), (True, torch.float32, 1e-5),
        pytest.param(False, torch.bfloat16, 3e-2, marks=pytest.mark.skipif(
            not products.has_onednn(torch.bfloat16), reason="no bfloat16 in this CPU")),
    ],
)  # fmt: skip
def test_compiled_blocks(recompute: bool, dtype: torch.dtype, limit: float) -> None:
    products.use_onednn(torch.bfloat16)
    shape = config_of(hidden_dropout=0.2).model_config(50)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = init_weights(Transformer(shape), 0).to(dtype).train()
        if compiled:
            speed.compile_blocks(model)
        if recompute:
            recompute_blocks(model, 1)
        torch.manual_seed(1)
        hidden = model.hidden(ids)
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
        found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        assert (a - b).float().norm() <= limit * a.float().norm()


def test_auto_compiles_long_runs_it_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_no_triton", lambda device: "")

    def auto(device: torch.device = GPU, **keys: Any) -> bool:
        return speed.compiles(config_of(**keys), device)

    assert auto(train_iters=1000)
    assert not auto(train_iters=100)
    assert not auto(CPU, train_iters=1000)
    assert not auto(train_iters=1000, compile="off")
    assert not auto(train_iters=1000, model_parallel_size=2)
    assert not auto(train_iters=1000, zero_optimization={"stage": 3})
    assert auto(CPU, train_iters=5000, precision="fp32") == bool(shutil.which("g++"))
    bfloat16 = products.has_onednn(torch.bfloat16) and bool(shutil.which("g++"))
    assert auto(CPU, train_iters=5000, precision="bfloat16") == bfloat16
    assert not auto(CPU, train_iters=5000, precision="bfloat16", cpu_products="torch")
    assert auto(train_iters=10, compile="on")
    with pytest.raises(UsageError, match="compile: ZeRO stage 3"):
        auto(compile="on", zero_optimization={"stage": 3})


def test_no_compiler_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not speed.compiles(config_of(train_iters=10**6), CPU)
    with pytest.raises(UsageError, match="no C\\+\\+ compiler"):
        speed.compiles(config_of(compile="on"), CPU)


def test_no_triton_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for triton, path, why in ((False, None, "there is no Triton"), (True, "/nowhere", "there is no C compiler")):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda triton=triton: triton)
        if path:
            monkeypatch.setenv("PATH", path)
        assert not speed.compiles(config_of(train_iters=10**6), GPU)
        with pytest.raises(UsageError, match=f"compile: {why}"):
            speed.compiles(config_of(compile="on"), GPU)


def test_products_follow_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    monkeypatch.setattr(products, "has_onednn", lambda dtype: True)
    for asked, slow, expected in (
        ("auto", True, {bf16, fp32}), ("auto", False, {bf16}), ("onednn", False, {bf16, fp32}), ("torch", True, set()),
    ):  # fmt: skip
        monkeypatch.setattr(products, "mkl_is_slow", lambda slow=slow: slow)
        speed.set_up(config_of(cpu_products=asked, keep_host_memory=False), CPU)
        assert products._onednn == expected
    monkeypatch.setattr(products, "has_onednn", lambda dtype: False)
    with pytest.raises(UsageError, match="cpu_products: this torch"):
        speed.set_up(config_of(cpu_products="onednn", keep_host_memory=False), CPU)


def test_host_memory_follows_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(host_memory, "keep", lambda: kept.append(1))
    speed.set_up(config_of(keep_host_memory=False), CPU)
    assert not kept
    speed.set_up(config_of(), CPU)
    assert kept


def test_fastest_kernel_is_one_that_runs() -> None:
    shape = config_of().model_config(50)
    assert speed.fastest_kernel(shape, 2, torch.float32, CPU) in ("flash", "math")


def test_the_kernel_asked_for_is_tried_first_from_then_on() -> None:
    def order() -> list[Any]:
        return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)

    usual = order()
    for name, first in (("math", "math"), ("cudnn", "cudnn"), ("auto", ""), ("efficient", "efficient"), ("torch", "")):
        speed.prefer_kernel(name, CPU)
        gc.collect()
        assert order()[0] == (speed.KERNELS[first] if first else usual[0])
    assert order() == usual


def test_a_run_keeps_the_kernel_that_its_first_trial_chose(
    monkeypatch: pytest.MonkeyPatch, config: Callable[..., Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    trials = iter(["cudnn", "flash"])
    monkeypatch.setattr(speed, "fastest_kernel", lambda *_: next(trials))
    group, plan = Group(discover({}), timeout_s=1), Counted.plan

    def chosen(start: Start, device: torch.device = GPU, **keys: Any) -> str:
        settled, notes = with_kernel(config_of(**keys), config_of().model_config(50), plan, device, start, group)
        kernel = settled.speed.attention_kernel
        assert notes == ([f"attention_kernel: {kernel}"] if device == GPU and not keys else [])
        return kernel

    fresh = Start(None, own=False, note="")
    assert chosen(fresh) == "cudnn"
    assert chosen(fresh, attention_kernel="math") == "math"
    assert chosen(fresh, CPU) == "auto"
    train(config(attention_kernel="efficient", train_iters=1), "-q")  # a run that began with it
    path = tmp_path / "RUN" / "step_1"
    assert chosen(Start(CheckpointRef(path, "neox", 1), own=True, note="")) == "efficient"
    assert chosen(Start(CheckpointRef(path, "neox", 1), own=False, note="")) == "flash"
    stored = load_config([str(path / "config.yml")])
    assert made_by_same_command(stored.replace(attention_kernel="auto"), path)


def test_kernels_agree() -> None:
    q = torch.randn(2, 4, 16, 8)
    outs = []
    for name in ("flash", "math"):
        with torch.nn.attention.sdpa_kernel([speed.KERNELS[name]]):
            outs.append(torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    torch.testing.assert_close(*outs)


def test_collector_runs_between_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *a: calls.append(1))
    quiet = speed.QuietCollector(every=3)
    for step in range(1, 8):
        quiet.begin_step(step)
        assert not gc.isenabled()
    assert len(calls) == 3  # the first step, 3 and 6
    quiet.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


class Counted:
    """Stands in for Batches: a step is a list with what it was asked for."""

    plan = BatchPlan(global_batch=4, micro_batch=2, grad_accum=2, data_parallel=1)

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []

    def step(self, first: int, length: int | None = None) -> Iterator[Any]:
        self.asked.append((first, length))
        if first == 12:
            raise DataError("sample 12 is bad")
        return iter([first, length])


def test_batches_ahead_are_the_ones_asked_for() -> None:
    batches = Counted()
    ahead = Ahead(batches)  # type: ignore[arg-type]
    assert [list(ahead.step(first, 16)) for first in (0, 4)] == [[0, 16], [4, 16]]
    assert list(ahead.step(8, 8)) == [8, 8]  # another length than expected
    with pytest.raises(DataError, match="sample 12"):
        ahead.step(12, 8)
    assert list(ahead.step(0, 8)) == [0, 8]
    assert batches.asked[:2] == [(0, 16), (4, 16)]


def test_chunks_of_the_loss_follow_the_key(config: Callable[..., Path], train: Callable[..., Any], losses: Any,
                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Chunks of a few positions, as a large vocabulary has them, beside all logits at once."""
    counted: list[int] = []
    chunks = loss._chunks
    monkeypatch.setattr(loss, "_chunks", lambda *a: counted.append(len(list(chunks(*a)))) or chunks(*a))
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cuda": 4 * 320 * 30})
    found = []
    for name, mb in (("default", None), ("whole", 0)):
        counted.clear()
        keys = {"zero_optimization": {"stage": 0}, "loss_chunk_mb": mb, "train_iters": 3}
        train(config(f"{name}.yml", save=str(tmp_path / name), **keys))
        found.append((min(counted), losses(tmp_path / name)))
    (many, ours), (one, whole) = found
    assert (many > 3, one) == (True, 1)
    assert ours == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_run(stage: int, config: Callable[..., Path], train: Callable[..., Any], losses: Any,
                      tmp_path: Path) -> None:  # fmt: skip
    """Under both engines, with an evaluation in the midst of training."""
    keys = {"zero_optimization": {"stage": stage}, "train_iters": 4, "eval_interval": 2, "eval_iters": 1}
    for compiled in ("on", "off"):
        save = tmp_path / compiled
        done = train(config(f"{compiled}.yml", save=str(save), compile=compiled, **keys))
        assert ("time of a compilation" in done.stderr) == (compiled == "on")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
