# SPDX-License-Identifier: Apache-2.0
"""A mesh under the names by which DeepSpeed asks for it (Megatron-LM's `mpu`)."""

from __future__ import annotations

from typing import Any

from libneox.parallel.mesh import Mesh


class Mpu:
    """Data- and tensor-parallel groups of a run without a pipeline; DeepSpeed sums norms over both."""

    def __init__(self, mesh: Mesh):
        """`mesh` is connected and has one stage."""
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        """Ranks that hold one model together."""
        return self._mesh.groups["tensor"]

    def get_model_parallel_rank(self) -> int:
        """Place in it."""
        return self._mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of it."""
        return self._mesh.tensor_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        """Ranks that hold the same shards and see other samples."""
        return self._mesh.groups["data"]

    def get_data_parallel_rank(self) -> int:
        """Place in it."""
        return self._mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of it."""
        return self._mesh.data_size
