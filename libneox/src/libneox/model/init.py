# SPDX-License-Identifier: Apache-2.0
"""Initial values: which distribution each parameter is drawn from, in one table.

Every parameter has a generator of its own, keyed by seed and name, and is drawn whole in float32 on the CPU: the same
seed gives the same logical weights on any layout, device and dtype, and a rank that holds a slice slices what is drawn.
Source of the distributions: GPT-NeoX's init_functions.py (the two orthogonal ones as intended there), muP: arXiv
2203.03466.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from libneox.errors import UsageError
from libneox.model.transformer import Transformer
from libneox.model_config import ModelConfig

Fill = Callable[[Tensor, torch.Generator], object]


def init_weights(model: Transformer, seed: int) -> Transformer:
    """Give every parameter of an unsharded model its initial value, and return the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model.config, name, seed))
    return model


def initial_value(config: ModelConfig, name: str, seed: int) -> Tensor:
    """The whole logical parameter `name` at step 0: float32 on the CPU.

    More rows in the padded vocabulary leave the values of the others as they are.
    """
    value = torch.empty(config.parameter_shapes()[name], dtype=torch.float32, device="cpu")
    fill_of(config, name)(value, _generator(seed, name))
    return value


def fill_of(config: ModelConfig, name: str) -> Fill:
    """The table: what `name` is filled with."""
    leaf = name.split(".", 2)[-1] if name.startswith("layers.") else name
    if leaf.endswith(".bias"):
        return _constant(0.0)
    if leaf.endswith("norm.weight"):
        return _constant(1.0)
    match leaf:
        case "embed.weight" | "pos_embed.weight" | "head.weight":
            return distribution(config, config.init_method)
        case "attn.qkv.weight" | "mlp.up.weight":
            return distribution(config, config.init_method, between_hidden=True)
        case "attn.out.weight" | "mlp.down.weight":
            return distribution(config, config.output_layer_init_method, between_hidden=True)
        case "rpe.weight":
            return _xavier_normal
    raise AssertionError(f"no initial value for {name}")


def distribution(config: ModelConfig, method: str, *, between_hidden: bool = False) -> Fill:
    """A filler for one of GPT-NeoX's nine `init_method`s.

    Args:
        between_hidden: both dimensions of the matrix grow with the model. With muP such matrices are drawn with the
            base model's deviation over sqrt(width multiplier), all others with the base model's own.
    Raises:
        UsageError: unknown method.
    """
    layers = config.num_layers
    width = config.hidden_size / config.mup_width_mult  # the base model's, with muP
    mup = config.mup_init_scale if config.use_mup else 1.0
    if between_hidden:
        mup /= math.sqrt(config.mup_width_mult)
    deviations = {
        "normal": config.init_method_std,
        "scaled_normal": config.init_method_std / math.sqrt(2.0 * layers),
        "single_residual_scaled_normal": config.init_method_std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / layers / math.sqrt(width),
    }
    if method in deviations:
        return _normal(deviations[method] * mup)
    fills: dict[str, Fill] = {
        "xavier_uniform": _xavier_uniform,
        "xavier_normal": _xavier_normal,
        "orthogonal": _orthogonal(math.sqrt(2)),
        "scaled_orthogonal": _orthogonal(math.sqrt(2 / layers)),
    }
    if method not in fills:
        raise UsageError(f"init_method {method!r} is unknown; use one of {', '.join((*deviations, *fills))}")
    if config.use_mup:
        raise UsageError(f"muP scales normal distributions; use one of {', '.join(deviations)} and not {method}")
    return fills[method]


def _generator(seed: int, name: str) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "little") >> 1)


def _constant(value: float) -> Fill:
    return lambda tensor, generator: tensor.fill_(value)


def _normal(std: float) -> Fill:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def _xavier_normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.xavier_normal_(tensor, generator=generator)


def _xavier_uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.xavier_uniform_(tensor, generator=generator)


def _orthogonal(gain: float) -> Fill:
    return lambda tensor, generator: nn.init.orthogonal_(tensor, gain, generator=generator)
