# SPDX-License-Identifier: Apache-2.0
"""`neox-train bench`: the training step of a configuration beside the machine's limit and beside transformers.

The step is the run's own: its engine, objective, optimiser and settings, on random tokens. The peer is transformers'
GPTNeoXForCausalLM with its own loss, clipping and fused AdamW, in a bare loop in the same process, in rounds that take
turns. What we set for a whole process (`keep_host_memory`, `attention_kernel`) is taken back while the peer runs.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from libneox import host_memory
from libneox.config import NeoxConfig
from libneox.errors import InputMissing, UsageError
from libneox.model.documents import cu_seqlens_of, document_starts
from libneox.model.init import initial_value
from libneox.model_config import ModelConfig
from libneox.parallel.launch import discover
from libneox.parallel.mesh import Mesh
from neox_train import speed
from neox_train.ceiling import Ceiling, measure, wait
from neox_train.engines import DTYPES, build_engine
from neox_train.objective import MicroBatch
from neox_train.report import memory_gb
from neox_train.session import pick_device
from neox_train.threads import set_threads

LR = 1e-4
DOCUMENT = 512  # tokens
Step = Callable[[], torch.Tensor]


@dataclasses.dataclass
class Contender:
    """Somebody who trains.

    Attributes:
        step: one optimiser step, returns its loss.
        settle: settings of the process that belong to it, made before each of its rounds.
        first_s: its first step, with allocations and compilation.
        seconds: of every later step, on a GPU the mean of each round.
    """

    name: str
    step: Step
    settle: Callable[[], object]
    first_s: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory_gb: float | None = None

    def warm_up(self, device: torch.device) -> None:
        """The first step, and one more."""
        self.settle()
        self.first_s = _timed(self.step, device)
        _timed(self.step, device)

    def round(self, steps: int, device: torch.device) -> None:
        """Some timed steps; on a GPU they are queued one after the other, as in training, and timed together."""
        self.settle()
        if device.type != "cuda":
            self.seconds += [_timed(self.step, device) for _ in range(steps)]
            return
        torch.cuda.reset_peak_memory_stats(device)
        self.seconds.append(_timed(lambda: [self.step() for _ in range(steps)][-1], device) / steps)
        self.memory_gb = memory_gb()


def _timed(step: Step, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    step().item()
    wait(device)
    return time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained."""

    config: NeoxConfig
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    batch: int  # of a micro-batch
    accumulate: int

    @classmethod
    def of(cls, config: NeoxConfig) -> Task:
        """The configuration on this process's device.

        Raises:
            UsageError: there are several ranks.
        """
        launch = discover(os.environ)
        if launch.world_size > 1:
            raise UsageError("bench: measures one process; start it without a launcher")
        device, plan = pick_device(launch, config), config.batch_plan(1)
        if device.type == "cpu":
            set_threads(config.speed.cpu_threads)
        model = config.model_config(config.model.vocab_size or 50277)
        return cls(config, model, device, DTYPES[config.compute_precision], plan.micro_batch, plan.grad_accum)

    @property
    def tokens(self) -> int:
        """Of an optimiser step."""
        return self.batch * self.accumulate * self.model.seq_length

    def batches(self) -> list[MicroBatch]:
        """Random tokens: speed does not depend on them; with `document_mask` in documents of `DOCUMENT` on average."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.model.seq_length + 1)
        made = []
        for _ in range(self.accumulate):
            ids = torch.randint(0, self.model.vocab_size, shape, generator=generator)
            cu_seqlens = None
            if self.config.data.document_mask:
                ids[torch.rand(shape, generator=generator) < 1 / DOCUMENT] = 0
                cu_seqlens = cu_seqlens_of(document_starts(ids[:, :-1], eod_id=0)).to(self.device)
            ids = ids.to(self.device)
            made.append(MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), cu_seqlens=cu_seqlens))
        return made


def ours(task: Task) -> Contender:
    """neox-train's own step."""
    speed.set_up(task.config, task.device)
    kernel = speed.kernel_of(task.config, task.model, task.batch, task.dtype, task.device)
    speed.prefer_kernel(kernel, task.device)
    engine, batches = build_engine(task.config, task.model, task.device, Mesh()), task.batches()
    for name in engine.names():
        engine.restore_master(name, initial_value(task.model, name, 0))
    engine.train(True)

    def step() -> torch.Tensor:
        loss = engine.backward(batches)
        engine.step(LR)
        return loss

    def settle() -> None:
        speed.set_up(task.config, task.device)
        speed.put_first(kernel)

    return Contender("neox", step, settle)


def transformers(task: Task) -> Contender:
    """The same shape in transformers, in a bare loop.

    Raises:
        UsageError: transformers' GPT-NeoX has no such model, or no such attention.
        InputMissing: transformers is not installed.
    """
    if task.config.data.document_mask:
        raise UsageError("--vs hf: transformers' GPT-NeoX keeps no documents apart; set document_mask: false")
    model = _transformers_model(task.model).to(task.device, task.dtype).train()
    params = task.config.optimizer_params
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=tuple(params.get("betas", (0.9, 0.95))), weight_decay=0.1, fused=True
    )
    batches = task.batches()

    def step() -> torch.Tensor:
        losses = []
        for ids, targets, *_ in batches:
            # as many positions as ours predicts: transformers shifts labels itself
            loss = model(input_ids=ids, labels=torch.cat((ids[:, :1], targets[:, :-1]), 1)).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def settle() -> None:
        host_memory.release()
        speed.put_first("")

    return Contender("transformers", step, settle)


def _transformers_model(shape: ModelConfig) -> Any:
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError as error:
        raise InputMissing(
            "transformers is not installed; pip install 'neox-train[bench]', or leave --vs out"
        ) from error
    if shape.norm != "layernorm" or shape.pos_emb != "rotary" or shape.gated or shape.num_kv_heads != shape.num_heads:
        raise UsageError("--vs hf: transformers' GPT-NeoX has no such model; take a preset like pythia/160M")
    config = GPTNeoXConfig(
        vocab_size=shape.padded_vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.ffn_size, use_cache=False,
        max_position_embeddings=shape.max_position_embeddings, rotary_pct=shape.rotary_pct,
        use_parallel_residual=shape.residual == "parallel", hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout, tie_word_embeddings=shape.tie_embeddings,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def prepared(config: NeoxConfig, asked: set[str], batch: int | None, *, cpu_batch: int) -> NeoxConfig:
    """The configuration as one process runs it: one micro-batch a step, no ZeRO, no fp16, unless asked for.

    Args:
        asked: keys set on the command line.
        batch: of a micro-batch; default: the configuration's, on a CPU `cpu_batch`.
    """
    keys: dict[str, Any] = {"train_batch_size": None}
    if batch is None and not torch.cuda.is_available() and "train_micro_batch_size_per_gpu" not in asked:
        batch = cpu_batch
    if batch is not None:
        keys["train_micro_batch_size_per_gpu"] = batch
    if "gradient_accumulation_steps" not in asked:
        keys["gradient_accumulation_steps"] = 1
    if not any(name.startswith("zero_optimization") for name in asked):
        keys["zero_optimization"] = {"stage": 0}
    if config.compute_precision == "fp16" and not asked & {"precision", "fp16"}:
        keys["precision"] = "bfloat16"  # what is comparable everywhere
    return config.replace(**keys)


def benchmark(config: NeoxConfig, *, versus: bool, steps: int, rounds: int) -> dict[str, Any]:
    """Measure; the result is what `--json` prints."""
    task = Task.of(config)
    contenders = [ours(task), *([transformers(task)] if versus else [])]
    for contender in contenders:
        contender.warm_up(task.device)
    for _ in range(rounds):
        for contender in contenders:
            contender.round(steps, task.device)
    peak = memory_gb()  # before the ceiling's own buffers
    ceiling = measure(task.model, task.batch, task.model.seq_length, task.dtype, task.device)
    result = _about(task) | {
        "ceiling": {f"{k}_{'gb_per_s' if k == 'copy' else 'tflops'}": round(v / (1e9 if k == "copy" else 1e12), 4)
                    for k, v in dataclasses.asdict(ceiling).items()},
    }  # fmt: skip
    for contender in contenders:
        result[contender.name] = _figures(task, contender, ceiling)
    if versus:
        mine, theirs = contenders
        result["neox_over_transformers"] = round(statistics.median(theirs.seconds) / statistics.median(mine.seconds), 3)
    if task.device.type == "cpu":
        result["process_peak_gb"] = round(peak, 3)
    return result


def _about(task: Task) -> dict[str, Any]:
    on_gpu = task.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(task.device) if on_gpu else "cpu", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "dtype": task.config.compute_precision,
        "parameters": task.model.num_parameters(), "layers": task.model.num_layers, "hidden": task.model.hidden_size,
        "seq_length": task.model.seq_length, "micro_batch": task.batch, "grad_accum": task.accumulate,
        "tokens_per_step": task.tokens, "compiled": speed.compiles(task.config, task.device),
    }  # fmt: skip


def _figures(task: Task, contender: Contender, ceiling: Ceiling) -> dict[str, Any]:
    """One contender's numbers; shares use the median step."""
    length, seconds = task.model.seq_length, statistics.median(contender.seconds)
    flops, rate = task.model.flops_per_token(length), task.tokens / seconds
    roof = ceiling.seconds_per_token(task.model, length, task.dtype, task.tokens)
    figures = {
        "tokens_per_s": round(rate, 1),
        "step_s": round(seconds, 5),
        "best_step_s": round(min(contender.seconds), 5),
        "first_step_s": round(contender.first_s, 2),
        "tflops_palm": round(rate * flops.palm / 1e12, 4),
        "tflops_causal": round(rate * flops.causal / 1e12, 4),
        "mfu_palm": round(rate * flops.palm / ceiling.square, 4),
        "mfu_causal": round(rate * flops.causal / ceiling.square, 4),
        "share_of_roofline": round(roof * rate, 4),
    }
    return figures | ({"memory_gb": round(contender.memory_gb, 3)} if contender.memory_gb is not None else {})


def render(result: dict[str, Any]) -> str:
    """The result for people."""
    about = {k: v for k, v in result.items() if not isinstance(v, dict)}
    lines = [f"{key:24} {value:,}" if isinstance(value, int) else f"{key:24} {value}" for key, value in about.items()]
    lines += [f"ceiling {key:16} {value:,.3f}" for key, value in result["ceiling"].items()]
    sides = [name for name in ("neox", "transformers") if name in result]
    lines.append("".join([f"{'':24}", *(f"{name:>14}" for name in sides)]))
    for key in result["neox"]:
        lines.append(f"{key:24} " + "".join(f"{result[side].get(key, ''):>14,}" for side in sides).strip("\n"))
    return "\n".join(lines) + "\n"
