# SPDX-License-Identifier: Apache-2.0
"""Write GPT-NeoX's own layout, for those who must go back: one file per layer and tensor-parallel rank, or per rank.

The bookkeeping is what GPT-NeoX needs to load with `finetune: true` (or no_load_optim and no_load_rng): weights, the
iteration, and the sizes it compares with its configuration. Optimizer states are not written.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from libneox.checkpoint.lazy import LazyTensor
from libneox.checkpoint.neox.merge import cut_for_rank
from libneox.checkpoint.neox.names import Place, places
from libneox.errors import UsageError
from libneox.model_config import GATED, ModelConfig

if TYPE_CHECKING:
    from libneox.config import NeoxConfig

Layout = Literal["pipeline", "sequential"]
Counter = Callable[[int, str], None]
_OURS = re.compile(r"\bNew[.;]")  # how the documentation of a key says that GPT-NeoX does not have it
# ModelConfig fields whose values GPT-NeoX cannot be told
_UNKNOWN = (
    ("head_dim other than hidden_size / num_attention_heads", lambda c: c.head_dim * c.num_heads != c.hidden_size),
    ("rope_scaling", lambda c: c.rope_scaling is not None),
    ("qk_norm: head", lambda c: c.qk_norm == "head"),
    ("attention biases in one projection only", lambda c: c.qkv_bias != c.attn_out_bias),
    ("layernorm without bias", lambda c: c.norm == "layernorm" and not c.norm_bias),
)


def check_exportable(config: ModelConfig, tensor_parallel: int) -> None:
    """Raise UsageError with all reasons why GPT-NeoX cannot hold this model at this tensor-parallel size."""
    reasons = [f"{what} is unknown to GPT-NeoX" for what, holds in _UNKNOWN if holds(config)]
    counts = {
        "attention heads": config.num_heads,
        "key and value heads": config.num_kv_heads,
        "rows of the embedding": config.padded_vocab_size,
        "MLP columns": config.ffn_size,
    }
    reasons += [
        f"{count} {what} do not divide by {tensor_parallel}"
        for what, count in counts.items()
        if count % tensor_parallel
    ]
    if config.qk_norm == "joint" and config.qk_norm_groups != tensor_parallel:
        reasons.append(f"its QK-norm has {config.qk_norm_groups} groups, which is the only possible --tp")
    if reasons:
        raise UsageError(f"the model cannot be written for GPT-NeoX at --tp {tensor_parallel}: {'; '.join(reasons)}")


def neox_keys_for_original(
    neox: NeoxConfig, config: ModelConfig, *, tensor_parallel: int, layout: Layout
) -> dict[str, Any]:
    """The configuration in keys that GPT-NeoX knows: ours are translated, and those without a counterpart dropped."""
    from libneox.config import all_keys

    known = all_keys()
    keys = {name: value for name, value in neox.to_dict().items() if not _OURS.search(known[name].doc)}
    keys |= {"model_parallel_size": tensor_parallel, "pipe_parallel_size": 1 if layout == "pipeline" else 0}
    # its padding rule must come to the rows there are
    keys["make_vocab_size_divisible_by"] = config.padded_vocab_size // tensor_parallel
    keys |= {"use_bias_in_attn_linear": config.qkv_bias, "use_bias_in_mlp": config.mlp_bias}
    if config.qk_norm == "joint":
        keys["use_qk_layernorm"] = True
    keys.pop("expansion_factor", None)
    # its arithmetic makes a gated width of two thirds of the size, rounded up to the multiple, which is the width here
    keys |= {"intermediate_size": config.ffn_size}
    if config.activation in GATED:
        keys["mlp_multiple_of"] = config.ffn_size
    else:
        keys.pop("mlp_multiple_of", None)
    return keys


def write_neox(
    step: Path,
    tensors: Mapping[str, LazyTensor],
    config: ModelConfig,
    *,
    tensor_parallel: int,
    layout: Layout,
    iteration: int,
    tokenizer_type: str | None,
    written: Counter,
) -> None:
    """Fill the directory global_stepN. One file's pieces are in memory at a time.

    Args:
        written: called with the bytes and the name of each tensor done.
    """
    by_index: dict[int, list[tuple[str, Place]]] = {}
    for name, place in places(config).items():
        by_index.setdefault(place.index, []).append((name, place))
    if shared := next((entry for entry in by_index[2] if entry[0] == "rpe.weight"), None):
        for index in range(3, config.num_layers + 2):  # one module, stored with every layer
            by_index[index].append(shared)
    for rank in range(tensor_parallel):
        module: OrderedDict[str, torch.Tensor] = OrderedDict()
        for index, entries in by_index.items():
            pieces = OrderedDict()
            for name, place in entries:
                # a copy of its own: torch.save writes the whole storage behind a view
                piece = cut_for_rank(tensors[name], place.cut, config, rank, tensor_parallel).load().clone()
                pieces[place.names[0]] = piece
                written(piece.nbytes, name)
            if layout == "pipeline":
                _save(step / f"layer_{index:02d}-model_{rank:02d}-model_states.pt", pieces)
            else:
                module |= {f"sequential.{index}.{name}": piece for name, piece in pieces.items()}
        state = _bookkeeping(config, tensor_parallel, iteration, tokenizer_type)
        state["module"] = module if layout == "sequential" else None
        _save(step / f"mp_rank_{rank:02d}_model_states.pt", state)


def _bookkeeping(
    config: ModelConfig, tensor_parallel: int, iteration: int, tokenizer_type: str | None
) -> dict[str, Any]:
    arguments = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "make_vocab_size_divisible_by": config.padded_vocab_size // tensor_parallel,
        "padded_vocab_size": config.padded_vocab_size,
        "model_parallel_size": tensor_parallel,
    }
    if tokenizer_type is not None:
        arguments["tokenizer_type"] = tokenizer_type
    return {
        "dp_world_size": 1,
        "mp_world_size": tensor_parallel,
        "optimizer": {},
        "global_steps": iteration,
        "global_samples": 0,
        "skipped_steps": 0,
        "iteration": iteration,
        "args": arguments,
    }


def _save(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
