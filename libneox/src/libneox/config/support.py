# SPDX-License-Identifier: Apache-2.0
"""What a training run needs of its configuration, and what the trainer cannot do yet.

`NOT_YET` is the one table of keys that are understood and documented but have nothing behind them so far. Whoever
builds a feature deletes its row; the reference page, `--help-config` and the refusal follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from libneox.config.architecture import OTHER, SPARSE, check_architecture
from libneox.config.engine import WHOLE
from libneox.config.problems import Problems
from libneox.config.tree import all_keys

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig


@dataclasses.dataclass(frozen=True, slots=True)
class NotYet:
    """Keys that are refused when a run starts, although the configuration itself is fine."""

    keys: tuple[str, ...]  # none: only a value of some key is refused
    reason: str  # reads on after `KEY: `
    when: Callable[[NeoxConfig], bool] | None = None  # default: the key is set to something but its default
    blame: str = ""  # key named in the refusal; default: the first of `keys` that is set
    shape: bool = False  # the model cannot even be described, so its parameters cannot be counted


def _section_on(name: str) -> Callable[[NeoxConfig], bool]:
    return lambda config: bool((config.get(name) or {}).get("enabled"))


def _any_kind(kinds: tuple[str, ...]) -> Callable[[NeoxConfig], bool]:
    return lambda config: config.model.num_layers is not None and bool(set(kinds) & set(config.attention_kinds))


NOT_YET: tuple[NotYet, ...] = (
    NotYet(
        ("moe_num_experts", "moe_expert_interval", "moe_top_k", "moe_router_type", "moe_jitter_eps"),
        "mixture-of-experts layers are not there yet; set moe_num_experts: 1",
        lambda config: config.moe.moe_num_experts > 1,
        shape=True,
    ),
    NotYet(
        (
            "mamba_selective_fp32_params", "mamba_use_bias_in_conv", "mamba_use_bias_in_linears",
            "dim_att", "head_size", "ffn_dim", "gmlp_attn_dim",
        ),
        "gmlp, amlp, mamba and rwkv layers are not there yet; use global or flash in attention_config",
        _any_kind(OTHER),
        "attention_config",
        shape=True,
    ),
    NotYet(
        ("sparsity_config",),
        "local and block-sparse attention are not there yet; use global or flash, or sliding_window_width",
        _any_kind(SPARSE),
        "attention_config",
    ),
    NotYet(
        (
            "train_impl", "dpo_beta", "dpo_fp32", "dpo_reference_free", "kto_beta", "kto_fp32", "kto_desirable_weight",
            "kto_undesirable_weight", "fp32_reinforce", "kl_impl", "kl_div_beta", "reinforce_leave_one_out",
        ),
        "dpo, kto, rm and reinforce are not there yet; set train_impl: normal",
        lambda config: config.post.train_impl != "normal",
    ),
    NotYet(
        tuple(
            f"{side}_{split}{label}_data_paths"
            for split in ("train", "valid", "test")
            for label in ("", "_label")
            for side in ("pos", "neg")
        ),
        "preference pairs are for train_impl dpo and rm, which are not there yet",
        lambda config: config.data.dataset_impl == "pairwise" or bool(config.data.pos_train_data_paths),
        "dataset_impl",
    ),
    NotYet(
        ("train_reward_data_paths", "valid_reward_data_paths", "test_reward_data_paths"),
        "rewards are for train_impl kto and reinforce, which are not there yet",
    ),
    NotYet(
        ("dataset_impl", "online_dataserver_ips", "online_dataserver_ports"),
        "online samples are not there yet; set dataset_impl: gpt2",
        lambda config: config.data.dataset_impl == "online",
    ),
    NotYet(
        ("serve_model_weights", "weight_server_port"),
        "offering weights to a server is not there yet; set serve_model_weights: false",
        lambda config: config.post.serve_model_weights,
    ),
    NotYet(("precompute_model_name",), "reference log-probabilities cannot be computed yet; remove it"),
    NotYet(
        (
            "te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha", "te_fp8_format",
            "te_fp8_wgrad", "te_fp8_amax_history_len", "te_fp8_amax_compute_algo", "te_fp8_margin",
        ),
        "Transformer Engine modules are not there yet; set the te_ switches to false",
        lambda config: any(
            config.get(name)
            for name in ("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha")
        ),
    ),
    NotYet(("autotuning", "autotuning_run"), "the autotuner is not there yet; remove it"),
    NotYet(("soft_prompt_tuning",), "soft prompts are not there yet; remove it", _section_on("soft_prompt_tuning")),
)  # fmt: skip


def check_supported(config: NeoxConfig, world_size: int | None = None) -> None:
    """Check that a run can start with this configuration.

    Args:
        world_size: ranks of the run; with it the batch arithmetic is checked too.

    Raises:
        UsageError: something is missing, or asks for what is not there yet; every problem is named.
    """
    problems = Problems()
    check_architecture(config, problems)
    _check_requirements(config, problems)
    for name, row in _refusals(config):
        problems.add(config.places.get(name), name, row.reason)
    problems.raise_if_any()
    if world_size is not None:
        config.batch_plan(world_size)


def check_describable(config: NeoxConfig, problems: Problems) -> None:
    """Add to `problems` the features that `ModelConfig` has no words for."""
    for name, row in _refusals(config):
        if row.shape:
            problems.add(config.places.get(name), name, row.reason)


def not_yet() -> Mapping[str, NotYet]:
    """The row of each key that has nothing behind it so far."""
    return {name: row for row in NOT_YET for name in row.keys}


def _check_requirements(config: NeoxConfig, problems: Problems) -> None:
    if config.mup.coord_check:
        return  # it has a length and batches of its own, and random ids where there is no data
    if config.train.train_iters is None and config.train.train_epochs is None:
        problems.add(None, "train_iters", "is unknown; set it, or train_epochs")
    if config.pipeline_stages > 1:
        _check_pipeline(config, problems)
    batch = config.batch
    if batch.train_batch_size is None and batch.train_micro_batch_size_per_gpu is None:
        problems.add(None, "train_micro_batch_size_per_gpu", "is unknown; set it, or train_batch_size")
    data = config.data
    if not (data.data_path or data.train_data_paths or data.pos_train_data_paths):
        problems.add(None, "data_path", "is unknown; set it, or train_data_paths, to the prefix of a dataset")


def _check_pipeline(config: NeoxConfig, problems: Problems) -> None:
    def bad(key: str, message: str) -> None:
        problems.add(config.places.get(key.partition(".")[0]), key, message)

    if config.zero_stage > 1:
        bad(
            "zero_optimization.stage",
            f"{config.zero_stage} gives gradients away after each micro-batch, which a pipeline keeps until the last; "
            "set stage: 1, or pipe_parallel_size: 1",
        )
    if config.get("engine") == "plain":
        bad("engine", "plain has no pipeline; set engine: auto, or pipe_parallel_size: 1")
    if config.optim.use_bnb_optimizer:
        bad("use_bnb_optimizer", "its moments have blocks that a pipeline's ZeRO cuts; set pipe_parallel_size: 1")
    if config.optimizer_type in WHOLE:
        bad(
            "optimizer.type",
            f"{config.optimizer_type} needs whole matrices, which ZeRO under a pipeline flattens; "
            "set pipe_parallel_size: 1, or take adam, sgd or lion",
        )


def _refusals(config: NeoxConfig) -> Iterator[tuple[str, NotYet]]:
    """One key to blame and the row, for each row that applies."""
    for row in NOT_YET:
        changed = [name for name in row.keys if config.get(name) != all_keys()[name].default]
        if row.when is None:
            yield from ((name, row) for name in changed)
        elif row.when(config):
            yield row.blame or [*changed, *row.keys][0], row
