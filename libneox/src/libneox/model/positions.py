# SPDX-License-Identifier: Apache-2.0
"""Position encodings as pure functions of positions or distances.

Suffixes: T positions, R rotated dimensions of a head, D hidden size, N query heads.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from libneox.model_config import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    Returns:
        float32 [R/2] on the CPU, and 1.0 unless the scaling is YaRN.
    Source: arXiv 2104.09864; scaled forms as in transformers' `modeling_rope_utils.py`, except that `ntk` stretches
    the base once and for all (base * factor^(R/(R-2))), so that cached keys stay valid as a text grows.
    """
    dims, base, scaling = config.rotary_dims, config.rotary_base, config.rope_scaling
    if scaling is not None and scaling.type == "ntk":
        base *= scaling.factor ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims
    frequencies = 1.0 / base**exponents
    if scaling is None or scaling.type == "ntk":
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    trained_length = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling, trained_length), 1.0
    return _yarn(frequencies, scaling, trained_length, dims, base)


def _llama3(frequencies: Tensor, scaling: RopeScaling, trained_length: int) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, blend between (Llama 3.1)."""
    turns = trained_length * frequencies / (2 * math.pi)  # over the trained length
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def _yarn(
    frequencies: Tensor, scaling: RopeScaling, trained_length: int, dims: int, base: float
) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071: interpolate the slow pairs, keep the fast ones, and sharpen attention."""

    def pair_turning(turns: float) -> float:
        return dims * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies * (1 - interpolated + interpolated / scaling.factor), attention_factor


@functools.lru_cache(maxsize=32)
def _frequencies_on(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Those of `rotary_frequencies`, copied to a device once: the host waits for copies, captured graphs make none."""
    with torch.inference_mode(False):  # the tensor outlives the caller's mode
        frequencies, factor = rotary_frequencies(config)
        return frequencies.to(device), factor


def rotary_table(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles.

    Args:
        positions_T: integers of any shape [...].
    Returns:
        Two tensors [..., R/2], computed in float32 and cast to `dtype` last.
    """
    frequencies, factor = _frequencies_on(config, positions_T.device)
    angles = positions_T.unsqueeze(-1).float() * frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head; the pairs are (i, i + R/2), as in GPT-NeoX.

    Args:
        cos, sin: [T, 1, R/2] or [B, T, 1, R/2].
    """
    half = cos.shape[-1]
    first, second, rest = x_BTNH.split([half, half, x_BTNH.shape[-1] - 2 * half], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, rest) if rest.shape[-1] else rotated, dim=-1)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """How fast each head's score falls with distance (arXiv 2108.12409).

    Heads beyond the largest power of two take every second slope of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (heads - power), 2)]
    return tuple(slopes)


@functools.lru_cache(maxsize=32)
def slopes_on(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """Slopes as a float32 tensor, copied to a device once, like `_frequencies_on`."""
    with torch.inference_mode(False):  # the tensor outlives the caller's mode
        return torch.tensor(slopes, device=device)


def sinusoids(positions_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """All sines, then all cosines, of t / 10000^(2i/D). Returns [..., D]."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float32, device=positions_T.device) / width)
    angles = positions_T.unsqueeze(-1).float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)


def rpe_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's causal buckets: one each for near keys, then logarithmically wider ones (arXiv 1910.10683).

    Args:
        distances: query position minus key position, int64, any shape; negative counts as 0.
    Returns:
        int64 of the same shape, in [0, buckets).
    """
    distances = distances.clamp(min=0)
    exact = buckets // 2
    position = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (position * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distances < exact, distances, far)
