# SPDX-License-Identifier: Apache-2.0
"""Finding, merging and translating configurations (C-01, C-02, C-04, C-10)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from libneox.config import NeoxConfig, load_config
from libneox.errors import InputMissing, UsageError

Load = Callable[..., NeoxConfig]
Error = Callable[..., str]


def test_typo_is_answered_with_the_nearest_name(error_of: Error) -> None:
    message = error_of("seq_length: 3\nnum_layer: 2\n")
    assert message.endswith("c.yml:2: num_layer: is not a key; did you mean num_layers?")


def test_all_problems_are_reported_at_once(error_of: Error) -> None:
    message = error_of(
        "num_layer: 2\nhidden_size: wide\nwarmup: 1.5\nnorm: rsmnorm\nzero_optimization: {stge: 1}\nlr: true\n"
        "optimizer: {type: adam, params: {learning_rate: 1}}\n"
    )
    lines = message.splitlines()
    assert lines[0] == "7 problems in the configuration:"
    for number, fragment in enumerate(
        [
            ":1: num_layer: is not a key",
            ":2: hidden_size: expected an integer, found the text 'wide'",
            ":3: warmup: is 1.5; it must be at most 1",
            ":4: norm: expected one of layernorm, rmsnorm, ",
            ":5: zero_optimization.stge: is not a key of zero_optimization; did you mean stage?",
            ":7: optimizer.params.learning_rate: is no argument of adam",
            ":6: optimizer.params.lr: expected a number, found True",
        ],
        1,
    ):
        assert fragment in message, f"problem {number}"


def test_same_key_in_two_files_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("seed: 1\nsplit: '1,0,0'\n")
    (tmp_path / "b.yml").write_text("train_iters: 3\nseed: 1\n")
    with pytest.raises(UsageError) as caught:
        load_config([tmp_path / "a.yml", tmp_path / "b.yml"])
    assert str(caught.value) == f"{tmp_path}/b.yml:2: seed: is set in {tmp_path}/a.yml:1 already; remove one of them"


def test_names_without_suffix_and_conf_dir(tmp_path: Path) -> None:
    for suffix, seed in (("yml", 1), ("yaml", 2), ("json", 3)):
        (tmp_path / f"c{seed}.{suffix}").write_text(
            json.dumps({"seed": seed}, indent="\t" if suffix == "json" else None)
        )
        assert load_config([f"c{seed}"], conf_dir=tmp_path).train.seed == seed
        assert load_config([tmp_path / f"c{seed}"]).train.seed == seed
    with pytest.raises(InputMissing, match="pithia/160M: no such file or preset; did you mean pythia/160M"):
        load_config(["pithia/160M"])


def test_files_override_presets_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("train-iters: 7\nseed: 5\n")
    config = load_config(["pythia/14M", tmp_path / "mine.yml"], overrides=["seed=6", "optimizer.params.lr=2e-3"])
    assert (config.train.train_iters, config.train.seed, config.lr) == (7, 6, 2e-3)
    assert config.optimizer_params["betas"] == [0.9, 0.95]
    assert load_config(["pythia/14M"], overrides={"seed": 9}).train.seed == 9


def test_a_later_layer_displaces_what_says_the_same() -> None:
    config = load_config(["llama2/7B", {"intermediate_size": 32768, "mlp_multiple_of": 256}])
    assert config.model.ffn_hidden_size is None
    assert config.model_config().ffn_size == 11008
    config = load_config(["pythia/14M"], overrides=["train_epochs=2"])
    assert (config.train.train_iters, config.train.train_epochs) == (None, 2)


def test_yaml_traps_end_in_the_right_type(load_text: Load, error_of: Error) -> None:
    config = load_text("wandb_group: no\nwandb_team: 1e-4\nwandb_run_name: 007\nuse_wandb: yes\nwarmup: 1e-1\n")
    assert (config.log.wandb_group, config.log.wandb_team, config.log.wandb_run_name) == ("no", "1e-4", "007")
    assert config.log.use_wandb is True
    assert config.schedule.warmup == 0.1
    assert load_text("seq_length: 0o17").model.seq_length == 15
    assert load_text("train_iters: 1e3").train.train_iters == 1000
    assert "write it without quotes and leading zeros" in error_of("seq_length: 017")
    assert "expected a number, found the text '0.1'; write it without quotes" in error_of("warmup: '0.1'")
    assert "expected true or false, found 1" in error_of("finetune: 1")
    assert "write [data/a]" in error_of("train_data_paths: data/a")
    assert "is nan; give a finite number" in error_of("weight_decay: .nan")


def test_overrides_reach_into_sections(load_text: Load, error_of: Error) -> None:
    config = load_text("zero_optimization: {stage: 1}", "zero-optimization.stage=2", "rope_scaling.type=linear")
    assert config.zero_stage == 2
    assert config.model.rope_scaling == {"type": "linear"}
    assert load_text("", "prompt_end=a: b").generate.prompt_end == "a: b"
    assert load_text("save: x", "save=").train.save is None
    assert "--set sed: is not a key; did you mean seed?" in error_of("", "sed=3")
    assert "has no value" in error_of("", "seed")
    assert "has no key" in error_of("", "=3")
    assert "--set seed.x: seed is no mapping" in error_of("seed: 1", "seed.x=3")


def test_old_names_are_accepted_with_a_warning(load_text: Load) -> None:
    config = load_text("gas: 2\nsave-interval: 500\nattention-configs: [[[flash], 2]]\nlr: 1e-3\n")
    assert config.batch.gradient_accumulation_steps == 2
    assert config.train.checkpoint_factor == 500
    assert config.lr == config.get("lr") == 1e-3
    assert sum("is an old name" in warning for warning in config.warnings) == 4
    assert load_text("train_data_path: a/b").data.train_data_paths == ["a/b"]


def test_contradicting_spellings_are_errors(error_of: Error) -> None:
    assert "gas: means the same as gradient_accumulation_steps" in error_of("gradient_accumulation_steps: 1\ngas: 1\n")
    assert "lr: contradicts optimizer.params.lr, which is 0.1" in error_of(
        "lr: 0.2\noptimizer: {type: adam, params: {lr: 0.1}}"
    )
    assert "gradient_clipping: contradicts" in error_of(
        "gradient_clipping: 1.0\ndeepspeed_extra_args: {gradient_clipping: 0.5}"
    )
    assert "bf16: is enabled but precision is fp16" in error_of("precision: fp16\nbf16: {enabled: true}")


def test_keys_in_deepspeed_extra_args_are_keys(load_text: Load) -> None:
    config = load_text(
        "deepspeed_extra_args: {gradient_clipping: 0.5, bf16: {enabled: true}, zero_force_ds_cpu_optimizer: false}"
    )
    assert config.optim.gradient_clipping == 0.5
    assert config.compute_precision == "bfloat16"
    assert config.deepspeed.deepspeed_extra_args == {"zero_force_ds_cpu_optimizer": False}


def test_precision_override_beats_an_enabled_section(load_text: Load) -> None:
    text = "fp16: {enabled: true, fp16: true, loss_scale: 0}"
    assert load_text(text).compute_precision == "fp16"
    assert load_text(text, "precision=fp32").compute_precision == "fp32"
    assert load_text("precision: BF16").compute_precision == "bfloat16"


def test_what_mlp_type_llama_meant(load_text: Load) -> None:
    text = "num_layers: 32\nhidden_size: 4096\nnum_attention_heads: 32\nmax_position_embeddings: 4096\nnorm: rmsnorm\n"
    text += "pos_emb: rotary\nno_weight_tying: true\nuse_bias_in_attn_linear: false\nmake_vocab_size_divisible_by: 1\n"
    llama = load_text(text + "mlp_type: llama\nactivation: silu\n")
    assert llama.model_config(32000).num_parameters() == 6_738_415_616
    mistral = load_text(text + "mlp_type: llama\nactivation: silu\nnum_kv_heads: 8\nintermediate_size: 14336\n")
    assert mistral.model_config(32000).num_parameters() == 7_241_732_096
    assert any("activation: swiglu, use_bias_in_mlp: false, ffn_hidden_size: 14336" in w for w in mistral.warnings)


def test_names_nobody_knows_any_more_get_a_remedy(error_of: Error) -> None:
    assert "decay_lr_to: is not known; no GPT-NeoX knows it; set min_lr" in error_of("decay_lr_to: 0.033")


def test_launch_keys_name_the_equivalent_command(load_text: Load) -> None:
    slurm = load_text("launcher: slurm\ndeepspeed_slurm: true\nnum_nodes: 4\nnum_gpus: 8\naccount: lab\n")
    assert any("srun --nodes 4 --ntasks-per-node 8 --account lab python -m neox_train" in w for w in slurm.warnings)
    hosts = load_text("hostfile: /job/hosts\ninclude: 'a@b:0,1'\n")
    assert any("deepspeed --hostfile /job/hosts --include a@b:0,1 --module neox_train" in w for w in hosts.warnings)
    for launcher, command in (
        ("openmpi", "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 --hostfile h -np 16 python -m neox_train"),
        ("mpich", "MASTER_ADDR=HOST MASTER_PORT=29500 mpirun --hostfile h -np 16 python -m neox_train"),
        ("flux", "MASTER_ADDR=HOST MASTER_PORT=29500 flux run -n N python -m neox_train"),
    ):
        found = load_text(f"launcher: {launcher}\nhostfile: h\nnum_nodes: 2\nnum_gpus: 8\n")
        assert any(command in warning for warning in found.warnings), found.warnings


def test_a_mapping_is_a_source_and_null_is_the_default() -> None:
    config = load_config([{"seed": None, "train-iters": 5}])
    assert (config.train.seed, config.train.train_iters) == (1234, 5)


def test_an_old_yaml_with_hyphens_loads(load_text: Load) -> None:
    config = load_text(
        """
        { # as GPT-NeoX's own files are written, trailing commas included
          "pipe-parallel-size": 1, "model-parallel-size": 1,
          "num-layers": 12, "hidden-size": 768, "num-attention-heads": 12,
          "seq-length": 2048, "max-position-embeddings": 2048, "norm": "layernorm", "pos-emb": "rotary",
          "no-weight-tying": true, "gpt_j_residual": false, "output_layer_parallelism": "column",
          "scaled-upper-triang-masked-softmax-fusion": true, "bias-gelu-fusion": true,
          "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8,}},
          "zero_optimization": {"stage": 1, "allgather_partitions": True, "overlap_comm": True, "cpu_offload": False,},
          "train_micro_batch_size_per_gpu": 4, "data-impl": "mmap", "split": "949,50,1",
          "checkpoint-activations": true, "partition-activations": true, "synchronize-each-layer": true,
          "fp16": {"fp16": true, "enabled": true, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1},
          "train-iters": 320000, "lr-decay-iters": 320000, "distributed-backend": "nccl",
          "save-interval": 500, "log-interval": 100, "keep-last-n-checkpoints": 4, "wall_clock_breakdown": true,
          "hostfile": "/mock_path"
        }
        """
    )
    assert config.model_config(50277).num_parameters() == 162_322_944
    assert config.model_config(50277).activation == "gelu_tanh"
    assert config.batch_plan(8).global_batch == 32
