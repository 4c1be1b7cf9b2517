# SPDX-License-Identifier: Apache-2.0
"""What a run would cost, from arithmetic alone: parameters, memory of each rank, tokens, schedule, FLOPs.

Memory is an estimate of what the model needs. It leaves out the framework's own memory (about 1 GB on a GPU),
fragmentation and DeepSpeed's buffers; the formulas are part of the answer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from libneox.config.engine import is_plain
from libneox.config.partition import partition
from libneox.config.writer import write_yaml
from libneox.curriculum import curriculum_of, periods
from libneox.errors import UsageError
from libneox.files import human_bytes

if TYPE_CHECKING:
    from libneox.config.batch import BatchPlan
    from libneox.config.tree import NeoxConfig
    from libneox.model_config import ModelConfig

VOCAB_SIZES = {"GPT2BPETokenizer": 50257, "HFGPT2Tokenizer": 50258, "CharLevelTokenizer": 512}
STATES_PER_PARAMETER = {"lion": 1, "muon": 1, "sm3": 1, "adafactor": 0, "madgrad_wd": 3}  # others: Adam's 2
REPLICATED = ("_norm.weight", "_norm.bias", "attn.out.bias", "mlp.down.bias", "pos_embed.weight")
LOSS_CHUNK_TOKENS = 1024  # the loss makes logits of so many tokens at a time
FORMULAS = {
    "weights": "parameters of the stage / TP (norms and output biases whole), 2 bytes each (fp32: 4); ZeRO-3: / DP",
    "gradients": "as many, 2 bytes each (fp32 or grad_accum_dtype fp32: 4); ZeRO-2 and 3: / DP",
    "optimizer": "fp32 copy and moments (Adam 2), 4 bytes each, / DP (plain engine: whole, and no copy in fp32; "
    "use_bnb_optimizer: moments 1 byte)",
    "update": "plain engine in bfloat16: gradients once more in fp32 (Adam of one rank on a CPU does without) when the "
    "activations are gone; the total has the larger of the two",
    "activations": "micro-batch * sequence * batches in flight (PP - stage; dualpipev PP + 1/2) * layers of the stage "
    "* numbers kept, which are 4h (norms and their inputs; 3h in parallel blocks; / TP with sequence_parallel) + "
    "(3q + 3kv, without rotary 2q + 2kv, + 2f, gated 4f) / TP; with checkpoint_activations h a layer and one layer in "
    "full; last stage: 2h, and 1024 * V / TP for the loss",
}


@dataclasses.dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    layers: int
    parameters: int  # held by one rank before ZeRO
    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int  # what the update needs once the activations are gone
    host: int  # optimiser states offloaded to host memory

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)


def dry_run(config: NeoxConfig, world_size: int | None = None) -> dict[str, Any]:
    """Everything `--dry-run` prints.

    Args:
        world_size: ranks; default `global_num_gpus`, else what the batch keys imply, else TP * PP.

    Raises:
        UsageError: the keys describe no model or no batch.
    """
    model = config.model_config(_vocab_size(config))
    world = world_size or config.launch.global_num_gpus or _implied_world(config)
    plan = config.batch_plan(world) if _has_batch(config) else None
    flops = model.flops_per_token()
    return {
        "parameters": model.num_parameters(),
        "parameters_non_embedding": model.num_parameters_non_embedding(),
        "parameters_by_part": _parts(model),
        "model": {name: value for name, value in dataclasses.asdict(model).items() if value is not None},
        "layout": {
            "world_size": world,
            "tensor_parallel": config.tensor_parallel,
            "pipeline_stages": config.pipeline_stages,
            "data_parallel": world // (config.tensor_parallel * config.pipeline_stages),
            "zero_stage": max(1, config.zero_stage),
            "engine": "plain" if is_plain(config, world) else "deepspeed",
            "precision": config.compute_precision,
        },
        "batch": dataclasses.asdict(plan) if plan else None,
        "memory_per_rank": _memory(config, model, plan, world),
        "memory_formulas": FORMULAS,
        "tokens": _tokens(config, model, plan),
        "schedule": _schedule(config),
        "flops_per_token": dataclasses.asdict(flops),
        "warnings": list(config.warnings),
        "config": config.to_dict(),
    }


def render(report: dict[str, Any]) -> str:
    """The report of `dry_run` as text for people."""
    layout, flops = report["layout"], report["flops_per_token"]
    lines = [
        f"parameters      {report['parameters']:,} ({report['parameters_non_embedding']:,} outside the embeddings)",
        "layout          {world_size} ranks = TP {tensor_parallel} * PP {pipeline_stages} * DP {data_parallel}, "
        "ZeRO-{zero_stage}, {precision}".format(**layout),
    ]
    if report["batch"]:
        lines.append(
            "batch           {global_batch} = micro-batch {micro_batch} * accumulation {grad_accum} * "
            "{data_parallel} data-parallel ranks".format(**report["batch"])
        )
    tokens = report["tokens"]
    if tokens["total"] is not None:
        first = f"{tokens['per_step_first']:,} to " if tokens["per_step_first"] != tokens["per_step"] else ""
        steps = f"{tokens['steps']:,} steps of {first}{tokens['per_step']:,}"
        lines.append(f"tokens          {tokens['total']:,} = {steps}")
    if report["schedule"]:
        lines.append(f"learning rate   {report['schedule']['summary']}")
    lines.append(f"FLOPs per token {flops['palm']:.4g} (PaLM: 6N + 12Lhs), {flops['causal']:.4g} (causal)")
    if tokens["total"] is not None:
        lines.append(f"FLOPs in all    {tokens['flops_palm']:.3g} (PaLM)")
    settings = ["", "effective configuration, defaults left out:", write_yaml(report["config"])]
    return "\n".join([*lines, "", *_memory_table(report["memory_per_rank"]), *settings])


def _memory_table(rows: list[dict[str, int]]) -> list[str]:
    names = ("weights", "gradients", "optimizer", "activations", "update", "total")
    head = f"{'stage':>5} {'layers':>6} {'parameters':>14} " + " ".join(f"{name:>11}" for name in names)
    lines = ["memory of each rank, estimated:", head]
    for row in rows:
        figures = " ".join(f"{human_bytes(row[name]):>11}" for name in names)
        host = f"  + {human_bytes(row['host'])} of host memory" if row["host"] else ""
        lines.append(f"{row['stage']:>5} {row['layers']:>6} {row['parameters']:>14,} {figures}{host}")
    return lines


def _vocab_size(config: NeoxConfig) -> int | None:
    """Ids of the tokenizer where that needs no heavy library: the key, a tokenizer.json, or a kind of known size."""
    model = config.model
    if model.vocab_size is not None:
        return model.vocab_size
    source = config.tokenizer_source or _beside_dataset(config)
    size = _json_vocab_size(source) if source is not None else None
    if size is not None:
        return size
    if model.padded_vocab_size is not None:
        return None
    return VOCAB_SIZES.get(config.tokenizer.tokenizer_type)


def _beside_dataset(config: NeoxConfig) -> str | None:
    """Where neox-shard puts the tokenizer of the first dataset; training takes that one too."""
    for prefix in (config.data.data_path, *(config.data.train_data_paths or ())):
        if prefix is not None:
            return prefix.removesuffix(".bin").removesuffix(".idx") + ".tokenizer.json"
    return None


def _json_vocab_size(path: str) -> int | None:
    import json

    if path == "bytes":
        return 258
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        ids = [*document["model"]["vocab"].values(), *(token["id"] for token in document.get("added_tokens", []))]
        return max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no tokenizer.json: another kind, or only on the machine that trains


def _has_batch(config: NeoxConfig) -> bool:
    return config.batch.train_batch_size is not None or config.batch.train_micro_batch_size_per_gpu is not None


def _implied_world(config: NeoxConfig) -> int:
    batch = config.batch
    smallest = config.tensor_parallel * config.pipeline_stages
    if batch.train_batch_size is None or batch.train_micro_batch_size_per_gpu is None:
        return smallest
    each = batch.train_micro_batch_size_per_gpu * (batch.gradient_accumulation_steps or 1)
    if batch.gradient_accumulation_steps is None or batch.train_batch_size % each:
        return smallest
    return smallest * (batch.train_batch_size // each)


def _parts(model: ModelConfig) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in model.parameter_shapes().items():
        part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return parts


def _tokens(config: NeoxConfig, model: ModelConfig, plan: BatchPlan | None) -> dict[str, int | None]:
    """Tokens and FLOPs of the run; with a curriculum `per_step` is that of the last step."""
    steps = config.train.train_iters
    if plan is None or steps is None:
        per_step = plan.global_batch * model.seq_length if plan else None
        return {"steps": steps, "per_step_first": per_step, "per_step": per_step, "total": None, "flops_palm": None}
    curriculum = curriculum_of(config)
    lengths = list(periods(curriculum, max(1, steps))) if curriculum is not None else [(model.seq_length, steps)]
    if steps == 0:
        lengths = [(lengths[0][0], 0)]
    parts = [(plan.global_batch * length * count, length) for length, count in lengths]
    return {
        "steps": steps,
        "per_step_first": plan.global_batch * lengths[0][0],
        "per_step": plan.global_batch * lengths[-1][0],
        "total": sum(tokens for tokens, _ in parts),
        "flops_palm": sum(model.flops_per_token(length).palm * tokens for tokens, length in parts),
    }


def _schedule(config: NeoxConfig) -> dict[str, Any] | None:
    try:
        schedule = config.lr_schedule()
    except UsageError:
        return None  # length in epochs: known when the data is
    points = sorted({0, math.ceil(schedule.warmup), schedule.horizon // 2, schedule.horizon})
    return {
        **dataclasses.asdict(schedule),
        "summary": schedule.describe(),
        "lr_at": {str(step): schedule.lr_at(step) for step in points},
    }


def _memory(config: NeoxConfig, model: ModelConfig, plan: BatchPlan | None, world: int) -> list[dict[str, int]]:
    micro = plan.micro_batch if plan else 1
    accumulation = plan.grad_accum if plan else 1
    parts = partition(model, config.pipeline_parts, config.parallel.pipe_partition_method)
    blocks = [sum(1 <= piece <= model.num_layers for piece in part) for part in parts]
    if config.folds_pipeline:
        blocks = [front + back for front, back in zip(blocks, reversed(blocks[len(blocks) // 2 :]), strict=False)]
    stages = [
        _stage_memory(config, model, stage, layers, micro, accumulation, world) for stage, layers in enumerate(blocks)
    ]
    return [dataclasses.asdict(stage) | {"total": stage.total} for stage in stages]


def _stage_memory(
    config: NeoxConfig, model: ModelConfig, stage: int, layers: int, micro: int, accumulation: int, world: int
) -> StageMemory:
    pipe, tensor, plain = config.pipeline_stages, config.tensor_parallel, is_plain(config, world)
    data = 1 if plain else max(1, world // (pipe * tensor))  # ranks that share weights, gradients and states
    held = _held_parameters(model, layers, first=stage == 0, last=stage == _loss_stage(config), tensor=tensor)
    zero = max(1, config.zero_stage)
    full = config.compute_precision == "fp32"
    weight_bytes = 4 if full else 2
    grad_dtype = (config.precision.data_types or {}).get("grad_accum_dtype")
    grad_bytes = 4 if full or (grad_dtype == "fp32" and not plain) else 2
    kind = config.optimizer_type
    moments = STATES_PER_PARAMETER.get(kind, 2)
    if kind == "sgd":
        moments = 1 if config.optimizer_params.get("momentum") else 0
    copies = 0 if full and plain else 1
    moment_bytes = 1 if config.optim.use_bnb_optimizer else 4
    optimizer = (moment_bytes * moments + 4 * copies) * held // data
    section = (config.parallel.zero_optimization or {}).get("offload_optimizer") or {}
    offloaded = not plain and isinstance(section, dict) and section.get("device") in ("cpu", "nvme")
    return StageMemory(
        stage=stage,
        layers=layers,
        parameters=held,
        weights=weight_bytes * held // (data if zero == 3 else 1),
        gradients=grad_bytes * held // (data if zero >= 2 else 1),
        optimizer=0 if offloaded else optimizer,
        activations=_activations(config, model, layers, stage, micro, accumulation) * weight_bytes,
        update=4 * held if plain and not full else 0,
        host=optimizer if offloaded else 0,
    )


def _loss_stage(config: NeoxConfig) -> int:
    return 0 if config.folds_pipeline else config.pipeline_stages - 1


def _held_parameters(model: ModelConfig, layers: int, *, first: bool, last: bool, tensor: int) -> int:
    """Parameters of one rank: its stage's layers, those of split matrices divided over the tensor-parallel group."""
    held = 0
    for name, shape in model.parameter_shapes().items():
        count = math.prod(shape)
        whole = name.endswith(REPLICATED) and ".qk_norm." not in name  # the joint norm goes with its heads
        share = count if whole else -(-count // tensor)
        if name.startswith("layers."):
            held += share * layers if name.startswith("layers.0.") else 0
        elif name.startswith(("embed.", "pos_embed.")):
            held += share if first or (last and model.tie_embeddings and name.startswith("embed.")) else 0
        elif name.startswith("rpe."):
            held += share
        else:
            held += share if last else 0
    return held


def _activations(config: NeoxConfig, model: ModelConfig, layers: int, stage: int, micro: int, accumulation: int) -> int:
    """Numbers one rank keeps for the backward pass: FORMULAS, after Korthikanti et al. 2022 without the s * s terms."""
    tensor, pipe = config.tensor_parallel, config.pipeline_stages
    tokens = micro * model.seq_length
    q, kv, _ = model.qkv_sizes
    norms = (4 if model.residual == "sequential" else 3) * model.hidden_size
    attention = (3 if model.pos_emb == "rotary" else 2) * (q + kv)
    mlp = (4 if model.gated else 2) * model.ffn_size
    layer = norms / (tensor if config.parallel.sequence_parallel else 1) + (attention + mlp) / tensor
    in_flight = pipe + 0.5 if config.folds_pipeline else min(pipe - stage, accumulation) if pipe > 1 else 1
    if config.recompute.checkpoint_activations:
        kept = tokens * (in_flight * layers * model.hidden_size + layer)
    else:
        kept = tokens * in_flight * layers * layer
    if stage == _loss_stage(config):
        kept += tokens * 2 * model.hidden_size + min(tokens, LOSS_CHUNK_TOKENS) * model.padded_vocab_size / tensor
    return int(kept)
