# SPDX-License-Identifier: Apache-2.0
"""Read the files `torch.save` writes, executing nothing that stands in them.

Such a file is a zip archive of stored (uncompressed) members: `data.pkl`, a pickle in which tensors are references to
storages, and `data/KEY`, the bytes of each storage. The pickle is read by an unpickler that knows a short list of names
and refuses every other; none of the names is looked up, imported or called: tensors become `LazyTensor`, bookkeeping
objects of DeepSpeed become `Record`. The bytes of a storage are mapped when its tensor is loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import mmap
import pickle
import struct
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libneox.checkpoint.lazy import LazyTensor
from libneox.errors import DataError, InputMissing, UnsafeInput

MAX_PICKLE_BYTES = 256 << 20  # the pickle of a model of thousands of tensors is below 10 MB
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")


class Record:
    """An object of a class we do not load: its arguments and its state, as plain data."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items of a dict subclass; they are of no interest."""

    def append(self, value: Any) -> None:
        """Accept the items of a list subclass."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


class TorchFile:
    """One file of `torch.save`, open for lazy reading.

    Raises:
        InputMissing: no such file.
        DataError: not such a file, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise InputMissing(f"{path}: {error.strerror}") from error
        weakref.finalize(self, self._file.close)  # its tensors hold on to it, and may be loaded at any time
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            self._refuse_foreign(error)
        self._members = {info.filename.partition("/")[2]: info for info in self._zip.infolist()}
        self._map: mmap.mmap | None = None

    def _refuse_foreign(self, error: Exception) -> None:
        """Say what a file that is no zip archive is: a bare pickle is read only to see whether it is hostile."""
        self._file.seek(0)
        if self._file.read(1) == b"\x80":
            self._file.seek(0)
            self._unpickle(io.BytesIO(self._file.read(MAX_PICKLE_BYTES)))
            message = "the file format of torch before 1.6; load it with torch and save it again"
            raise DataError(f"{self.path}: {message}") from error
        raise DataError(f"{self.path}: not a file of torch.save, or truncated ({error})") from error

    def read(self) -> Any:
        """The object in the file, its tensors as LazyTensor.

        Raises:
            UnsafeInput: the pickle refers to a name outside the list of what checkpoints hold.
            DataError: damaged.
        """
        if "data.pkl" not in self._members:
            raise DataError(f"{self.path}: no data.pkl in it; not a file of torch.save")
        if "byteorder" in self._members and self._member("byteorder") != b"little":
            raise DataError(f"{self.path}: written on a big-endian machine; save it again on a little-endian one")
        return self._unpickle(io.BytesIO(self._member("data.pkl")))

    def _member(self, name: str) -> bytes:
        info = self._members[name]
        if info.file_size > MAX_PICKLE_BYTES:
            raise DataError(f"{self.path}: {name} of {info.file_size:,} bytes; that is no checkpoint")
        try:
            return self._zip.read(info)
        except Exception as error:  # zipfile's own and zlib's; encrypted, or of an unknown compression
            raise DataError(f"{self.path}: damaged ({error})") from error

    def _unpickle(self, stream: io.BytesIO) -> Any:
        try:
            return _Unpickler(stream, self).load()
        except (UnsafeInput, DataError):
            raise
        except Exception as error:  # a damaged pickle can fail in any way
            raise DataError(f"{self.path}: damaged pickle ({type(error).__name__}: {error})") from error

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor:
        """A view of a storage: `offset` and `stride` count elements."""
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
            raise DataError(f"{self.path}: damaged pickle (not a tensor)")
        size, stride = tuple(size), tuple(stride)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.numel:
            raise DataError(f"{self.path}: a tensor of shape {size} reaches past its storage data/{storage.key}")
        return LazyTensor(size, storage.dtype, lambda: self._load(storage, offset, size, stride))

    def _load(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        if 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        start = self._start_of(storage)
        if self._map is None:
            # a private mapping: torch wants writable memory; nobody writes to it, so no page is copied
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._map, dtype=storage.dtype, count=storage.numel, offset=start)
        return flat.as_strided(size, stride, offset)

    def _start_of(self, storage: _Storage) -> int:
        info = self._members.get(f"data/{storage.key}")
        if info is None:
            raise DataError(f"{self.path}: storage data/{storage.key} is missing; truncated")
        wanted = storage.numel * storage.dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < wanted:
            raise DataError(f"{self.path}: data/{storage.key} holds {info.file_size:,} bytes, not {wanted:,}")
        self._file.seek(info.header_offset)
        header = self._file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size:
            raise DataError(f"{self.path}: truncated at data/{storage.key}")
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        self._file.seek(0, io.SEEK_END)
        if signature != b"PK\x03\x04" or start + wanted > self._file.tell():
            raise DataError(f"{self.path}: damaged at data/{storage.key}")
        return start


class _Unpickler(pickle.Unpickler):
    """Resolve the names below and no other. Every answer is made anew, so that no file can change the next one's."""

    def __init__(self, stream: io.BytesIO, file: TorchFile):
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return getattr(torch, name)
        if module.startswith(("deepspeed.", "megatron.")) or (module, name) in _RECORDS:
            return type(name, (Record,), {})
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles that Python 2 could read
            return lambda text, encoding="latin1": text.encode("latin-1")
        if (module, name) in _REBUILD:
            return self._rebuild(name)
        raise UnsafeInput(
            f"{self._file.path}: its pickle asks for {module}.{name}, which no checkpoint needs; nothing was executed"
        )

    def _rebuild(self, name: str) -> Callable[..., Any]:
        if name == "_rebuild_parameter":
            return lambda tensor, *rest: tensor
        return lambda storage, offset, size, stride, *rest: self._file.tensor(storage, offset, size, stride)

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _device, numel = reference[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int or numel < 0:
            raise DataError(f"{self._file.path}: damaged pickle (not a storage)")
        return _Storage(str(key), dtype, numel)


_PLAIN: dict[tuple[str, str], Any] = {  # types that cannot be changed from within a pickle
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}
_RECORDS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "device"),
    ("argparse", "Namespace"),
}
_REBUILD = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}
