# SPDX-License-Identifier: Apache-2.0
"""A loop that begins a step before it looks at the last one: the same numbers, and nothing that a fault can spoil.

It is for GPUs; here the CPU is told to do it as well, where every tensor is there at once but read as late.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox import run_directory
from libneox.config import load_config
from libneox.parallel.mesh import Mesh
from neox_train import loop, speed
from neox_train.engines import build_engine
from neox_train.late import later
from neox_train.objective import MicroBatch
from tests.libneox.model.no_host import no_host
from tests.neox_train.conftest import same_checkpoint

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32,
    "train_batch_size": 2, "train_iters": 3, "precision": "bfloat16", "vocab_size": 96, "engine": "plain",
    "optimizer": {"type": "adam", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 0}, "compile": "off",
}  # fmt: skip
PLAIN = {"zero_optimization": {"stage": 0}}
CPU = torch.device("cpu")
NAME = "layers.1.mlp.up.weight"
SAME = {"step", "samples", "tokens", "loss", "lr", "grad_norm", "valid_loss", "valid_ppl"}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Runs go ahead; gives, for each step begun, its number and that of the one nobody had looked at then."""
    monkeypatch.setattr(speed, "runs_ahead", lambda config, device: config.speed.run_ahead)
    begun: list[tuple[int, int | None]] = []
    begin = loop.begin_step

    def begin_step(run: loop.Run) -> loop.Begun:
        begun.append((run.state.step + 1, run.begun and run.begun.step))
        return begin(run)

    monkeypatch.setattr(loop, "begin_step", begin_step)
    return begun


def test_for_gpus_and_by_the_key() -> None:
    for on in (True, False):
        config = load_config([{"run_ahead": on}])
        assert [speed.runs_ahead(config, torch.device(kind)) for kind in ("cuda", "cpu")] == [on, False]


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_changes_no_number(ahead: Any, train, config, metrics, precision: str, tmp_path: Path) -> None:
    """Neither of a step nor of a checkpoint; it catches up before whatever is not a step."""
    keys = PLAIN | {"precision": precision, "checkpoint_factor": 5, "eval_interval": 4, "eval_iters": 1}
    records = []
    for on in (True, False):
        save = tmp_path / str(on)
        train(config(f"{on}.yml", save=str(save), run_ahead=on, **keys), "-q")
        records.append([{k: v for k, v in record.items() if k in SAME} for record in metrics(save)])
        if on:  # steps 4, 5 and 8 are followed by something
            assert ahead == [(1, None), (2, 1), (3, 2), (4, 3), (5, None), (6, None), (7, 6), (8, 7)]
            ahead.clear()
    assert {earlier for _, earlier in ahead} == {None}
    assert records[0] == records[1]
    assert all(len(record) >= len(SAME) - 2 for record in records[0])
    assert same_checkpoint(tmp_path / "True" / "step_8", tmp_path / "False" / "step_8")


def test_times_add_up(ahead: Any, train, config, metrics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step's seconds end where the next one's begin, though it was begun before that."""
    clock, read = [0.0], []

    class Time:
        @staticmethod
        def perf_counter() -> float:
            """Another second each time the loop looks, and it alone does."""
            clock[0] += 1.0
            read.append(clock[0])
            return clock[0]

    monkeypatch.setattr(loop, "time", Time)
    train(config(**PLAIN), "-q")
    seconds = [record["step_s"] for record in metrics(tmp_path / "RUN")]
    assert len(read) == 3 * 8, "once when a step begins, twice when it ends"
    assert min(seconds) > 0
    assert sum(seconds) <= clock[0] - 8, "what is between the end of a step and its report is not counted"


@pytest.mark.parametrize("on", [True, False])
def test_a_checkpoint_is_committed_while_training_goes_on(
    ahead: Any, on: bool, train, config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As soon as every rank has seen that its files are written, and not at the next save."""
    begin, end, committed = loop.begin_step, loop.end_step, {}

    def begin_step(run: loop.Run) -> loop.Begun:
        if run.saver.busy:
            run.saver._open.written.result(timeout=30)  # type: ignore[union-attr]
        return begin(run)

    def end_step(run: loop.Run, begun: loop.Begun) -> str:
        stopping = end(run, begun)
        committed[begun.step] = run_directory.list_steps(tmp_path / "RUN")
        return stopping

    monkeypatch.setattr(loop, "begin_step", begin_step)
    monkeypatch.setattr(loop, "end_step", end_step)
    done = train(config(checkpoint_factor=3, async_save=True, run_ahead=on, **PLAIN), "-q")
    assert committed == {1: [], 2: [], 3: [], 4: [3], 5: [3], 6: [3], 7: [3, 6], 8: [3, 6]}
    assert done.lines == [str(tmp_path / "RUN" / f"step_{step}") for step in (3, 6, 8)]


def test_a_stop_comes_one_step_later_and_loses_nothing(
    ahead: Any, train, config, losses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(config("whole.yml", save=str(tmp_path / "whole"), **PLAIN), "-q")
    begin = loop.begin_step

    def asked(run: loop.Run) -> loop.Begun:
        if run.state.step == 2:
            run.stop.name = "SIGTERM"
        return begin(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "begin_step", asked)
        done = train(config(**PLAIN), "-q", code=75)
    assert "stopped by SIGTERM after step 4" in done.stderr
    train(config(**PLAIN), "-q")
    assert losses(tmp_path / "RUN") == losses(tmp_path / "whole")
    assert same_checkpoint(tmp_path / "RUN" / "step_8", tmp_path / "whole" / "step_8")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_a_number_is_named_and_changes_no_weight(
    ahead: Any, what: str, train, config, metrics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Step 6 is under way when it is noticed: neither 5 nor 6 is applied."""
    begin, weights, runs, calls = loop.begin_step, [], [], []

    def poisoned(run: loop.Run) -> loop.Begun:
        runs.append(run)
        engine, step = run.engine, run.state.step + 1
        if step in (5, 6):
            weights.append([master.clone() for master in engine._masters.values()])
        if step == 5 and what == "loss":
            backward = engine.backward
            monkeypatch.setattr(engine, "backward", lambda batches: backward(batches) * float("nan"))
        if step == 5 and what == "gradient":
            engine.local()[NAME].register_post_accumulate_grad_hook(spoil)
        return begin(run)

    def spoil(weight: torch.Tensor) -> None:
        """In step 5, and when it is computed again; not in step 6 between."""
        calls.append(1)
        if len(calls) != 2:
            weight.grad.fill_(float("inf"))  # type: ignore[union-attr]

    monkeypatch.setattr(loop, "begin_step", poisoned)
    done = train(config(checkpoint_factor=4, **PLAIN), "-q", code=80)
    assert f"step 5: the {what} is" in done.stderr
    assert "samples 16 to 19" in done.stderr
    if what == "gradient":
        assert f"the first is that of {NAME}" in done.stderr
        after = [master.clone() for master in runs[0].engine._masters.values()]
        assert all(torch.equal(*pair) for pair in zip(weights[0], weights[1], strict=True))
        assert all(torch.equal(*pair) for pair in zip(weights[0], after, strict=True))
    assert [record["step"] for record in metrics(tmp_path / "RUN")] == [1, 2, 3, 4]
    assert done.lines == [str(tmp_path / "RUN" / "step_4")]


def test_who_looks_at_a_step_keeps_the_next_one_waiting(ahead: Any, train, config) -> None:
    train(config(log_grad_norm=True, **PLAIN), "-q")
    assert {earlier for _, earlier in ahead} == {None}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pos_emb": "rotary", "precision": "fp32", "hidden_dropout": 0.1, "attention_dropout": 0.1},
        {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True, "checkpoint_activations": True},
        {"pos_emb": "alibi", "norm": "rmsnorm", "activation": "swiglu", "checkpoint_policy": "selective"},
        {"pos_emb": "rpe", "qk_norm": "head"},
        {"pos_emb": "sinusoidal", "use_mup": True, "mup_base_hidden_size": 32},
    ],
)
def test_a_step_needs_nothing_of_the_host(keys: dict[str, Any], ahead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory: whoever would read a number there, as a GPU would be waited for, gets an error."""
    checks = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(checks, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config, device = load_config([SHAPE | keys]), torch.device("meta")
    engine = build_engine(config, config.model_config(96), device, Mesh())
    engine.train(True)
    ids, mask = torch.zeros(2, 32, dtype=torch.long, device=device), torch.ones(2, 32, device=device)
    bounds = torch.zeros(64, dtype=torch.int32, device=device)
    batches = [MicroBatch(ids, ids, mask), MicroBatch(ids, ids, cu_seqlens=bounds, divisor=mask.sum())]
    for first in (True, False):  # what is made once may be copied
        with contextlib.nullcontext() if first else no_host():
            loss = engine.backward(batches)
            outcome = engine.step(1e-3)
    assert all(x.device == device for x in (loss, *outcome))
    with pytest.raises(RuntimeError, match="meta tensors"):
        loss.item()


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_only_an_optimiser_that_can_leave_out_a_step(ahead: Any, optimizer: str, train, config) -> None:
    keys = {"optimizer": {"type": optimizer, "params": {"lr": 1e-3}}, "engine": "plain"}
    train(config(**PLAIN, **keys, train_iters=3), "-q")
    assert ahead[1] == (2, 1 if optimizer == "adam" else None)


def test_two_ranks(train_apart, config, script, losses, tmp_path: Path) -> None:
    forced = script("from neox_train import speed", "speed.runs_ahead = lambda config, device: config.speed.run_ahead")
    for on in (True, False):
        path = config(f"{on}.yml", save=str(tmp_path / str(on)), run_ahead=on, engine="plain", **PLAIN)
        train_apart(path, "-q", ranks=2, script=forced)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert same_checkpoint(tmp_path / "True" / "step_8", tmp_path / "False" / "step_8")


def test_later_on_a_cpu() -> None:
    assert later([torch.tensor(2.5), 3.0, torch.tensor(True)], CPU)() == [2.5, 3.0, 1.0]


@pytest.mark.gpu
def test_later_waits_for_nothing_that_comes_after() -> None:
    device = torch.device("cuda")
    large = torch.randn(8192, 8192, device=device)
    read = later([torch.ones((), device=device) * 2, 5.0], device)
    for _ in range(20):
        large = large @ large
    done = torch.cuda.Event()
    done.record()
    assert read() == [2.0, 5.0]
    assert not done.query(), "twenty products are still under way"


@pytest.mark.gpu
def test_an_update_is_left_out_by_the_device() -> None:
    device = torch.device("cuda")
    config = load_config([SHAPE])
    engine = build_engine(config, config.model_config(96), device, Mesh())
    assert engine.queues
    for name in engine.names():
        engine.restore_master(name, torch.randn(config.model_config(96).parameter_shapes()[name]) / 8)
    ids = torch.randint(0, 96, (2, 33), device=device)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:])
    engine.backward([batch])
    assert not bool(engine.step(1e-3).skipped)
    before = {name: engine.master(name).clone() for name in engine.names()}
    for bad in (True, False):  # the second one is well, and comes too late
        engine.backward([batch])
        if bad:
            engine.local()["head.weight"].grad[0, 0] = float("inf")
        assert bool(engine.step(1e-3).skipped) == bad
        assert all(torch.equal(engine.master(name), before[name]) for name in before)
