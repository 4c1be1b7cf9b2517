# SPDX-License-Identifier: Apache-2.0
"""Whether work can be queued on a device without the host having a part in it, found out without a device.

The work is done on torch's `meta` device, whose tensors have no memory: to read a number of one is an error, as a GPU
would have to be waited for. `no_host` looks for the rest, copies to the device from memory of the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _NoTensor(TorchDispatchMode):
    """Fails where a tensor of the host is made or used."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, result = (args, kwargs or {}), func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((given, result)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), f"{func} takes or gives host memory"
        return result


class _NoList(TorchFunctionMode):
    """Fails where a tensor is made of Python's numbers, which no operator shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor), "a tensor is made of host memory"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host() -> Iterator[None]:
    """Fail where the host has a part in the work of the meta device."""
    with _NoTensor(), _NoList():
        yield
