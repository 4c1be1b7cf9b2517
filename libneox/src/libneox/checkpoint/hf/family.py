# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face model family is to us: a configuration map, a tensor map, and the conditions of exactness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from libneox.checkpoint.hf.rules import Rule
from libneox.model_config import GATED, ModelConfig

Json = dict[str, Any]

# our activation -> the name transformers knows it by; families write the tanh form of gelu as their own files do
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
ACTIVATIONS_READ = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
GATED_READ = {ACTIVATIONS[plain]: gated for gated, plain in GATED.items() if plain in ACTIVATIONS}
PLAIN = frozenset(ACTIVATIONS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. Functions take our ModelConfig or the content of their config.json, with `defaults` filled in.

    Attributes:
        arch: `model_type`, and the name on our command line.
        architecture: the class that transformers loads.
        allows: field of ModelConfig -> values that the family can represent.
        conditions: further (reason, test) pairs; the reason says what must hold.
        write: our configuration as keys of config.json.
        read: keys of config.json as arguments of ModelConfig.
        rules: the tensor map.
        defaults: what the family's class assumes where config.json is silent.
        ignored: regular expressions of stored names that are no parameters.
        prefix: put in front of stored names that lack it.
    """

    arch: str
    architecture: str
    allows: Mapping[str, Sequence[Any]]
    write: Callable[[ModelConfig], Json]
    read: Callable[[Json], Json]
    rules: Callable[[ModelConfig], list[Rule]]
    defaults: Mapping[str, Any]
    conditions: tuple[tuple[str, Callable[[ModelConfig], bool]], ...] = ()
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    prefix: str = ""

    def reasons(self, config: ModelConfig) -> list[str]:
        """Why `config` cannot be represented exactly; empty if it can."""
        found = [
            f"{field} is {getattr(config, field)}, not {' or '.join(map(str, values))}"
            for field, values in self.allows.items()
            if getattr(config, field) not in values
        ]
        return found + [reason for reason, holds in (*GENERAL_CONDITIONS, *self.conditions) if not holds(config)]


GENERAL_CONDITIONS: tuple[tuple[str, Callable[[ModelConfig], bool]], ...] = (
    ("muP multipliers have no counterpart", lambda c: not c.use_mup),
    ("QK-norm over several heads has no counterpart", lambda c: c.qk_norm != "joint"),
    ("a fixed NTK stretch has no counterpart", lambda c: c.rope_scaling is None or c.rope_scaling.type != "ntk"),
    ("OPT's position offset has no counterpart", lambda c: c.learned_position_offset == 0),
)
MHA = ("key and value heads must be as many as heads", lambda c: c.num_kv_heads == c.num_heads)
FULL_ROTARY = ("all of a head must be rotated", lambda c: c.rotary_dims == c.head_dim)
SQUARE_HEADS = ("heads x head_dim must be the hidden size", lambda c: c.num_heads * c.head_dim == c.hidden_size)
NO_WINDOW = ("sliding windows are not supported", lambda c: c.sliding_window is None)
