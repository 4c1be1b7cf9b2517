# SPDX-License-Identifier: Apache-2.0
"""The configuration as one frozen, typed tree. Nothing in it changes after loading; derived values are properties."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from libneox.config import keys
from libneox.config.aliases import ALIASES
from libneox.config.key import Key, keys_of

if TYPE_CHECKING:
    from libneox.config.batch import BatchPlan
    from libneox.config.problems import Place
    from libneox.model_config import ModelConfig
    from libneox.schedule import Schedule

GROUPS: Mapping[str, type] = {
    "model": keys.Model,
    "mup": keys.Mup,
    "moe": keys.Moe,
    "recurrent": keys.Recurrent,
    "tokenizer": keys.Tokenizer,
    "data": keys.Data,
    "train": keys.Train,
    "batch": keys.Batch,
    "optim": keys.Optim,
    "schedule": keys.LrSchedule,
    "post": keys.Post,
    "parallel": keys.Parallel,
    "precision": keys.Precision,
    "recompute": keys.Recompute,
    "speed": keys.Speed,
    "te": keys.TransformerEngine,
    "deepspeed": keys.DeepSpeed,
    "log": keys.Log,
    "generate": keys.Generate,
    "launch": keys.Launch,
    "internal": keys.Internal,
}


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Every declared key by name, in the order of the documentation."""
    found: dict[str, Key] = {}
    for group, cls in GROUPS.items():
        for key in keys_of(group, cls):
            if key.name in found:
                raise AssertionError(f"{key.name} is declared in {group} and in {found[key.name].group}")
            found[key.name] = key
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeoxConfig:
    """All keys of a run in groups. Made by `libneox.config.load_config`."""

    model: keys.Model = dataclasses.field(default_factory=keys.Model)
    mup: keys.Mup = dataclasses.field(default_factory=keys.Mup)
    moe: keys.Moe = dataclasses.field(default_factory=keys.Moe)
    recurrent: keys.Recurrent = dataclasses.field(default_factory=keys.Recurrent)
    tokenizer: keys.Tokenizer = dataclasses.field(default_factory=keys.Tokenizer)
    data: keys.Data = dataclasses.field(default_factory=keys.Data)
    train: keys.Train = dataclasses.field(default_factory=keys.Train)
    batch: keys.Batch = dataclasses.field(default_factory=keys.Batch)
    optim: keys.Optim = dataclasses.field(default_factory=keys.Optim)
    schedule: keys.LrSchedule = dataclasses.field(default_factory=keys.LrSchedule)
    post: keys.Post = dataclasses.field(default_factory=keys.Post)
    parallel: keys.Parallel = dataclasses.field(default_factory=keys.Parallel)
    precision: keys.Precision = dataclasses.field(default_factory=keys.Precision)
    recompute: keys.Recompute = dataclasses.field(default_factory=keys.Recompute)
    speed: keys.Speed = dataclasses.field(default_factory=keys.Speed)
    te: keys.TransformerEngine = dataclasses.field(default_factory=keys.TransformerEngine)
    deepspeed: keys.DeepSpeed = dataclasses.field(default_factory=keys.DeepSpeed)
    log: keys.Log = dataclasses.field(default_factory=keys.Log)
    generate: keys.Generate = dataclasses.field(default_factory=keys.Generate)
    launch: keys.Launch = dataclasses.field(default_factory=keys.Launch)
    internal: keys.Internal = dataclasses.field(default_factory=keys.Internal)

    warnings: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def get(self, name: str) -> Any:
        """The value of a key, or of an alias such as `lr` (None where nothing is set).

        Raises:
            KeyError: no such key.
        """
        if name in ALIASES:
            head, *path = ALIASES[name].target.split(".")
            value = self.get(head)
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            return value
        return getattr(getattr(self, all_keys()[name].group), name)

    def is_set(self, name: str) -> bool:
        """Whether a key has another value than its default."""
        return self.get(name) != all_keys()[name].default

    def replace(self, **values: Any) -> NeoxConfig:
        """A config with other values of some keys, types checked as on loading.

        Raises:
            UsageError: a value does not fit.
        """
        from libneox.config.load import load_config

        return dataclasses.replace(load_config([self.to_dict()], overrides=values), warnings=self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Every key whose value is not its default: flat, in the order of the documentation."""
        return {name: self.get(name) for name in all_keys() if self.is_set(name)}

    def to_yaml(self) -> str:
        """The effective configuration as YAML that `load_config` reads back to an equal config."""
        from libneox.config.writer import write_yaml

        return write_yaml(self.to_dict())

    @functools.cached_property
    def hash(self) -> str:
        """Hex sha256 of the effective configuration; equal configs have equal hashes on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def seq_length(self) -> int | None:
        """Tokens of a training sample: as many as the model is made for, if nothing is said."""
        return self.model.seq_length or self.model.max_position_embeddings

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel ranks, at least 1."""
        return max(1, self.parallel.model_parallel_size)

    @property
    def pipeline_stages(self) -> int:
        """Pipeline stages, at least 1: `pipe_parallel_size` 0 and 1 mean the same."""
        return max(1, self.parallel.pipe_parallel_size)

    @property
    def pipeline_parts(self) -> int:
        """Parts the model is cut into."""
        return self.pipeline_stages * (2 if self.folds_pipeline else 1)

    @property
    def folds_pipeline(self) -> bool:
        """Whether each stage holds two parts of the model, one from the front and one from the back (DualPipeV)."""
        return self.pipeline_stages > 1 and self.parallel.pipe_schedule == "dualpipev"

    @property
    def zero_stage(self) -> int:
        """ZeRO stage as configured, 0 to 3."""
        return int((self.parallel.zero_optimization or {}).get("stage", 0))

    @property
    def compute_precision(self) -> Literal["fp16", "fp32", "bfloat16"]:
        """Format of weights and activations, from whichever key says it."""
        return self.precision.precision or "fp32"

    @property
    def optimizer_type(self) -> str:
        """Optimiser's name in lower case; adam if nothing is said."""
        return str((self.optim.optimizer or {}).get("type", "adam")).lower()

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """The optimiser's arguments, `lr` and Adam's betas and eps always among them, weight decay never."""
        given = (self.optim.optimizer or {}).get("params")
        params = dict(given) if isinstance(given, dict) else {}  # else refused, by `checks`
        if self.optimizer_type in ("adam", "adamw", "cpu_adam", "cpu_torch_adam"):
            params = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8} | params
        return params

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float(self.optimizer_params.get("lr", 1e-3))

    @property
    def tokenizer_source(self) -> str | None:
        """Where the config says the tokenizer is; None means beside the dataset."""
        keys = self.tokenizer
        if keys.tokenizer is None and keys.tokenizer_type == "CharLevelTokenizer":
            return "charlevel"
        if keys.tokenizer is None and keys.tokenizer_type == "TiktokenTokenizer" and keys.vocab_file is not None:
            return keys.vocab_file if "." in keys.vocab_file else f"tiktoken:{keys.vocab_file}"
        return keys.tokenizer or keys.vocab_file

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """Kind of attention of each layer, `attention_config` spelled out; all global if nothing is said."""
        from libneox.config.architecture import attention_kinds

        return attention_kinds(self)

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is cut over `world_size` ranks.

        Raises:
            UsageError: the batch keys do not fit together; the message shows the equation and a remedy.
        """
        from libneox.config.batch import batch_plan

        return batch_plan(self, world_size)

    def lr_schedule(self, train_iters: int | None = None) -> Schedule:
        """The learning rate over the run; `train_iters` is needed where the config counts epochs instead.

        Raises:
            UsageError: the horizon is unknown.
        """
        from libneox.schedule import schedule_of

        return schedule_of(self, train_iters)

    def model_config(self, vocab_size: int | None = None) -> ModelConfig:
        """The resolved model.

        Args:
            vocab_size: ids of the tokenizer; default the key `vocab_size`, else `padded_vocab_size`.

        Raises:
            UsageError: the keys describe no model; all that is wrong is named.
        """
        from libneox.config.architecture import model_config

        return model_config(self, vocab_size)

    def deepspeed_dict(self, plan: BatchPlan) -> dict[str, Any]:
        """The part of the configuration that DeepSpeed reads, as its own JSON config."""
        from libneox.config.engine import deepspeed_dict

        return deepspeed_dict(self, plan)
