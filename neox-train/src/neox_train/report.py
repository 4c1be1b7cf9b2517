# SPDX-License-Identifier: Apache-2.0
"""What a run tells about itself: metrics.jsonl, lines on stderr, checkpoint paths on stdout."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libneox import run_directory
from neox_train.signals import stdout_line


class Report:
    """Rank 0 writes, the others keep silent.

    metrics.jsonl holds one object a step: `step`, `samples`, `tokens` (totals), `loss`, `lr` (used by this step),
    `grad_norm` (before clipping), `step_s`, `tokens_per_s`, `tflops` (per device, model FLOPs), `mfu`, `memory_gb`
    (peak, of this process or its device), `eta_s`; `loss_scale`, `skipped` and
    `curriculum_seqlen` where they mean something; after an
    evaluation `valid_loss` and `valid_ppl`. The figures of the closing evaluations are in run_status.json.
    """

    def __init__(
        self,
        run: Path,
        *,
        active: bool,
        stdout: int | None,
        quiet: bool,
        log_interval: int,
        train_iters: int,
        flops_per_token: Callable[[int], float],
        devices: int,
        peak_tflops: float | None,
    ):
        self._active, self._stdout, self._quiet, self._interval = active, stdout, quiet, log_interval
        self._last, self._flops, self._devices, self._peak = train_iters, flops_per_token, devices, peak_tflops
        self._file = open(run / run_directory.METRICS, "a", buffering=1) if active else None  # noqa: SIM115
        self._sum, self._count, self._first_step = 0.0, 0, True
        self._rates: list[float] = []
        self._live = active and not quiet and sys.stderr.isatty()

    def step(self, record: dict[str, Any], seconds: float, tokens: int, length: int) -> None:
        """Complete the record of a step of `tokens` tokens, in samples of `length`, and write it."""
        if self._file is None:
            return
        rate = tokens / max(seconds, 1e-9)
        if not self._first_step:  # the first one pays for allocations and compilation
            self._rates = [*self._rates[-99:], seconds]
        self._first_step = False
        typical = sorted(self._rates)[len(self._rates) // 2] if self._rates else seconds
        tflops = rate * self._flops(length) / self._devices / 1e12
        record |= {"step_s": round(seconds, 6), "tokens_per_s": round(rate, 1), "tflops": round(tflops, 4)}
        if self._peak:
            record["mfu"] = round(tflops / self._peak, 4)
        record |= {"memory_gb": round(memory_gb(), 3), "eta_s": round((self._last - record["step"]) * typical, 1)}
        self._file.write(json.dumps(record) + "\n")
        self._sum, self._count = self._sum + record["loss"], self._count + 1
        if self._live or record["step"] % self._interval == 0 or record["step"] == self._last:
            self._print(record)

    def _print(self, record: dict[str, Any]) -> None:
        done = record["step"] % self._interval == 0 or record["step"] == self._last
        if not self._quiet:
            mean = self._sum / self._count
            norm = math.inf if record["grad_norm"] is None else record["grad_norm"]  # of a skipped step
            text = (
                f"step {record['step']}/{self._last}  loss {mean:.4f}  lr {record['lr']:.3e}  "
                f"grad {norm:.3f}  {record['tokens_per_s']:,.0f} tokens/s  eta {clock(record['eta_s'])}"
            )
            end, start = ("\n", "\r\x1b[K" if self._live else "neox-train: ") if done else ("", "\r\x1b[K")
            print(start + text, end=end, file=sys.stderr, flush=True)
        if done:
            self._sum, self._count = 0.0, 0

    def note(self, message: str) -> None:
        """A line on stderr."""
        if self._active and not self._quiet:
            print(f"{self._line_start()}neox-train: {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """A line on stderr that `-q` does not silence."""
        if self._active:
            print(f"{self._line_start()}neox-train: warning: {message}", file=sys.stderr, flush=True)

    def _line_start(self) -> str:
        return "\r\x1b[K" if self._live else ""

    def checkpoint(self, path: Path) -> None:
        """A committed checkpoint: its path on stdout."""
        if self._active:
            self._stdout = stdout_line(self._stdout, str(path))

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._file is not None:
            self._file.close()


def clock(seconds: float) -> str:
    """`3725` as `1:02:05`."""
    whole = int(seconds) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def memory_gb() -> float:
    """Peak memory: of the device if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """What a matrix product reaches on this device, in TFLOP/s: the ceiling that `mfu` is a share of."""
    size = 8192 if device.type == "cuda" else 1536
    generator = torch.Generator(device).manual_seed(0)  # the data must be random: products of zeros or ones are faster
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    best, until = math.inf, time.perf_counter() + 0.25
    while time.perf_counter() < until or best == math.inf:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
