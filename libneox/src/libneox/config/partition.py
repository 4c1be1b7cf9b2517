# SPDX-License-Identifier: Apache-2.0
"""Which layers each stage of a pipeline holds.

A model is a row of pieces: 0 the embedding, 1 to L the blocks, L + 1 the final norm with the head. A stage holds
consecutive pieces. Pieces go by the names of GPT-NeoX's classes, which `pipe_partition_method: type:REGEX` looks at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from libneox.errors import UsageError
from libneox.model_config import ModelConfig

FIRST, BLOCK, LAST = ("EmbeddingPipe",), ("ParallelTransformerLayerPipe",), ("NormPipe", "ParallelLinearPipe")


def partition(config: ModelConfig, parts: int, method: str) -> list[range]:
    """The pieces of each part, none empty: the heaviest part as light as can be, then the second heaviest, and so on.

    Among equals the earlier parts get more.

    Args:
        method: what a piece weighs. `uniform`: 1; `parameters`: its parameters; `type:REGEX`: 1 if the regular
            expression is found in its name, whatever the case, else 0.
    Raises:
        UsageError: the method is unknown, no name fits, or there are more parts than pieces.
    """
    weights = _weights(config, method)
    if parts > len(weights):
        raise UsageError(f"pipe_parallel_size: {len(weights)} layers cannot fill {parts} stages")
    # best[end]: (weights of the parts in descending order, minus each bound) of the best cut of the first `end` pieces
    best = {end: ([sum(weights[:end])], [-end]) for end in range(1, len(weights) + 1)}
    for number in range(2, parts + 1):
        best = {
            end: min(
                (sorted([*best[begin][0], sum(weights[begin:end])], reverse=True), [*best[begin][1], -end])
                for begin in range(number - 1, end)
            )
            for end in range(number, len(weights) + 1)
        }
    bounds = [0, *(-bound for bound in best[len(weights)][1])]
    return [range(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]


def _weights(config: ModelConfig, method: str) -> list[int]:
    layers = config.num_layers
    if method == "uniform":
        return [1] * (layers + 2)
    if method == "parameters":
        weights = [0] * (layers + 2)
        for name, shape in config.parameter_shapes().items():
            for piece in pieces_of(config, name):
                weights[piece] += math.prod(shape)
        return weights
    kind, colon, pattern = method.partition(":")
    if kind != "type" or not colon:
        raise UsageError(f"pipe_partition_method: {method!r} is unknown; use uniform, parameters or type:REGEX")
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"pipe_partition_method: {pattern!r} is no regular expression ({error})") from None
    names: list[Sequence[str]] = [FIRST, *[BLOCK] * layers, LAST]
    weights = [int(any(found.search(name) for name in piece)) for piece in names]
    if not any(weights):
        known = ", ".join((*FIRST, *BLOCK, *LAST))
        raise UsageError(f"pipe_partition_method: {pattern!r} is found in no layer's name; there are {known}")
    return weights


def pieces_of(config: ModelConfig, name: str) -> list[int]:
    """The pieces that use the logical parameter `name`: one, unless it is tied or shared by all blocks."""
    last = config.num_layers + 1
    if name.startswith("layers."):
        return [int(name.split(".")[1]) + 1]
    if name.startswith("rpe."):
        return list(range(1, last))
    if name == "embed.weight" and config.tie_embeddings:
        return [0, last]
    return [0] if name.startswith(("embed.", "pos_embed.")) else [last]


def holders(config: ModelConfig, parts: Sequence[range]) -> dict[str, list[int]]:
    """The parts that hold each logical parameter, in order."""
    found = {}
    for name in config.parameter_shapes():
        pieces = pieces_of(config, name)
        found[name] = [number for number, part in enumerate(parts) if any(piece in part for piece in pieces)]
    return found
