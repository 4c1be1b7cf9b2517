# SPDX-License-Identifier: Apache-2.0
"""The coordinate check: do activations keep their size when the model gets wider?

The configured model is trained for three steps at several widths (heads of the same size, from the same seed, on the
same samples, at the constant learning rate of the configuration) and the mean |activation| of every module is measured
before the first and after each step. Where the parametrisation is right, the slope of its logarithm over the logarithm
of the width stays near 0 or below; under standard parametrisation with Adam it grows (arXiv 2203.03466, section D.1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from libneox.config import BatchPlan, NeoxConfig
from libneox.data.splits import build_splits
from libneox.errors import InputMissing, NonFiniteLoss, UsageError
from libneox.files import atomic_write, write_text
from libneox.model import Transformer
from libneox.model.init import initial_value
from libneox.model.transformer import Attention
from libneox.model_config import ModelConfig
from libneox.tokenizer import load_tokenizer
from neox_train.batches import batches_of
from neox_train.inputs import find_tokenizer, resolve_model
from neox_train.objective import LanguageModeling, MicroBatch
from neox_train.optimizers import build_optimizer
from neox_train.plain import PlainEngine
from neox_train.resume import run_path

STEPS = 3
MULTIPLES = (1, 2, 4, 8)  # of the base width
ROWS, POSITIONS = 4, 256  # of a batch at most: the mean over a thousand positions is steady enough
LEVEL = 0.2  # slopes within it are called level; a wrong parametrisation gives 0.5 or 1
RANDOM_VOCABULARY = 1024


class Record(NamedTuple):
    """The mean |activation| of a module's output at one width, after `step` steps."""

    width: int
    step: int
    module: str
    mean_abs: float


class Slope(NamedTuple):
    """How a module's mean |activation| goes with width: d log|x| / d log(width); None where it is 0 at some width."""

    module: str
    step: int
    slope: float | None


def coordinate_check(config: NeoxConfig, stdout: BinaryIO, *, quiet: bool) -> None:
    """Measure, write coord_check.jsonl and coord_check.png into the run directory, print their paths on stdout.

    Raises:
        InputMissing: matplotlib is not installed (said before anything is trained), or the data is not there.
        UsageError: the base width is no multiple of the head's.
        NonFiniteLoss: a width diverges within three steps.
    """
    require_plots()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batches = model_and_batches(config, device)
    records: list[Record] = []
    for width in widths_of(config, model):
        _say(f"width {width}: {STEPS} steps with {config.optimizer_type}, lr {config.lr:g}", quiet)
        records += measure(config, model_at(model, width), batches, device)
    found = slopes(records)
    run = run_path(config)
    run.mkdir(parents=True, exist_ok=True)
    table, plot = run / "coord_check.jsonl", run / "coord_check.png"
    write_text(table, "".join(json.dumps(item._asdict()) + "\n" for item in [*records, *found]))
    with atomic_write(plot) as file:
        file.write(draw(records, title=_title(config)))
    for line in verdict(found, use_mup=model.use_mup):
        _say(line, quiet)
    stdout.write(f"{table}\n{plot}\n".encode())


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(f"neox-train: coord_check: {line}", file=sys.stderr, flush=True)


def _title(config: NeoxConfig) -> str:
    kind = f"muP, base width {config.mup.mup_base_hidden_size}" if config.mup.use_mup else "standard parametrization"
    return f"{kind}; {config.optimizer_type}, lr {config.lr:g}"


def model_and_batches(config: NeoxConfig, device: torch.device) -> tuple[ModelConfig, list[MicroBatch]]:
    """The configured model without dropout, and one batch for every measurement: from the data, else random ids."""
    rows = ROWS
    if config.data.data_path or config.data.train_data_paths:
        wanted = None if config.train.train_epochs is not None else rows * (STEPS + 1)
        splits = build_splits(config, train_samples=wanted)
        assert splits.train is not None
        tokenizer = find_tokenizer(config, splits, None)
        model = resolve_model(config, tokenizer, None)
        plan = BatchPlan(rows, rows, 1, 1)
        eod = None if tokenizer is None else tokenizer.eod_id
        source = batches_of(
            config, splits.train, plan, data_rank=0, device=device, vocab_size=model.vocab_size, eod_id=eod
        )
        batches = [source.make(range(step * rows, (step + 1) * rows)) for step in range(STEPS + 1)]
    else:
        model = config.model_config(_vocabulary(config))
        _say(f"data_path is not set: random ids of a vocabulary of {model.vocab_size}", quiet=False)
        generator = torch.Generator().manual_seed(config.train.seed)
        shape = (STEPS + 1, rows, min(model.seq_length, POSITIONS) + 1)
        ids = torch.randint(model.vocab_size, shape, generator=generator).to(device)
        batches = [MicroBatch(step[:, :-1].contiguous(), step[:, 1:].contiguous()) for step in ids]
    cropped = [MicroBatch(*(t if t is None else t[:, :POSITIONS] for t in batch)) for batch in batches]
    return dataclasses.replace(model, hidden_dropout=0.0, attention_dropout=0.0), cropped


def _vocabulary(config: NeoxConfig) -> int:
    if config.get("vocab_size") or config.get("padded_vocab_size"):
        return config.get("vocab_size") or config.get("padded_vocab_size")
    return load_tokenizer(config.tokenizer_source).vocab_size if config.tokenizer_source else RANDOM_VOCABULARY


def widths_of(config: NeoxConfig, model: ModelConfig) -> list[int]:
    """The widths compared: multiples of mup_base_hidden_size, else of hidden_size.

    Raises:
        UsageError: heads of the configured size do not fill the narrowest.
    """
    base = config.mup.mup_base_hidden_size or model.hidden_size
    if base % model.head_dim:
        raise UsageError(
            f"coord_check: the base width {base} is no multiple of the head's {model.head_dim}; "
            "set mup_base_hidden_size to one"
        )
    return [base * multiple for multiple in MULTIPLES]


def model_at(model: ModelConfig, width: int) -> ModelConfig:
    """The same model at another width: as many heads of the same size as fill it, the MLP in proportion."""
    heads = width // model.head_dim
    shared = model.num_heads // model.num_kv_heads  # queries of a key/value head
    kv_heads = 1 if model.num_kv_heads == 1 or heads % shared else heads // shared
    return dataclasses.replace(
        model,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=max(1, model.ffn_size * width // model.hidden_size),
        qk_norm_groups=math.gcd(model.qk_norm_groups, heads),
    )


def measure(
    config: NeoxConfig, model_config: ModelConfig, batches: Sequence[MicroBatch], device: torch.device
) -> list[Record]:
    """Train from the seed, in float32, a step on each batch but the last; activations before every step.

    Raises:
        NonFiniteLoss: an activation or the gradient is not finite.
    """
    model = Transformer(model_config)
    engine = PlainEngine(
        LanguageModeling(model, z_loss=config.optim.z_loss),
        lambda named: build_optimizer(config, named, mup_width_mult=model_config.mup_width_mult),
        dtype=torch.float32,
        device=device,
        grad_accum=1,
        clipping=config.optim.gradient_clipping,
    )
    for name in engine.names():
        engine.restore_master(name, initial_value(model_config, name, config.train.seed))
    records: list[Record] = []
    for step, batch in enumerate(batches):
        for module, size in activations(model, batch).items():
            if not math.isfinite(size):
                raise _diverged(model_config.hidden_size, step, module)
            records.append(Record(model_config.hidden_size, step, module, size))
        if step + 1 < len(batches):
            engine.backward([batch])
            if engine.step(config.lr).skipped:
                raise _diverged(model_config.hidden_size, step, "the gradient")
    return records


def _diverged(width: int, step: int, what: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"coord_check: width {width} after {step} steps: {what} is not finite; lower the learning rate"
    )


def activations(model: Transformer, batch: MicroBatch) -> dict[str, float]:
    """Mean |output| of every module in one forward pass; `layers.I.attn.scores` are scaled q.k of visible pairs."""
    sizes: dict[str, float] = {}
    with torch.no_grad(), _hooked(model, sizes):
        logits = model(batch.ids, positions_BT=batch.positions, cu_seqlens_E=batch.cu_seqlens)
    sizes["logits"] = float(logits.abs().mean())
    return sizes


@contextlib.contextmanager
def _hooked(model: Transformer, sizes: dict[str, float]) -> Iterator[None]:
    """While open, forward passes of the model leave the sizes of its modules' outputs in `sizes`."""

    def output(name: str) -> Any:
        def keep(module: nn.Module, args: Any, result: Tensor) -> None:
            sizes[name] = float(result.abs().mean())

        return keep

    def scores(name: str) -> Any:
        def keep(module: Attention, args: Any, result: Tensor) -> None:
            sizes[name] = float(_scores(module, *args[:2]).abs().mean())

        return keep

    handles = [model.embed.register_forward_hook(output("embed"))]
    for index, block in enumerate(model.layers):
        name = f"layers.{index}"
        handles.append(block.attn.register_forward_hook(scores(f"{name}.attn.scores")))
        handles += [
            module.register_forward_hook(output(label))
            for module, label in ((block.attn, f"{name}.attn"), (block.mlp, f"{name}.mlp"), (block, name))
        ]
    handles.append(model.final_norm.register_forward_hook(output("final_norm")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scores(attention: Attention, x_BTD: Tensor, context: Any) -> Tensor:
    """Scaled q.k of all pairs that causality lets meet, flat."""
    q_BTNH, k_BTKH, _ = attention.projected(x_BTD, context)
    k_BTNH = k_BTKH.repeat_interleave(q_BTNH.shape[2] // k_BTKH.shape[2], dim=2)
    scores_BNTS = (q_BTNH.transpose(1, 2) @ k_BTNH.permute(0, 2, 3, 1)) * attention.scale
    seen = torch.ones(scores_BNTS.shape[-2:], dtype=torch.bool, device=x_BTD.device).tril()
    return scores_BNTS[..., seen]


def slopes(records: Sequence[Record]) -> list[Slope]:
    """Least-squares slope of log|x| over log(width) of every module after every step."""
    grouped: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.module, record.step), []).append(record)
    found = []
    for (module, step), points in grouped.items():
        slope = None
        if min(point.mean_abs for point in points) > 0:
            widths = [math.log(point.width) for point in points]
            slope = statistics.linear_regression(widths, [math.log(point.mean_abs) for point in points]).slope
        found.append(Slope(module, step, slope))
    return found


def verdict(found: Sequence[Slope], *, use_mup: bool) -> list[str]:
    """A line a module about its slope after the last step, and one about all."""
    last = max(slope.step for slope in found)
    lines, growing = [], []
    for module, step, slope in found:
        if step != last:
            continue
        if slope is None:
            lines.append(f"{module}: is 0 at some width")
            continue
        how = "near 0, level" if abs(slope) <= LEVEL else "grows with width" if slope > 0 else "shrinks with width"
        if use_mup and module == "logits" and slope < -LEVEL:
            how += ", as muP lets logits do in the first steps"
        lines.append(f"{module}: slope {slope:+.2f} after {last} steps: {how}")
        growing += [module] if slope > LEVEL else []
    if not growing:
        lines.append("nothing grows with width")
    else:
        remedy = "lower the learning rate" if use_mup else "set use_mup: true and mup_base_hidden_size"
        lines.append(f"{len(growing)} of {len(lines)} outputs grow with width; {remedy}")
    return lines


def require_plots() -> None:
    """Raise InputMissing, with the remedy, unless matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputMissing("coord_check: matplotlib is not installed; pip install 'neox-train[plots]'") from error


def draw(records: Sequence[Record], *, title: str) -> bytes:
    """A PNG: a panel for each kind of module, mean |activation| over width, a colour for each step, a line a layer."""
    from matplotlib.figure import Figure

    kinds: dict[str, dict[tuple[int, str], list[Record]]] = {}
    for record in records:
        parts = record.module.split(".")
        kind = ".".join(["layer", *parts[2:]]) if parts[0] == "layers" else record.module
        kinds.setdefault(kind, {}).setdefault((record.step, record.module), []).append(record)
    rows = -(-len(kinds) // 4)
    figure = Figure(figsize=(14, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    for position, (kind, lines) in enumerate(kinds.items(), 1):
        axes = figure.add_subplot(rows, 4, position)
        labelled: set[int] = set()
        for (step, _), points in lines.items():
            label = None if step in labelled else f"after {step} steps"
            labelled.add(step)
            widths, sizes = [p.width for p in points], [p.mean_abs for p in points]
            axes.plot(widths, sizes, marker="o", markersize=3, color=f"C{step}", label=label)
        axes.set(title=kind, xlabel="width", ylabel="mean |activation|", xscale="log", yscale="log")
        shown = sorted({record.width for record in records})
        axes.set_xticks(shown, labels=[str(width) for width in shown])
        axes.set_xticks([], minor=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
