# SPDX-License-Identifier: Apache-2.0
"""The same format again, changed: `cast`, `reshard`, and `average` of several checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.errors import DataError, UsageError
from libneox.files import write_text
from neox_convert import convert
from neox_convert.convert import Options, Report
from neox_convert.source import Source, Where, find_source, open_source
from neox_convert.staging import check_apart, check_target, staged_directory
from neox_convert.writing import cast_all, parse_bytes, parse_dtype, write_tensor_files

if TYPE_CHECKING:
    from libneox.checkpoint.lazy import LazyTensor
    from libneox.model_config import ModelConfig

KEPT = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md")  # of a Hugging Face directory, beside its weights
# Of ModelConfig: how a model is trained, how long its texts may be, how exactly it computes. Weights mean the same.
NO_MEANING = frozenset((
    "vocab_size", "seq_length", "max_position_embeddings", "hidden_dropout", "attention_dropout", "init_method",
    "output_layer_init_method", "init_method_std", "mup_init_scale", "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
))  # fmt: skip


def rewrite(path: str, output: str, *, options: Options) -> Report:
    """A checkpoint of ours or a Hugging Face directory in another dtype (`options.dtype`) or other files."""
    where = find_source(path)
    if where.kind == "native":
        return convert.to_native(where, output, step=None, options=options, optimizer=True)
    if where.kind == "hf":
        return _rewrite_hf(where, output, options)
    raise UsageError(f"{path}: is in a foreign format; import it first (from-neox, from-meta)")


def _rewrite_hf(where: Where, output: str, options: Options) -> Report:
    """Stored names stay; the other files are copied, with the new dtype in config.json."""
    from libneox.checkpoint.hf.reader import read_json, stored_tensors
    from libneox.checkpoint.lazy import LazyTensors

    target, folder = Path(output), Path(where.path)
    check_target(target, force=options.force)
    check_apart(target, where.path)
    open_source(where)  # whatever is wrong with it is said before anything is written
    dtype = parse_dtype(options.dtype)
    tensors = LazyTensors(cast_all(stored_tensors(folder), dtype))
    with (
        convert.progress_of(tensors.nbytes, options) as progress,
        staged_directory(target, force=options.force) as staging,
    ):
        write_tensor_files(staging, tensors, shard_bytes=parse_bytes(options.shard_size), progress=progress)
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in KEPT and ".index." not in file.name:
                shutil.copyfile(file, staging / file.name)
        if dtype is not None:
            raw = read_json(folder / "config.json")
            name = str(dtype).removeprefix("torch.")
            raw |= {key: name for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": name}
            write_text(staging / "config.json", json.dumps(raw, indent=2) + "\n")
        verified = convert.check(options, tensors.specs(), lambda: stored_tensors(staging), None)
    return convert.report_of(target, tensors, progress, verified, ())


def average(
    paths: Sequence[str], output: str, *, weights: Sequence[float], step: int | None, options: Options
) -> Report:
    """The weighted mean of several checkpoints of one model, computed in float32, as a checkpoint of ours.

    Raises:
        UsageError: fewer than two, or weights that do not fit.
        DataError: their tensors differ in name or shape, or their configurations in what weights mean.
    """
    if len(paths) < 2:
        raise UsageError("average needs at least two checkpoints")
    shares = list(weights) or [1.0] * len(paths)
    if len(shares) != len(paths) or not 0 < sum(shares) < math.inf or min(shares) < 0:
        raise UsageError(f"--weight: give one number of at least 0 for each of the {len(paths)} checkpoints")
    check_target(Path(output), force=options.force)
    sources = [open_source(find_source(path), options.tokenizer) for path in paths]
    for path, source in zip(paths, sources, strict=True):
        check_apart(Path(output), source.where.path)
        _check_same_model(path, source, paths[0], sources[0])
    total = sum(shares)
    mean = {
        name: _mean([source.tensors[name] for source in sources], [share / total for share in shares])
        for name in sources[0].tensors
    }
    return convert.write_source(_with_tensors(sources[0], mean, max(s.step for s in sources)), output, step, options)


def _check_same_model(path: str, source: Source, first_path: str, first: Source) -> None:
    shapes, wanted = ({name: t.shape for name, t in opened.tensors.items()} for opened in (source, first))
    if shapes != wanted:
        raise DataError(f"{path}: its tensors are not those of {first_path}; only one model's can be averaged")
    mine, theirs = _meaning(source.config), _meaning(first.config)
    if differing := [name for name in theirs if name in mine and mine[name] != theirs[name]]:
        facts = ", ".join(f"{name} is {mine[name]}, not {theirs[name]}" for name in differing)
        raise DataError(f"{path}: is another model than {first_path}: {facts}; only one model's can be averaged")


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes with its weights, less those that its kind has no use for."""
    fields = dataclasses.asdict(config)
    if fields["activation"] == "swish":
        fields["activation"] = "silu"  # two names of one
    if config.rope_scaling is not None and config.rope_scaling.type in ("llama3", "yarn"):
        trained = config.rope_scaling.original_max_position_embeddings or config.max_position_embeddings
        fields["rope_scaling"]["original_max_position_embeddings"] = trained
    used_with = (
        (config.norm == "layernorm", ("norm_bias",)),
        (config.pos_emb == "rotary", ("rotary_pct", "rotary_base", "rope_scaling")),
        (config.pos_emb == "rpe", ("rpe_num_buckets", "rpe_max_distance")),
        (config.pos_emb == "learned", ("learned_position_offset", "mup_rp_embedding_mult")),
        (config.qk_norm == "joint", ("qk_norm_groups",)),
        (config.use_mup, ("mup_base_hidden_size", "mup_output_mult", "mup_attn_mult")),
    )
    unused = NO_MEANING.union(*(names for used, names in used_with if not used))
    return {name: value for name, value in fields.items() if name not in unused}


def _mean(tensors: Sequence[LazyTensor], shares: Sequence[float]) -> LazyTensor:
    import torch

    from libneox.checkpoint.lazy import LazyTensor

    def load() -> torch.Tensor:
        total = tensors[0].load().to(torch.float32) * shares[0]
        for tensor, share in zip(tensors[1:], shares[1:], strict=True):
            total.add_(tensor.load().to(torch.float32), alpha=share)
        return total.to(tensors[0].dtype)

    return LazyTensor(tensors[0].shape, tensors[0].dtype, load)


def _with_tensors(source: Source, tensors: dict[str, LazyTensor], step: int) -> Source:
    where = dataclasses.replace(source.where, kind="made")
    return dataclasses.replace(source, tensors=tensors, step=step, where=where, details=None)
