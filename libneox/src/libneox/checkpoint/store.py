# SPDX-License-Identifier: Apache-2.0
"""Tensors of a step directory: whole, by logical name, in safetensors files, read and written one at a time.

Tensors are logical: unsharded, whatever the layout of the run that wrote them. Two groups of files:

    model-00001-of-00002.safetensors       every parameter by its name, in the compute dtype
    optimizer-00001-of-00002.safetensors   `master/NAME` (float32) and the optimizer's own state, `exp_avg/NAME`, ...

Files are written here rather than with `safetensors.torch.save_file` because that wants all tensors of a file in
memory at once, creates files that only their owner can read, and hashes nothing. Reading is the library's.
Byte layout: u64 little-endian header length, JSON header padded with spaces to 8 bytes, tensors back to back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from libneox import run_directory
from libneox.checkpoint.lazy import LazyTensor
from libneox.errors import DataError, InputMissing
from libneox.run_directory import FileRecord, Manifest

SHARD_BYTES = 5_000_000_000
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written: everything the header needs before any value is at hand."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of a group and the rank that writes it."""

    name: str
    owner: int
    specs: tuple[TensorSpec, ...]


def plan_files(
    stem: str, specs: Sequence[TensorSpec], *, writers: int = 1, shard_bytes: int = SHARD_BYTES
) -> list[PlannedFile]:
    """Cut a group into files of at most `shard_bytes`, and into at least one for each writer that has work.

    Contiguous and the same on every rank. A tensor larger than `shard_bytes` has a file of its own.
    """
    total = sum(spec.nbytes for spec in specs)
    limit = max(1, min(shard_bytes, math.ceil(total / writers)))
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    count = len(groups)
    return [
        PlannedFile(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors", i * writers // count, tuple(group))
        for i, group in enumerate(groups)
    ]


def write_planned(
    directory: Path, files: Sequence[PlannedFile], load: Callable[[str], torch.Tensor | None], *, rank: int = 0
) -> dict[str, FileRecord]:
    """Write the files of this rank; records of them by name, for the manifest.

    Args:
        load: gives the tensor of a name. Called for every tensor of every file in the same order on each rank, so it
            may be a collective; what it gives to a rank that does not own the file is dropped (it may be None).
    """
    records = {}
    for file in files:
        if file.owner != rank:
            for spec in file.specs:
                load(spec.name)
            continue
        with TensorWriter(directory / file.name, file.specs) as writer:
            for spec in file.specs:
                tensor = load(spec.name)
                assert tensor is not None, spec.name
                writer.append(spec.name, tensor)
        records[file.name] = writer.record
    return records


class TensorWriter:
    """Write one safetensors file, tensor by tensor in the order of `specs`, hashing on the way.

    The file's mode is 0666 less the umask, as for any file a user makes. After the `with`, the file is synced and
    `record` holds its length and sha256.
    """

    record: FileRecord

    def __init__(self, path: Path, specs: Sequence[TensorSpec]):
        self._path = path
        self._left = list(reversed(specs))
        header: dict[str, Any] = {}
        offset = 0
        for spec in specs:
            end = offset + spec.nbytes
            header[spec.name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._hash = hashlib.sha256()
        self._hasher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._write(struct.pack("<Q", len(text)) + text)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; `name` must be the next of the specs, and dtype and shape must be its own."""
        spec = self._left.pop()
        if (spec.name, spec.dtype, spec.shape) != (name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{self._path}: expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        values = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._write(memoryview(values.view(torch.uint8).numpy()))

    def _write(self, data: bytes | memoryview) -> None:
        hashed = self._hasher.submit(self._hash.update, data)  # gives up the interpreter lock: both go on at once
        try:
            self._file.write(data)
        finally:
            hashed.result()  # the bytes may be the caller's

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._hasher, self._file as file:
            if kind is not None:
                return
            if self._left:
                raise ValueError(f"{self._path}: {len(self._left)} tensors were not written")
            file.flush()
            os.fsync(file.fileno())
            self.record = FileRecord(file.tell(), self._hash.hexdigest())


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a set of safetensors files by name; each is read when asked for.

    `tensors[name]` is a CPU tensor in the stored dtype. `spec(name)` gives dtype and shape without reading values.
    """

    def __init__(self, files: Sequence[Path]):
        """Open the headers.

        Raises:
            InputMissing: a file is not there.
            DataError: a file is no safetensors file, or two files hold the same name.
        """
        from safetensors import SafetensorError, safe_open

        self._stack = contextlib.ExitStack()
        self._where: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in files:
            if not path.is_file():
                raise InputMissing(f"{path}: no such file")
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path}: not a readable safetensors file ({error})") from error
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in self._where:
                    raise DataError(f"{path}: holds {name} again, which is in {self._paths[name].name} too")
                self._where[name] = handle
                self._paths[name] = path

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            return self._where[name].get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{self._paths[name]}: {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header alone.

        Raises:
            DataError: a dtype that no model of ours has, such as F8_E4M3 of a quantised one.
        """
        view = self._where[name].get_slice(name)
        code = view.get_dtype()
        dtype = next((dtype for dtype, known in DTYPES.items() if known == code), None)
        if dtype is None:
            raise DataError(f"{self._paths[name]}: {name} is stored as {code}, which is not supported")
        return TensorSpec(name, dtype, tuple(view.get_shape()))

    def lazy(self) -> dict[str, LazyTensor]:
        """All of them described, to be read one at a time."""

        def described(name: str) -> LazyTensor:
            spec = self.spec(name)
            return LazyTensor(spec.shape, spec.dtype, lambda: self[name])

        return {name: described(name) for name in self}

    def close(self) -> None:
        """Close the files; tensors already read stay good."""
        self._stack.close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(step_dir: str | os.PathLike[str], group: str = "model") -> Tensors:
    """The tensors of a step's group (`model`, `optimizer`), which the manifest lists.

    Hashes are not compared here: `run_directory.resolve_checkpoint` and `verify_step` do that.
    """
    step_dir = Path(step_dir)
    names = sorted(n for n in Manifest.read(step_dir).files if n.startswith(group + "-") and n.endswith(".safetensors"))
    return Tensors([step_dir / name for name in names])


def read_trainer(step_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """trainer.json of a step: the trainer's counters, order epochs and RNG states; None for an imported model."""
    path = Path(step_dir) / run_directory.TRAINER
    return json.loads(path.read_text()) if path.exists() else None


def write_checkpoint(
    step_dir: str | os.PathLike[str],
    model_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    config_yaml: str,
    specs: Sequence[TensorSpec] | None = None,
    tokenizer: bytes | None = None,
    tokenizer_kind: str = "tokenizer.json",
    trainer: Mapping[str, Any] | None = None,
    optimizer_tensors: Mapping[str, torch.Tensor] | None = None,
    optimizer_specs: Sequence[TensorSpec] | None = None,
    step: int = 0,
    samples: int = 0,
    tokens: int = 0,
    world: Mapping[str, int] | None = None,
    config_sha256: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Write a whole checkpoint from one process through the commit protocol, and return its path.

    To write a model that is in memory:

        write_checkpoint(run / "step_0", model.state_dict(), config_yaml=cfg.to_yaml(), tokenizer=tokenizer.data)

    Args:
        step_dir: RUN/step_N (then RUN/latest follows), or a path of any other name.
        model_tensors: every logical parameter by name. With `specs`, a lazy mapping is streamed: one tensor is in
            memory at a time. Without, values are asked for twice (once for dtype and shape).
        optimizer_tensors: `master/NAME`, `exp_avg/NAME`, ... likewise.
    Raises:
        OutputExists: `step_dir` is there and `force` is off.
    """
    target = Path(step_dir)
    groups = [("model", model_tensors if isinstance(model_tensors, Mapping) else dict(model_tensors), specs)]
    if optimizer_tensors is not None:
        groups.append(("optimizer", optimizer_tensors, optimizer_specs))
    temporary = run_directory.begin_step(target, force=force)
    try:
        records = dict(small_files(temporary, config_yaml, tokenizer, trainer, kind=tokenizer_kind))
        for stem, tensors, known in groups:
            group_specs = known or [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
            plan = plan_files(stem, group_specs, shard_bytes=shard_bytes)
            records |= write_planned(temporary, plan, tensors.__getitem__)
        manifest = Manifest(
            step=step,
            samples=samples,
            tokens=tokens,
            world=dict(world or {}),
            config_sha256=config_sha256,
            tokenizer=describe_tokenizer(tokenizer, tokenizer_kind),
            files=records,
        )
        return run_directory.commit_step(temporary, target, manifest)
    except BaseException:
        run_directory.abort_step(temporary)
        raise


def small_files(
    temporary: Path,
    config_yaml: str,
    tokenizer: bytes | None,
    trainer: Mapping[str, Any] | None,
    *,
    kind: str = "tokenizer.json",
) -> Iterator[tuple[str, FileRecord]]:
    """Write config.yml, the tokenizer and trainer.json into an unfinished step; yields their records."""
    yield run_directory.add_file(temporary, run_directory.CONFIG, config_yaml.encode())
    if tokenizer is not None:
        yield run_directory.add_file(temporary, run_directory.tokenizer_file(kind), tokenizer)
    if trainer is not None:
        yield run_directory.add_file(temporary, run_directory.TRAINER, json.dumps(trainer, indent=1).encode())


def describe_tokenizer(data: bytes | None, kind: str) -> dict[str, str] | None:
    """What the manifest says about the tokenizer: its kind and the sha256 of its file."""
    return None if data is None else {"kind": kind, "sha256": hashlib.sha256(data).hexdigest()}
