# SPDX-License-Identifier: Apache-2.0
"""A run directory with a tiny checkpoint of noise, and running neox-gen on it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 128, "max_position_embeddings": 128,
    "pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 1, "vocab_size": 258, "padded_vocab_size": 384, "init_method_std": 0.4,
}  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN with one step: a model of noise over the byte tokenizer, its config.yml asking for 12 tokens."""
    from libneox.checkpoint.store import write_checkpoint
    from libneox.config import load_config
    from libneox.model import Transformer, init_weights
    from libneox.tokenizer import byte_tokenizer

    run = tmp_path_factory.mktemp("gen") / "run"
    run.mkdir()
    config = load_config([{**CONFIG, "maximum_tokens": 12}])
    model = init_weights(Transformer(config.model_config()), seed=0)
    tensors = model.state_dict()
    write_checkpoint(run / "step_3", tensors, config_yaml=config.to_yaml(), tokenizer=byte_tokenizer().data, step=3)
    return run


Gen = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def gen(run_command: Any, run_folder: Path) -> Gen:
    """`neox-gen RUN ARGS` with some input."""

    def call(*args: str, input: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
        return run_command(["neox-gen", *_with_run(args, run_folder)], input=input, **options)

    return call


def _with_run(args: tuple[str, ...], run: Path) -> list[str]:
    verbs = 1 if args[:1] == ("logprobs",) else 0
    return [*args[:verbs], str(run), *args[verbs:]]


@pytest.fixture(scope="session")
def records() -> Callable[[subprocess.CompletedProcess[bytes]], list[dict[str, Any]]]:
    """The JSON objects on a command's stdout, once it has ended well."""

    def read(result: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
        assert result.returncode == 0, result.stderr.decode()
        return [json.loads(line) for line in result.stdout.decode().splitlines()]

    return read
