# SPDX-License-Identifier: Apache-2.0
"""Each family against transformers: random models, read with our model, written back byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libneox.checkpoint.hf import FAMILIES, choose_family, config_from_hf, hf_config_of, hf_tensors, open_hf
from libneox.checkpoint.hf.neox_keys import neox_keys_of
from libneox.checkpoint.load import build_model
from libneox.config import load_config

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("GPTNeoX", SMALL | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "pythia_sequential": ("GPTNeoX", SMALL | {"use_parallel_residual": False, "hidden_act": "relu"}),
    "pythia_tied": ("GPTNeoX", SMALL | {"tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
    "pythia_no_attention_bias": ("GPTNeoX", SMALL | {"attention_bias": False, "rotary_pct": 1.0}),
    "llama": ("Llama", SMALL),
    "llama_gqa_tied": ("Llama", SMALL | GQA | {"tie_word_embeddings": True}),
    "llama_biases": ("Llama", SMALL | GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("Llama", SMALL | GQA | {"head_dim": 16, "hidden_act": "gelu"}),
    "llama_3_1": ("Llama", SMALL | GQA | {"rope_parameters": LLAMA3}),
    "llama_yarn": ("Llama", SMALL | GQA | {"rope_parameters": YARN}),
    "llama_linear": (
        "Llama",
        SMALL | GQA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("Mistral", SMALL | GQA | {"sliding_window": 8}),
    "mistral_no_window": ("Mistral", SMALL | GQA | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL | GQA),
    "qwen3": ("Qwen3", SMALL | GQA | {"head_dim": 16}),
    "qwen3_biases": ("Qwen3", SMALL | GQA | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "phi": ("Phi", SMALL | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "phi_gqa": ("Phi", SMALL | GQA | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    "starcoder2": ("Starcoder2", SMALL | GQA),
    "starcoder2_window": ("Starcoder2", SMALL | GQA | {"sliding_window": 8, "use_bias": False}),
    "falcon_new": ("Falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon_7b": ("Falcon", SMALL | {"multi_query": True}),
    "falcon_per_head": ("Falcon", SMALL | {"multi_query": False, "tie_word_embeddings": False}),
    "stablelm": ("StableLm", SMALL | GQA | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "stablelm_parallel": ("StableLm", SMALL | GQA | {"use_parallel_residual": True, "use_qkv_bias": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
}


def save_random(folder: Path, name: str, keys: dict[str, Any]) -> Any:
    """A transformers model whose every parameter is random, saved by transformers; a bias of Phi's head is zero."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**keys)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config._attn_implementation = "eager"
    model = getattr(transformers, name + suffix)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(1.0)
            if parameter_name == "lm_head.bias":
                parameter.zero_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_bytes_and_config(tmp_path: Path, case: str) -> None:
    reference = save_random(tmp_path, *CASES[case])
    opened = open_hf(tmp_path)
    ids = torch.randint(96, (2, 48), generator=torch.Generator().manual_seed(0))
    ours = build_model(opened.config, opened, source=tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), reference(input_ids=ids).logits, rtol=0, atol=2e-5)

    # the same bytes come out again, under the names transformers itself writes
    stored = load_file(tmp_path / "model.safetensors")
    again = hf_tensors(opened.specs(), opened.config, opened.family)
    ignored = [name for name in stored if any(re.fullmatch(pattern, name) for pattern in opened.family.ignored)]
    assert set(again) == set(stored) - set(ignored)
    for name in again:
        assert torch.equal(again[name], stored[name]), name

    # config.json and NeoX keys both describe the model completely
    exported = hf_config_of(opened.config, opened.family, eos_id=0, pad_id=None)
    assert config_from_hf(json.loads(json.dumps(exported))) == opened.config
    assert load_config([neox_keys_of(opened.config)]).model_config() == opened.config


@pytest.mark.parametrize("case", CASES)
def test_old_readers_find_what_they_need(tmp_path: Path, case: str) -> None:
    """Transformers 4 looks at other rotary keys than 5; without those of 5, the rest still says the same."""
    name, keys = CASES[case]
    save_random(tmp_path, name, keys)
    opened = open_hf(tmp_path)
    exported = hf_config_of(opened.config, opened.family, eos_id=0, pad_id=None)
    exported.pop("rope_parameters", None)
    assert config_from_hf(exported) == opened.config


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_our_config(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    reference = save_random(tmp_path, *CASES[case])
    opened = open_hf(tmp_path)
    exported = hf_config_of(opened.config, opened.family, eos_id=0, pad_id=None)
    (tmp_path / "config.json").write_text(json.dumps(exported))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(96, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval()(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_every_family_has_a_case() -> None:
    tested = {name.lower() for name, _ in CASES.values()}
    assert tested == {family.architecture.lower().split("for")[0].split("lmhead")[0] for family in FAMILIES}


def test_auto_says_why(tmp_path: Path) -> None:
    save_random(tmp_path, *CASES["mistral"])
    choice = choose_family(open_hf(tmp_path).config)
    assert choice.family.arch == "mistral"
    assert "LlamaForCausalLM: sliding windows are not supported" in choice.why
