# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory: its weights, its tokenizer, its chat template, its end-of-text tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from libneox.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=258, **shape, max_position_embeddings=96, bos_token_id=0, eos_token_id=0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def test_chat_and_end_tokens(folder: Path, run_command: Any) -> None:
    chat = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
    plain = b'{"prompt": "u:hi\\na:"}\n'
    result = run_command(["neox-gen", folder, "--ids", "-m", "12", "-q"], input=chat + plain)
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["context"] == second["context"] == "u:hi\na:"
    assert first["tokens"] == second["tokens"]
    generation = folder / "generation_config.json"
    before = json.loads(generation.read_text())
    generation.write_text(json.dumps({**before, "eos_token_id": [0, first["tokens"][4]]}))
    cut = json.loads(run_command(["neox-gen", folder, "--ids", "-m", "12", "-q"], input=plain).stdout)
    generation.write_text(json.dumps(before))
    end = first["tokens"].index(first["tokens"][4])
    assert cut["tokens"] == first["tokens"][:end]
    assert cut["reason"] == "eod"


def test_talk_with_a_chat_model(folder: Path, run_command: Any) -> None:
    result = run_command(["neox-gen", folder, "-i", "-q", "-m", "3"], input=b"hi\nyes\n")
    assert result.returncode == 0, result.stderr
    plain = run_command(["neox-gen", folder, "--text", "-q", "-m", "3", "--prompt-end", "@"], input=b"u:hi\na:@")
    assert result.stdout.startswith(plain.stdout)
