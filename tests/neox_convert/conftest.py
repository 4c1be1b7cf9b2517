# SPDX-License-Identifier: Apache-2.0
"""Small models to convert, made without any other program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from libneox.checkpoint.hf import choose_family, hf_config_of, hf_tensors
from libneox.checkpoint.hf.neox_keys import neox_keys_of
from libneox.checkpoint.lazy import LazyTensor, LazyTensors
from libneox.checkpoint.store import write_checkpoint
from libneox.config import load_config
from libneox.model_config import ModelConfig
from libneox.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: emptied after the test, where pytest would keep the last three."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., ModelConfig]:
    """A Pythia of two layers over the 258 ids of the byte tokenizer, with fields replaced as asked."""

    def make(**fields: Any) -> ModelConfig:
        hidden = fields.get("hidden_size", 32)
        base: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": hidden,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_dim": hidden // 4,
            "ffn_size": 4 * hidden,
            "vocab_size": 258,
            "padded_vocab_size": 384,
            "seq_length": 64,
            "max_position_embeddings": 64,
            "residual": "parallel",
            "rotary_pct": 0.5,
        }
        return ModelConfig(**(base | fields))

    return make


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LazyTensors:
    """Reproducible noise for every parameter; norms around 1."""

    def lazy(index: int, name: str, shape: tuple[int, ...]) -> LazyTensor:
        def load() -> torch.Tensor:
            generator = torch.Generator().manual_seed(index)
            noise = torch.randn(shape, generator=generator) * 0.1
            return (noise + 1 if "norm.weight" in name else noise).to(dtype)

        return LazyTensor(shape, dtype, load)

    shapes = config.parameter_shapes()
    return LazyTensors({name: lazy(i, name, shape) for i, (name, shape) in enumerate(shapes.items())})


@pytest.fixture(scope="session")
def make_run() -> MakeModel:
    """Write a run of random weights with one step and the byte tokenizer, and return its path."""

    def make(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, step: int = 3) -> Path:
        tensors = random_tensors(config, dtype)
        write_checkpoint(
            folder / f"step_{step}",
            tensors,
            config_yaml=load_config([neox_keys_of(config)]).to_yaml(),
            tokenizer=load_tokenizer("bytes").data,
            step=step,
        )
        return folder

    return make


@pytest.fixture(scope="session")
def make_hf() -> MakeModel:
    """Write a Hugging Face directory of random weights in one file, or several, and return its path."""
    from safetensors.torch import save_file

    def make(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, files: int = 1) -> Path:
        folder.mkdir(parents=True)
        family = choose_family(config).family
        tensors = hf_tensors(random_tensors(config, dtype).specs(), config, family)
        names = list(tensors)
        parts = [names[i * len(names) // files : (i + 1) * len(names) // files] for i in range(files)]
        weight_map = {}
        for i, part in enumerate(parts):
            name = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            save_file({tensor: tensors[tensor].contiguous() for tensor in part}, folder / name)
            weight_map |= dict.fromkeys(part, name)
        if files > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config_json = hf_config_of(config, family, dtype=dtype, eos_id=0, pad_id=1)
        (folder / "config.json").write_text(json.dumps(config_json))
        (folder / "tokenizer.json").write_bytes(load_tokenizer("bytes").data)
        return folder

    return make
