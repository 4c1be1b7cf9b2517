# SPDX-License-Identifier: Apache-2.0
"""Every golden checkpoint through from-neox, to-hf and from-hf, its logits compared at each station."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from libneox import load_model
from libneox.checkpoint.store import open_tensors
from libneox.errors import UsageError
from neox_convert import convert
from neox_convert.convert import Options
from neox_convert.source import Where

# checkpoint -> class of transformers that represents it exactly; None where there is none
CLASSES = {
    "alibi_pp0_tp1": None,
    "gpt2_tied_pp0_tp1": "GPT2LMHeadModel",
    "gpt2_tied_pp1_tp1": "GPT2LMHeadModel",
    "gpt2_tied_pp1_tp2": "GPT2LMHeadModel",
    "llama_gqa_pp0_tp1": "LlamaForCausalLM",
    "llama_gqa_pp1_tp2": "LlamaForCausalLM",
    "llama_pp0_tp1": "LlamaForCausalLM",
    "mistral_pp0_tp1": "MistralForCausalLM",
    "neox_seqres_pp0_tp1": "GPTNeoXForCausalLM",
    "pythia_pp0_tp1": "GPTNeoXForCausalLM",
    "pythia_pp0_tp2": "GPTNeoXForCausalLM",
    "pythia_pp1_tp1": "GPTNeoXForCausalLM",
    "pythia_pp1_tp2": "GPTNeoXForCausalLM",
    "pythia_pp2_tp1": "GPTNeoXForCausalLM",
    "x_1layer_pp1_tp1": "GPTNeoXForCausalLM",
    "x_geglu_pp0_tp1": None,
    "x_gelufusion_pp0_tp1": "GPTNeoXForCausalLM",
    "x_gptj_tied_ln_pp0_tp1": "GPTNeoXForCausalLM",
    "x_padvocab_pp0_tp1": "GPTNeoXForCausalLM",
    "x_qknorm_pp0_tp1": None,
    "x_qknorm_pp0_tp2": None,
    "x_relu_pp0_tp1": "GPTNeoXForCausalLM",
    "x_rpe_pp0_tp1": None,
    "x_scalenorm_pp0_tp1": None,
    "x_sinusoidal_pp0_tp1": None,
}
QUIET = Options(verify=False, quiet=True)


def transformers_logits(directory: Path, ids: torch.Tensor) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits.numpy()


@pytest.mark.parametrize("name", CLASSES)
def test_there_and_back(golden: Path, tmp_path: Path, name: str) -> None:
    folder = golden / "model/ckpts"
    own = folder / name / "logits.npy"
    wanted = np.load(own if own.exists() else folder / f"logits_{name.rsplit('_', 2)[0]}.npy")
    ids = torch.from_numpy(np.load(golden / "model/tokens.npy"))[: wanted.shape[0]]

    convert.to_native(
        Where(kind="neox", path=str(folder / name / "ckpt")), str(tmp_path / "run"), step=None, options=QUIET
    )
    with torch.inference_mode():
        np.testing.assert_allclose(load_model(tmp_path / "run")(ids).numpy(), wanted, rtol=0, atol=1e-5)

    if CLASSES[name] is None:
        with pytest.raises(UsageError, match="no Hugging Face class represents this model exactly"):
            convert.to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
        assert not (tmp_path / "hf").exists()
        return
    report = convert.to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    assert report.architecture == CLASSES[name]
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", ids), wanted, rtol=0, atol=1e-4)

    convert.to_native(Where(kind="hf", path=str(tmp_path / "hf")), str(tmp_path / "back"), step=None, options=QUIET)
    before, after = open_tensors(tmp_path / "run/step_0"), open_tensors(tmp_path / "back/step_0")
    for tensor in before:
        assert torch.equal(after[tensor], before[tensor]), tensor
    copies = {tensor.replace("attn_norm", "mlp_norm") for tensor in before if "attn_norm" in tensor}
    assert set(after) - set(before) <= copies  # a shared norm is stored twice


def test_mistral_window_counts_the_token_itself(golden: Path, tmp_path: Path) -> None:
    import json

    source = Where(kind="neox", path=str(golden / "model/ckpts/mistral_pp0_tp1/ckpt"))
    convert.to_native(source, str(tmp_path / "run"), step=None, options=QUIET)
    convert.to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    assert json.loads((tmp_path / "hf/config.json").read_text())["sliding_window"] == 17


def test_slim_20b(golden: Path, tmp_path: Path) -> None:
    folder = golden / "model/slim20b"
    convert.to_native(Where(kind="neox", path=str(folder)), str(tmp_path / "run"), step=None, options=QUIET)
    convert.to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    wanted = np.load(folder / "logits_fp32_exact_inv_freq.npy")
    ids = torch.from_numpy(np.load(golden / "model/tokens.npy"))[:, : wanted.shape[1]]
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", ids), wanted, rtol=0, atol=1e-4)


def test_training_state_of_every_layout(golden: Path, tmp_path: Path) -> None:
    """ZeRO-1 over one and over two ranks started from the same weights: the same moments, up to rounding."""
    for run in ("pythia_fp32_zero1", "pythia_fp32_zero1_dp2"):
        source = Where(kind="neox", path=str(golden / "model/train" / run / "ckpt"))
        convert.to_native(source, str(tmp_path / run), step=None, options=QUIET, optimizer=True)
    one = open_tensors(tmp_path / "pythia_fp32_zero1/step_12", "optimizer")
    two = open_tensors(tmp_path / "pythia_fp32_zero1_dp2/step_12", "optimizer")
    model = open_tensors(tmp_path / "pythia_fp32_zero1/step_12")
    assert len(one) == 3 * len(model) == len(two)
    for name in one:
        assert one[name].dtype == torch.float32
        if "qkv.bias" not in name:  # the key third has no true gradient
            torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-6)
    for name in model:
        assert torch.equal(one[f"master/{name}"], model[name])
