# SPDX-License-Identifier: Apache-2.0
"""Combinations of values that cannot mean anything, and what a run needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from libneox.config import NeoxConfig, load_config
from libneox.config.support import check_supported
from libneox.errors import UsageError

Error = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_lr: 0.1\nlr: 0.01", "min_lr: is 0.1, more than the learning rate 0.01"),
        ("train_iters: 1\ntrain_epochs: 1", "train_epochs: contradicts train_iters 1"),
        ("override_lr_scheduler: true\nuse_checkpoint_lr_scheduler: true", "contradicts override_lr_scheduler"),
        ("checkpoint_factor: 1.5", "checkpoint_factor: is 1.5; a period must be whole"),
        ("checkpoint_factor: 1\ncheckpoint_scale: log", "it must be more than 1"),
        ("data_path: a\ntrain_data_paths: [b]", "data_path: contradicts train_data_paths"),
        ("valid_data_paths: [b]", "valid_data_paths: needs train_data_paths too"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [1]", "has 1 entries but train_data_paths has 2"),
        ("train_label_data_paths: [a]", "has 1 entries but train_data_paths has 0"),
        ("pos_train_data_paths: [a]\nneg_train_data_paths: [a, b]", "has 2 entries but pos_train_data_paths has 1"),
        ("split: half", "split: 'half' is no list"),
        ("split: '0,0'", "leaves no documents"),
        ("dataset_impl: pairwise", "packed cuts preference pairs apart"),
        ("zero_optimization: {stage: 4}", "zero_optimization.stage: expected 0, 1, 2 or 3, found 4"),
        ("zero_optimization: {mics_shard_size: 4}", "mics_shard_size: is not supported: DeepSpeed 0.19 has no MiCS"),
        ("optimizer: {type: onebitadam}", "onebitadam is 1-bit Adam, which DeepSpeed dropped after version 0.19.6"),
        ("optimizer: {type: adm}", "'adm' is no optimizer; did you mean adam?"),
        ("optimizer: {type: 3}", "optimizer.type: expected the name of an optimizer, found 3"),
        ("optimizer: {type: adam, params: {weight_decay: 0.1}}", "use the key weight_decay"),
        ("optimizer: {type: adam, params: {max_grad_norm: 1}}", "use the key gradient_clipping"),
        ("optimizer: {type: adam, params: {lr: fast}}", "optimizer.params.lr: expected a number, found 'fast'"),
        ("optimizer: {type: adam, params: {betas: 0.9}}", "expected two numbers"),
        ("optimizer: {type: adam, params: {betas: [0.9]}}", "expected two numbers"),
        ("optimizer: {type: adam, params: {bias_correction: false}}", "bias_correction: is always true here"),
        ("optimizer: {type: cpu_adam, params: {fp32_optimizer_states: false}}", "is always true here"),
        ("optimizer: {type: adafactor, params: {eps: 0.001}}", "such as [null, 0.001], found 0.001"),
        ("optimizer: {type: muon, params: {ns_steps: many}}", "expected a number, found 'many'"),
        ("optimizer: {type: adam, params: {lr: -1}}", "it must be at least 0"),
        ("profile: true\nprofile_step_stop: 10", "is not after profile_step_start 10"),
        ("deepspeed: false", "deepspeed: is not supported: DeepSpeed is the engine"),
        ("amp: {enabled: true}", "set precision"),
        ("world_size: 4", "it is the state of a running process"),
        ("fp16: {enabled: maybe}", "fp16.enabled: expected true or false"),
        ("bf16: {enabled: 1}", "bf16.enabled: expected true or false"),
        ("fp16: {lossscale: 0}", "fp16.lossscale: is not a key of fp16; did you mean loss_scale?"),
        ("data_impl: cached", "tokenize the text again"),
        ("use_mup: true", "use_mup: needs mup_base_hidden_size"),
        ("tokenizer: a\nvocab_file: b", "vocab_file: contradicts tokenizer a"),
        (
            "vocab_file: d/gpt2-vocab.json\nmerge_file: e/gpt2-merges.txt",
            "must lie beside d/gpt2-vocab.json as gpt2",
        ),
        ("gradient_clipping: -1", "it must be at least 0"),
    ],
)
def test_refused(error_of: Error, text: str, message: str) -> None:
    assert message in error_of(text)


def test_a_run_names_everything_it_misses() -> None:
    with pytest.raises(UsageError) as caught:
        check_supported(load_config([]))
    for name in ("train_iters", "train_micro_batch_size_per_gpu", "data_path"):
        assert f"{name}: is unknown" in str(caught.value)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        assert f"{name}: is required" in str(caught.value)


def test_a_run_checks_its_batch() -> None:
    config = load_config(
        ["pythia/14M"], overrides=["data_path=x", "train_batch_size=10", "train_micro_batch_size_per_gpu=4"]
    )
    with pytest.raises(UsageError, match="10 is not micro-batch 4 \\* accumulation 2 \\* 1"):
        check_supported(config, world_size=1)


def test_where_the_tokenizer_is() -> None:
    def source(**keys: str) -> str | None:
        return load_config([keys]).tokenizer_source

    assert source() is None
    assert source(vocab_file="a.json", tokenizer_type="HFTokenizer") == "a.json"
    assert source(vocab_file="d/vocab.json", merge_file="d/merges.txt") == "d/vocab.json"
    assert source(tokenizer_type="CharLevelTokenizer") == "charlevel"
    assert source(tokenizer_type="TiktokenTokenizer", vocab_file="cl100k_base") == "tiktoken:cl100k_base"
    assert source(tokenizer="bytes", tokenizer_type="CharLevelTokenizer") == "bytes"


def test_ignored_keys_share_a_warning() -> None:
    config: NeoxConfig = load_config([{"rope_fusion": True, "layernorm_fusion": True, "num_workers": 4}])
    assert len(config.warnings) == 2
    assert config.warnings[0].startswith("layernorm_fusion, rope_fusion: changes nothing: ")
