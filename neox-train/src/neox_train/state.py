# SPDX-License-Identifier: Apache-2.0
"""What the loop knows between two steps: exactly what trainer.json of a checkpoint holds. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any


@dataclasses.dataclass(slots=True)
class TrainState:
    """Counters of a run.

    Attributes:
        step: steps done, skipped ones included.
        samples, tokens: consumed by them.
        updates: steps that changed the weights; the schedule counts these.
        epochs: plans of the sample orders (`Splits.epochs`).
        rng_base: step from which the random numbers of dropout are counted; moved by `no_load_rng`.
        data_fingerprint: of the training samples (`SampleSet.fingerprint`).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    epochs: dict[str, Any] = dataclasses.field(default_factory=dict)
    rng_base: int = 0
    data_fingerprint: str | None = None

    def to_json(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """trainer.json; `optimizer` is its type and its scalars."""
        return dataclasses.asdict(self) | {"optimizer": optimizer}

    @classmethod
    def from_json(cls, stored: dict[str, Any], *, global_batch: int, seq_length: int) -> TrainState:
        """Read trainer.json; what an importer could not know is derived from the step."""
        step = int(stored["step"])
        samples = int(stored.get("samples") or step * global_batch)
        return cls(
            step=step,
            samples=samples,
            tokens=int(stored.get("tokens") or samples * seq_length),
            updates=int(stored.get("updates", step - int(stored.get("skipped") or 0))),
            epochs=stored.get("epochs") or {},
            rng_base=int(stored.get("rng_base") or 0),
            data_fingerprint=stored.get("data_fingerprint"),
        )

    def random_seed(self, seed: int, rank: int) -> int:
        """Seed of the random numbers of the coming step: a pure function, so nothing of a generator need be saved."""
        key = f"{seed}/{self.step - self.rng_base}/{rank}/{self.rng_base}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
