# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of GPT-NeoX as logical tensors plus configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.checkpoint.lazy import LazyTensors, check_shapes
from libneox.checkpoint.neox.files import LegacyFiles, open_files
from libneox.checkpoint.neox.merge import QkvLayout, merge, used_names
from libneox.checkpoint.neox.names import BUFFERS
from libneox.errors import DataError
from libneox.legacy import find_step, stored_configs
from libneox.model_config import ModelConfig

if TYPE_CHECKING:
    from libneox.config import NeoxConfig

Source = str | Path | Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class LegacyCheckpoint:
    """A checkpoint of the original, read as ours: `tensors` by logical name, loaded when indexed.

    `notes` are facts the user should know: averaged copies, summed biases, an unknown vocabulary size.
    """

    files: LegacyFiles
    neox: NeoxConfig
    config: ModelConfig
    tensors: LazyTensors
    iteration: int | None
    notes: tuple[str, ...]


def open_neox(
    path: str | Path,
    *,
    config: Sequence[Source] = (),
    overrides: Sequence[str] = (),
    qkv_layout: QkvLayout = "auto",
    vocab_size: int | None = None,
) -> LegacyCheckpoint:
    """Open a GPT-NeoX checkpoint: a save directory, one of its steps, or the slim release of the 20B.

    Args:
        path: directory; with several steps in it, its `latest` decides.
        config: YAML files or mappings; by default the `configs/*.yml` stored in the checkpoint.
        overrides: `key=value` on top.
        qkv_layout: see `merge`.
        vocab_size: number of ids of the tokenizer, if known; otherwise the rows of the embedding, padding included.

    Raises:
        InputMissing: no checkpoint, or no configuration.
        UsageError: the configuration is wrong.
        DataError: files are damaged, incomplete, or do not fit the configuration.
        UnsafeInput: a file asks for code to be run.
    """
    from libneox.config import load_config

    files = open_files(find_step(Path(path)))
    neox = load_config(list(config) or stored_configs(files.directory), overrides=overrides)
    padded = _embedding_rows(files)
    notes = []
    if vocab_size is None:
        vocab_size = neox.get("vocab_size")
        if vocab_size is None:
            vocab_size = padded
            notes.append(f"no tokenizer given: all {padded} rows of the embedding count as vocabulary")
    if vocab_size > padded:
        raise DataError(f"{files.directory}: the tokenizer has {vocab_size} ids, the embedding only {padded} rows")
    # what the checkpoint says of its own shapes outranks the configuration's rule for padding
    model = dataclasses.replace(neox.model_config(vocab_size), vocab_size=vocab_size, padded_vocab_size=padded)
    if model.norm == "layernorm":  # the original never looks at use_bias_in_norms
        model = dataclasses.replace(model, norm_bias=(2, "input_layernorm.bias") in files.shards)
    if model.qk_norm == "joint" and not neox.get("qk_norm_groups"):
        model = dataclasses.replace(model, qk_norm_groups=files.tensor_parallel)
    if model.num_layers != files.num_layers:
        raise DataError(f"{files.directory}: {files.num_layers} layers, but num_layers is {model.num_layers}")
    drift: dict[str, float] = {}
    tensors = merge(files.shards, model, qkv_layout=qkv_layout, drift=drift)
    _refuse_unknown(files, model)
    check_shapes(str(files.directory), tensors, model.parameter_shapes())
    return LegacyCheckpoint(
        files=files,
        neox=neox,
        config=model,
        tensors=LazyTensors(tensors),
        iteration=_iteration(files),
        notes=(*notes, *_merge_notes(files, model, drift)),
    )


def _embedding_rows(files: LegacyFiles) -> int:
    pieces = files.shards.get((0, "word_embeddings.weight"))
    if not pieces:
        raise DataError(f"{files.directory}: no word_embeddings.weight in layer 0")
    return sum(piece.shape[0] for piece in pieces)


def _refuse_unknown(files: LegacyFiles, config: ModelConfig) -> None:
    known = used_names(files.shards, config)
    unknown = [
        (index, name)
        for index, name in files.shards
        if (index, name) not in known
        and not name.endswith(BUFFERS)
        and not (config.residual == "parallel_tied" and name.startswith("post_attention_layernorm."))  # never used
    ]
    if unknown:
        index, name = unknown[0]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(f"{files.directory}: layer {index} has {name}{more}, which the configuration does not call for")


def _merge_notes(files: LegacyFiles, config: ModelConfig, drift: Mapping[str, float]) -> list[str]:
    notes = []
    ranks = files.tensor_parallel
    if drift:
        name = max(drift, key=drift.__getitem__)
        notes.append(
            f"copies on {ranks} ranks differ in {len(drift)} tensors, most by {drift[name]:.3g} ({name}); averaged"
        )
    if ranks > 1 and config.residual != "sequential" and (config.attn_out_bias or config.mlp_bias):
        notes.append(f"parallel residual: row-parallel biases of {ranks} ranks summed")
    if config.residual != "sequential" and not config.mlp_bias:
        notes.append(
            "parallel residual without MLP biases: GPT-NeoX left the attention out of such models by mistake; "
            "it counts here, so the model does not behave as it did in training"
        )
    return notes


def _iteration(files: LegacyFiles) -> int | None:
    state = files.state()
    iteration = state.get("iteration", state.get("global_steps"))
    if isinstance(iteration, int):
        return iteration
    digits = files.directory.name.removeprefix("global_step")
    return int(digits) if digits.isdigit() else None
