# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a finished run: everything that is set up before the loop and taken down after it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from libneox import run_directory
from libneox.config import NeoxConfig
from libneox.errors import (
    INTERRUPTED,
    InputMissing,
    NeoxError,
    OutOfMemory,
    PeerLost,
    StorageError,
    UsageError,
)
from libneox.parallel.group import Group
from libneox.parallel.launch import Launch
from libneox.run_directory import CheckpointRef
from neox_train import loop, speed
from neox_train.remote import Uploads
from neox_train.report import memory_gb
from neox_train.resume import Start, find_start, run_path
from neox_train.setup import prepare
from neox_train.signals import StopRequest
from neox_train.threads import neighbours_of, set_threads
from neox_train.watch import Watch, is_communication

NO_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed")  # of the CPU, CUDA and cuBLAS, as they say it
LEAVE_S = 5.0  # how long a run that is stopped waits for copies of checkpoints


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line adds to the configuration."""

    stdout: int | None
    quiet: bool
    step_timeout_s: float


def run(config: NeoxConfig, launch: Launch, options: Options) -> None:
    """Train as configured, on this process of the run."""
    device = pick_device(launch, config)
    speed.set_up(config, device)
    with StopRequest(echoes=launch.world_size > 1).listening() as stop:
        group = Group(launch, timeout_s=options.step_timeout_s)
        try:
            agree(group, config)
            check_devices(group, device)
            if device.type == "cpu":
                set_threads(config.speed.cpu_threads, neighbours_of(group))
            group.start_collectives("nccl" if device.type == "cuda" else "gloo")
            _run_with_status(config, group, device, options, stop)
        finally:
            group.close()


def pick_device(launch: Launch, config: NeoxConfig) -> torch.device:
    """This rank's accelerator, else the CPU.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if config.compute_precision == "fp16":
        raise UsageError("precision: fp16 needs a GPU and there is none; use --set precision=fp32 (or bfloat16)")
    return torch.device("cpu")


def agree(group: Group, config: NeoxConfig) -> None:
    """Raise UsageError, naming keys and ranks, unless all ranks have the same configuration."""
    hashes = group.gather(config.hash)
    if len(set(hashes)) == 1:
        return
    dicts = group.gather(config.to_dict())
    other = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
    keys = [key for key in sorted({*dicts[0], *dicts[other]}) if dicts[0].get(key) != dicts[other].get(key)]
    raise UsageError(f"rank 0 and rank {other} differ in {', '.join(keys)}; give all ranks the same command line")


def check_devices(group: Group, device: torch.device) -> None:
    """Raise UsageError, on all ranks alike, if one has no GPU of its own: NCCL would take that for a lost rank."""
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    places = group.gather([socket.gethostname(), own])
    shared = next((place for place in places if place[1] and places.count(place) > 1), None)
    if shared is not None:
        ranks = ", ".join(str(rank) for rank, place in enumerate(places) if place == shared)
        raise UsageError(f"ranks {ranks} have one GPU of {shared[0]} among them; start as many as there are GPUs")


def _run_with_status(
    config: NeoxConfig, group: Group, device: torch.device, options: Options, stop: StopRequest
) -> None:
    """Hold the run directory and leave word of how it ended, whatever a launcher makes of the exit code."""
    path = run_path(config)
    with contextlib.ExitStack() as stack:
        group.on_first(lambda: stack.enter_context(run_directory.lock(path)))
        status = _Status(path, group)
        status.write("running")
        stop.last_words = lambda: status.write("failed", code=INTERRUPTED, reason="interrupted twice, left as it was")
        try:
            if group.is_first:
                for name in run_directory.remove_unfinished(path):
                    _warn(f"{path / name}: was never finished; removed")
            uploads = _uploads(config, group)
            if uploads is not None:
                stack.callback(uploads.wait, LEAVE_S)
            with Watch(group, step_timeout_s=options.step_timeout_s, on_loss=status.lost) as watch:
                figures = _prepare_and_train(config, group, device, options, stop, status, watch, uploads)
            if uploads is not None:  # the other ranks need not wait for this
                uploads.finish(lambda: bool(stop))
            status.write("finished", code=0, **({"evaluation": figures} if figures else {}))
        except Exception as error:
            known = _known(error, config, group)
            if known is None:
                status.write("failed", code=1, reason=f"{type(error).__name__}: {error}")
                raise
            status.write("stopped" if known.exit_code == 75 else "failed", code=known.exit_code, reason=str(known))
            if known is error:
                raise
            raise known from error


def _known(error: Exception, config: NeoxConfig, group: Group) -> NeoxError | None:
    """An error as one of ours, with its exit code; None if it is a bug."""
    text = str(error).partition("\n")[0]
    if isinstance(error, NeoxError):
        return error
    # NCCL says it in a later line
    short = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
    if short or isinstance(error, MemoryError | torch.OutOfMemoryError):
        micro_batch = config.batch_plan(group.world_size).micro_batch
        return OutOfMemory(
            f"out of memory on rank {group.rank} after a peak of {memory_gb():.2f} GB ({text or 'host'}); lower "
            f"train_micro_batch_size_per_gpu (it is {micro_batch}) or set checkpoint_activations: true. The last "
            "checkpoint is whole"
        )
    if group.world_size > 1 and is_communication(error):
        return PeerLost(f"another rank was lost ({error})")
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        kind = InputMissing if isinstance(error, FileNotFoundError) else StorageError
        return kind(f"{where}{error.strerror or error}; the last checkpoint is whole, run the same command again")
    return None


def _uploads(config: NeoxConfig, group: Group) -> Uploads | None:
    """Copies at `s3_path`, made by rank 0."""
    url = config.train.s3_path

    def begin() -> None:
        nonlocal uploads
        if url is not None:
            uploads = Uploads(run_path(config), url, part_bytes=config.train.s3_chunk_size, warn=_warn)

    uploads: Uploads | None = None
    group.on_first(begin)
    return uploads


def _warn(text: str) -> None:
    print(f"neox-train: warning: {text}", file=sys.stderr, flush=True)


class _Status:
    """RUN/run_status.json. A rank other than the first writes it only to say that it failed."""

    def __init__(self, run: Path, group: Group):
        self._run, self._group = run, group
        self.step: int | None = None

    def write(self, state: str, **fields: Any) -> None:
        if not self._group.is_first and state in ("running", "finished", "stopped"):
            return
        earlier = run_directory.read_status(self._run) or {}
        if state == "failed" and earlier.get("state") == "failed" and self._group.world_size > 1:
            return  # the first failure is the cause, the others are its echo
        where = {"rank": self._group.rank, "host": socket.gethostname(), "pid": os.getpid()}
        step = self.step if self._group.is_first else earlier.get("step")
        with contextlib.suppress(OSError):
            run_directory.write_status(self._run, state=state, step=step, **where, **fields)

    def lost(self, line: str) -> None:
        """Another rank is gone; called on whichever rank noticed."""
        earlier = run_directory.read_status(self._run) or {}
        with contextlib.suppress(OSError):
            run_directory.write_status(self._run, **(earlier | {"state": "failed", "code": 69, "reason": line}))

    def saved(self, step: int) -> None:
        """A checkpoint of this step is committed."""
        self.step = step
        if self._group.is_first:
            self.write("running")


def _prepare_and_train(
    config: NeoxConfig,
    group: Group,
    device: torch.device,
    options: Options,
    stop: StopRequest,
    status: _Status,
    watch: Watch,
    uploads: Uploads | None,
) -> dict[str, float]:
    start = _start(config, group)
    if config.train.save is None and group.is_first:
        print(f"neox-train: `save` is not set, the run goes to ./{run_path(config)}", file=sys.stderr, flush=True)
    if not options.quiet and group.is_first:
        print(f"neox-train: {start.note}", file=sys.stderr, flush=True)
    status.step = start.source.step if start.own and start.source else None
    work = prepare(
        config,
        group,
        device,
        start,
        stdout=options.stdout,
        quiet=options.quiet,
        stop=stop,
        saved=status.saved,
        mark=watch.mark,
    )
    work.uploads = uploads
    try:
        figures = loop.train(work)
    finally:
        work.saver.close()
        work.report.close()
        for observer in work.observers:
            observer.close()
    work.engine.close()
    return figures


def _start(config: NeoxConfig, group: Group) -> Start:
    """Rank 0 looks and verifies, all begin with what it found."""

    def look() -> dict[str, Any]:
        found = find_start(config, warn=_warn)
        source = found.source
        return {
            "source": None if source is None else [str(source.path), source.kind, source.step],
            "own": found.own,
            "note": found.note,
            "again": found.again,
        }

    told = group.on_first(look)
    source = told["source"]
    ref = None if source is None else CheckpointRef(Path(source[0]), source[1], source[2])
    return Start(ref, told["own"], told["note"], told["again"])
