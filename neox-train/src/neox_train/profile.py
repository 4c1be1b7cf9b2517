# SPDX-License-Identifier: Apache-2.0
"""Traces of some steps: what ran when, and who allocated what. One file a rank, JSON inside."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from libneox.config import NeoxConfig
from libneox.errors import UsageError
from neox_train.observers import Observer

_EVENTS = 100_000  # allocations that a memory history holds

Warn = Callable[[str], None]


class Recorder(Protocol):
    """What looks on while it is told to."""

    def begin(self) -> None:
        """Begin to record."""

    def end(self, path: Path) -> None:
        """Stop recording, and write a file if this is what writes it."""


class Window(Observer):
    """Has a recorder on from the beginning of step `first` to the end of the one before `stop`."""

    within = True

    def __init__(self, recorder: Recorder, first: int, stop: int, path: Path, warn: Warn):
        """`path` is what is written when it ends."""
        self._recorder, self._first, self._stop, self._path, self._warn = recorder, first, stop, path, warn
        self._on = False
        self._span = contextlib.ExitStack()

    def begin_step(self, step: int) -> None:
        """Switch on; mark the step in a trace."""
        if not self._on and self._first <= step < self._stop:
            self._on = True
            self._recorder.begin()
        if self._on:
            self._span.enter_context(torch.profiler.record_function(f"step {step}"))

    def end_step(self, record: dict[str, Any]) -> None:
        """End the mark; switch off."""
        self._span.close()
        if self._on and record["step"] + 1 >= self._stop:
            self._end()

    def close(self) -> None:
        """Write what there is if the run ends within."""
        if self._on:
            self._end()

    def _end(self) -> None:
        self._on = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._recorder.end(self._path)
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            self._warn(f"{self._path}: {error}; the trace is lost, training goes on")


class Profile:
    """torch.profiler: a trace for ui.perfetto.dev, chrome://tracing or TensorBoard."""

    def begin(self) -> None:
        """Begin to record; the accelerator too if there is one."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def end(self, path: Path) -> None:
        """Write the trace."""
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(path))


class NsightRange:
    """Under `nsys profile -c cudaProfilerApi` the trace is nsys's: only say when, and name the operations."""

    def begin(self) -> None:
        """Begin the range."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        self._names = torch.autograd.profiler.emit_nvtx()
        self._names.__enter__()

    def end(self, path: Path) -> None:
        """End the range; nsys writes the file."""
        torch.cuda.synchronize()
        self._names.__exit__(None, None, None)
        torch.cuda.profiler.stop()


class MemoryHistory:
    """Every allocation of the CUDA allocator, with stacks, and what it held at the end."""

    def begin(self) -> None:
        """Begin to record."""
        torch.cuda.memory._record_memory_history(max_entries=_EVENTS)

    def end(self, path: Path) -> None:
        """Write torch's snapshot, as JSON: torch's own writer would pickle it."""
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        with gzip.open(path, "wt") as file:
            json.dump(snapshot, file, default=str)


def build_profilers(
    config: NeoxConfig, run: Path, rank: int, device: torch.device, first_step: int, warn: Warn
) -> list[Observer]:
    """The windows that `profile` and `memory_profiling` ask for.

    Raises:
        UsageError: there is no such allocator.
    """
    log = config.log
    if not (log.profile or log.memory_profiling):
        return []
    first, stop = log.profile_step_start, log.profile_step_stop
    if log.memory_profiling and device.type != "cuda":
        raise UsageError("memory_profiling: records the allocator of a GPU and there is none; use profile: true")
    if first_step >= stop:
        warn(
            f"profile_step_stop: {stop} is not after step {first_step}, which this start begins with; nothing is traced"
        )
        return []
    found: list[Observer] = []
    if log.profile:
        under_nsys = "NSYS_PROFILING_SESSION_ID" in os.environ and device.type == "cuda"
        path = run / "profile" / f"rank{rank}_steps_{first}-{stop - 1}.pt.trace.json.gz"
        found.append(Window(NsightRange() if under_nsys else Profile(), first, stop, path, warn))
    if log.memory_profiling:
        folder = Path(log.memory_profiling_path) if log.memory_profiling_path else run / "memory"
        path = folder / f"rank{rank}_steps_{first}-{stop - 1}.json.gz"
        found.append(Window(MemoryHistory(), first, stop, path, warn))
    return found
