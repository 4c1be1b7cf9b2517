# SPDX-License-Identifier: Apache-2.0
"""What is asked of an evaluation, as plain values: what the command line says, checked, and nothing heavy imported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from libneox.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """How to load the model and how much to give it at once; see `neox_eval.lm.NeoxLM`."""

    device: str | None = None
    dtype: str = "auto"
    batch_size: str = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    tokenizer: str | None = None
    tensor_parallel: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that results depend on, but the checkpoint."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    samples: dict[str, Any] | None = None
    gen_kwargs: str | None = None
    system_instruction: str | None = None
    chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    include_path: tuple[str, ...] = ()
    seeds: tuple[int, int, int, int] = (0, 1234, 1234, 1234)
    bootstrap_iters: int = 100000
    predict_only: bool = False
    metadata: dict[str, Any] | None = None
    confirm_run_unsafe_code: bool = False
    model: ModelRequest = ModelRequest()

    def fingerprint(self, identity: str) -> str:
        """Identifies the question put to a model; task and data files count by content."""
        values = dataclasses.asdict(self)
        for name in ("device", "batch_size", "tensor_parallel"):  # change the time, not the answers
            del values["model"][name]
        digest = hashlib.sha256(json.dumps([identity, values], sort_keys=True).encode())
        for task in self.tasks:
            if Path(task).is_file():
                digest.update(Path(task).read_bytes())
        return digest.hexdigest()[:32]


def read_json(text: str | None, option: str) -> dict[str, Any] | None:
    """A JSON object from the command line, or from the file named there."""
    if text is None:
        return None
    try:
        value = json.loads(Path(text).read_text() if not text.lstrip().startswith("{") else text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: neither a JSON object nor a file of one ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{option}: not a JSON object")
    return value


def read_seeds(text: str) -> tuple[int, int, int, int]:
    """`7` for all four, or four numbers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seed {text}: numbers, please") from error
    if len(numbers) == 1:
        numbers *= 4
    if len(numbers) != 4 or min(numbers) < 0:
        raise UsageError(f"--seed {text}: one number, or four: Python's, numpy's, torch's, the examples'")
    return numbers[0], numbers[1], numbers[2], numbers[3]
