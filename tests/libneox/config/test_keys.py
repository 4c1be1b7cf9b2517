# SPDX-License-Identifier: Apache-2.0
"""Every key acts, is a warned alias, is ignored with a warning, or is refused: walked one by one."""

from __future__ import annotations

import json
import re
import typing
from typing import Any

import pytest

from libneox.config import all_keys, load_config
from libneox.config.aliases import ALIASES, REMOVED
from libneox.config.key import Key
from libneox.config.reference import help_key, json_schema, markdown, standing
from libneox.config.support import NOT_YET, check_supported
from libneox.config.types import alternatives
from libneox.errors import UsageError

NEW = {
    "ffn_hidden_size", "head_dim", "vocab_size", "padded_vocab_size", "use_bias_in_qkv", "use_bias_in_attn_out",
    "rope_scaling", "qk_norm", "qk_norm_groups", "mup_base_hidden_size", "tokenizer", "order", "document_mask",
    "reset_position_ids", "wsd_decay_fraction", "wsd_decay_style", "engine", "pipe_schedule",
    "async_save", "on_save_error", "replica_check_interval", "loss_weighting", "compile", "cpu_products",
    "keep_host_memory", "cpu_threads", "attention_kernel", "cuda_graphs", "run_ahead", "freeze_gc", "prefetch",
    "checkpoint_policy", "loss_chunk_mb",
}  # fmt: skip
SPECIAL = {  # values that pass the checks across keys
    "attention_config": [[["flash"], 2]],
    "split": "1,0,0",
    "optimizer": {"type": "adam", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 2},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "min_lr": 1e-5,
    "rotary_pct": 0.5,
    "seq_length": 32,
    "num_kv_heads": 2,
    "hidden_size": 128,
    "data_impl": "mmap",
    "data_types": {"grad_accum_dtype": "fp32"},
    "intermediate_size": 128,
    "curriculum_learning": {
        "enabled": True,
        "min_difficulty": 8,
        "max_difficulty": 16,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
    },
    "fp16": {"enabled": True},
    "bf16": {"enabled": True},
    "profile_step_start": 11,
    "pack_impl": "unpacked",
    "checkpoint_factor": 5,
}
SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
RUN = SHAPE | {"train_iters": 10, "train_micro_batch_size_per_gpu": 1, "data_path": "data/x"}


def other_value(key: Key) -> Any:
    """A value of the key's type that is not its default."""
    if key.name in SPECIAL:
        return SPECIAL[key.name]
    part = alternatives(key.type)[0]
    origin = typing.get_origin(part)
    if origin is typing.Literal:
        return next(choice for choice in typing.get_args(part) if choice != key.default)
    if origin is list:
        return [{str: "x", int: 3, float: 0.5}[typing.get_args(part)[0]]]
    if origin is dict:
        return {"enabled": True} if key.sections and "enabled" in key.sections else {"x": 1}
    if part is bool:
        return not key.default
    if part is str:
        return "other"
    number = (key.default or 0) + 1 if part is int else (key.default or 0.5) / 2
    return max(number, key.minimum or 0)


LIVE = [key for key in all_keys().values() if typing.get_args(key.type) != ("column",)]
NEEDS: dict[str, dict[str, Any]] = {
    "train_epochs": {"train_iters": None},
    "expansion_factor": {},
    "sequence_parallel": {"model_parallel_size": 2},
    "use_checkpoint_lr_scheduler": {},
    "use_mup": {"mup_base_hidden_size": 32},
    "train_data_paths": {"data_path": None},
    "valid_data_paths": {"data_path": None, "train_data_paths": ["x"]},
    "test_data_paths": {"data_path": None, "train_data_paths": ["x"]},
    "dataset_impl": {"pack_impl": "unpacked"},
}
for _split in ("train", "valid", "test"):
    for _kind in ("data_weights", "label_data_paths", "reward_data_paths"):
        NEEDS[f"{_split}_{_kind}"] = {"data_path": None, "train_data_paths": ["x"], f"{_split}_data_paths": ["x"]}
    _both = {f"pos_{_split}_data_paths": ["x"], f"neg_{_split}_data_paths": ["x"]}
    for _side in ("pos", "neg"):
        NEEDS[f"{_side}_{_split}_data_paths"] = _both
        NEEDS[f"{_side}_{_split}_label_data_paths"] = _both


def settings(key: Key) -> dict[str, Any]:
    return RUN | NEEDS.get(key.name, {}) | {key.name: other_value(key)}


@pytest.mark.parametrize("key", LIVE, ids=lambda key: key.name)
def test_every_key_does_what_its_standing_says(key: Key) -> None:
    state, reason = standing(key)
    if state == "refused":
        with pytest.raises(UsageError, match=re.escape(f"{key.name}: is not supported: {reason}")):
            load_config([settings(key)])
        return
    config = load_config([settings(key)])
    assert config.is_set(key.name)
    mentioned = [warning for warning in config.warnings if re.search(rf"\b{key.name}\b", warning)]
    if state == "ignored":
        assert mentioned, "an ignored key must be warned about"
        assert "changes nothing" in mentioned[0] or "start the ranks yourself" in mentioned[0]
    elif state == "acts":
        check_supported(config, world_size=config.tensor_parallel * config.pipeline_stages)
        assert not any("changes nothing" in warning for warning in mentioned if key.name not in ("gpt_j_tied",))


@pytest.mark.parametrize("row", NOT_YET, ids=lambda row: row.blame or row.keys[0])
def test_what_is_not_there_yet_is_refused_when_a_run_starts(row: Any) -> None:
    blame = row.blame or row.keys[0]
    if blame == "optimizer.type":
        with pytest.raises(UsageError, match="optimizer.type: muon is not there yet"):
            check_supported(load_config([RUN | {"optimizer": {"type": "muon"}}]))
        return
    values = {
        "attention_config": [[["gmlp" if "gmlp_attn_dim" in row.keys else "local"], 2]],
        "train_impl": "dpo",
        "dataset_impl": "pairwise" if "pos_train_data_paths" in row.keys else "online",
    }
    value = values.get(blame) if blame in values else other_value(all_keys()[blame])
    config = load_config([RUN | NEEDS.get(blame, {}) | {blame: value}])
    with pytest.raises(UsageError, match=re.escape(f"{blame}: {row.reason}")):
        check_supported(config)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_accepted_with_a_warning(name: str) -> None:
    values = {
        "optimizer_type": "sgd",
        "attention_type": "groupedquery",
        "mlp_type": "llama",
        "lr": 0.1,
        "zero_stage": 2,
    }
    values |= {"attention_configs": [[["flash"], 2]], "zero_reduce_scatter": True, "zero_contiguous_gradients": True}
    values |= {"zero_allow_untested_optimizer": True}
    base = dict(SHAPE)
    if name.endswith(("data_path", "data_paths")):
        values[name] = "x"
        base |= {} if name == "train_data_path" else {"train_data_paths": ["y"]}
    config = load_config([base | {name: values.get(name, 3)}])
    assert any(name in warning for warning in config.warnings)
    head = ALIASES[name].target.split(".")[0]
    assert name == "attention_type" or config.is_set(head)


@pytest.mark.parametrize("name", REMOVED)
def test_removed_names_have_a_remedy(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(REMOVED[name])):
        load_config([{name: 1}])
    assert REMOVED[name] in help_key(name)


def test_all_318_keys_of_gpt_neox_are_there() -> None:
    """318 of the original, less the mirrors that are aliases here, plus the new ones."""
    mirrors = {
        "optimizer_type", "zero_stage", "zero_reduce_scatter", "zero_contiguous_gradients", "zero_reduce_bucket_size",
        "zero_allgather_bucket_size", "lr", "batch_size", "clip_grad",
    }  # fmt: skip
    assert mirrors <= set(ALIASES)
    new = NEW - {"padded_vocab_size"}
    assert new <= set(all_keys())
    assert len(set(all_keys()) - new | mirrors) == 318


def test_reference_page_names_everything() -> None:
    page = markdown()
    for name, key in all_keys().items():
        assert f"| `{name}` |" in page
        assert key.doc.endswith((".", "?")), name
    assert all(f"| `{name}` |" in page for name in ALIASES)
    assert {standing(key)[0] for key in all_keys().values()} <= {"acts", "not yet", "ignored", "refused"}


def test_help_of_a_key() -> None:
    text = help_key("seq-length")
    assert text.startswith("seq_length\n")
    assert "type: an integer, at least 1" in text
    assert "  acts" in text
    assert "old names: gas" in help_key("gradient_accumulation_steps")
    assert "stage: 0 to 3" in help_key("zero_optimization")
    assert help_key("all") == markdown()
    assert json.loads(help_key("schema")) == json_schema()
    with pytest.raises(UsageError, match="did you mean seq_length"):
        help_key("seq_lenght")


def test_schema_describes_presets() -> None:
    schema = json_schema()
    known = set(schema["properties"])
    for name in ("20B", "pythia/160M", "llama3/8B", "palm/8B"):
        assert set(load_config([name]).to_dict()) <= known
    assert schema["properties"]["seq_length"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert "cosine" in schema["properties"]["lr_decay_style"]["anyOf"][0]["enum"]
    assert "deepscale" not in known
