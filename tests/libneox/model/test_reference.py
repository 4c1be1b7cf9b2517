# SPDX-License-Identifier: Apache-2.0
"""float32 logits equal transformers' GPTNeoX, Llama and Mistral on random tiny models."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from libneox.model import Transformer
from libneox.model.positions import rotary_frequencies
from libneox.model_config import ModelConfig, RopeScaling

TOLERANCE = 1e-5


def randomise(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.1)
    return dict(model.state_dict())


def fused_from_heads(tensor: Tensor, heads: int) -> Tensor:
    """GPTNeoX interleaves query, key and value of each head; ours are three blocks."""
    return tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def from_gpt_neox(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    head = next(tensors[name] for name in ("embed_out.weight", "lm_head.weight") if name in tensors)  # by version
    ours = {"embed.weight": tensors["gpt_neox.embed_in.weight"], "head.weight": head}
    names = {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
        "attn.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    }  # fmt: skip
    for part in ("weight", "bias"):
        ours[f"final_norm.{part}"] = tensors[f"gpt_neox.final_layer_norm.{part}"]
        for i in range(config.num_layers):
            for our_name, its_name in names.items():
                tensor = tensors[f"gpt_neox.layers.{i}.{its_name}.{part}"]
                fused = our_name == "attn.qkv"
                ours[f"layers.{i}.{our_name}.{part}"] = fused_from_heads(tensor, config.num_heads) if fused else tensor
    return ours


def from_llama(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    ours = {
        "embed.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
    }
    for i in range(config.num_layers):
        its = {k.removeprefix(f"model.layers.{i}."): v for k, v in tensors.items() if f"layers.{i}." in k}
        at = f"layers.{i}."
        ours[at + "attn_norm.weight"] = its["input_layernorm.weight"]
        ours[at + "mlp_norm.weight"] = its["post_attention_layernorm.weight"]
        ours[at + "attn.qkv.weight"] = torch.cat([its[f"self_attn.{x}_proj.weight"] for x in "qkv"])
        ours[at + "attn.out.weight"] = its["self_attn.o_proj.weight"]
        ours[at + "mlp.up.weight"] = torch.cat([its["mlp.up_proj.weight"], its["mlp.gate_proj.weight"]])
        ours[at + "mlp.down.weight"] = its["mlp.down_proj.weight"]
    return ours


def assert_same_logits(reference: nn.Module, config: ModelConfig, convert: Callable[..., dict[str, Tensor]]) -> None:
    model = Transformer(config).eval()
    model.load_state_dict(convert(randomise(reference), config))
    ids = torch.randint(0, config.vocab_size, (2, config.seq_length))
    with torch.inference_mode():
        difference = (model(ids) - reference.eval()(ids).logits).abs().max().item()
    assert difference < TOLERANCE


def random_shape(dice: random.Random) -> dict[str, Any]:
    heads, head_dim = dice.choice([1, 2, 3, 4]), dice.choice([8, 16, 24])
    vocab = dice.randint(20, 200)
    return {
        "num_layers": dice.randint(1, 3), "hidden_size": heads * head_dim, "num_heads": heads, "head_dim": head_dim,
        "ffn_size": dice.randint(8, 80), "vocab_size": vocab, "padded_vocab_size": vocab,
        "seq_length": dice.randint(1, 40), "max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_gpt_neox(seed: int) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    dice = random.Random(seed)
    shape, parallel, tanh = random_shape(dice), dice.random() < 0.5, dice.random() < 0.5
    percent = dice.choice([0.25, 0.5, 1.0])
    reference = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            num_hidden_layers=shape["num_layers"], hidden_size=shape["hidden_size"], vocab_size=shape["vocab_size"],
            num_attention_heads=shape["num_heads"], intermediate_size=shape["ffn_size"], rotary_pct=percent,
            use_parallel_residual=parallel, max_position_embeddings=64, hidden_act="gelu_new" if tanh else "gelu",
        )
    )  # fmt: skip
    config = ModelConfig(
        **shape,
        num_kv_heads=shape["num_heads"],
        rotary_pct=percent,
        residual="parallel" if parallel else "sequential",
        activation="gelu_tanh" if tanh else "gelu",
    )
    assert_same_logits(reference, config, from_gpt_neox)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_llama_and_mistral(family: str, seed: int) -> None:
    import transformers

    torch.manual_seed(seed)
    dice = random.Random(seed)
    shape = random_shape(dice)
    kv_heads = dice.choice([k for k in range(1, shape["num_heads"] + 1) if shape["num_heads"] % k == 0])
    window = dice.choice([3, 7, 64]) if family == "Mistral" else None
    extra = {"sliding_window": window} if family == "Mistral" else {}
    reference = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            num_hidden_layers=shape["num_layers"], hidden_size=shape["hidden_size"], vocab_size=shape["vocab_size"],
            num_attention_heads=shape["num_heads"], num_key_value_heads=kv_heads, head_dim=shape["head_dim"],
            intermediate_size=shape["ffn_size"], max_position_embeddings=64, rms_norm_eps=1e-6, **extra,
        )
    )  # fmt: skip
    config = ModelConfig(
        **shape, num_kv_heads=kv_heads, norm="rmsnorm", norm_eps=1e-6, activation="swiglu", qkv_bias=False,
        attn_out_bias=False, mlp_bias=False, sliding_window=window,
    )  # fmt: skip
    assert_same_logits(reference, config, from_llama)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(type="linear", factor=3.0),
        RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64),
        RopeScaling(type="yarn", factor=2.0, original_max_position_embeddings=32, beta_fast=16, attention_factor=1.5),
        RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=128, high_freq_factor=4.0),
    ],
    ids=lambda scaling: scaling.type,
)
def test_scaled_rotary_frequencies(scaling: RopeScaling, tiny_config: Callable[..., ModelConfig]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config(hidden_size=256, head_dim=64, rope_scaling=scaling, max_position_embeddings=512)
    its = {"rope_type": scaling.type, "rope_theta": 10000.0, "factor": scaling.factor}
    its["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.type == "yarn":
        its |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        its |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    if scaling.type == "llama3":
        its |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    reference_config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=its)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.type](reference_config)
    ours, our_factor = rotary_frequencies(config)
    torch.testing.assert_close(ours, expected)
    assert our_factor == pytest.approx(factor)


def test_ntk_scaling_stretches_the_slowest_pair_by_the_factor(tiny_config: Callable[..., ModelConfig]) -> None:
    plain, _ = rotary_frequencies(tiny_config(head_dim=64))
    scaled, _ = rotary_frequencies(tiny_config(head_dim=64, rope_scaling=RopeScaling(type="ntk", factor=4.0)))
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-5)
