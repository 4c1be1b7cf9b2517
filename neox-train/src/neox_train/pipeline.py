# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's pipeline as the engine: each rank holds some consecutive layers and gives its results to the next.

DeepSpeed's schedule says when a stage receives, computes and sends. A schedule is executed without its last
instructions; the reduction follows, and the update in `step`: between the two the loop looks at the loss. Every stage
reads the step's micro-batches itself, so that only hidden states and their gradients travel; the last one hands its
hidden states to the loss, which owns the head. A parameter that stages share (a tied embedding, the biases of
`pos_emb: rpe`) has a copy on each: gradients are summed over them, and it counts once in the gradient's norm.

Private parts of DeepSpeed 0.19 that are touched, beyond those of `neox_train.engine`, each covered by a test: the
engine's executors of a schedule and of its last instructions, and where it keeps losses and tied weights.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libneox.config.partition import holders
from libneox.parallel.mesh import Mesh
from neox_train.engine import BuildOptimizer, DeepSpeedEngine, import_deepspeed
from neox_train.objective import LanguageModeling, MicroBatch

BuildPart = Callable[[range], LanguageModeling]


class PipelineEngine(DeepSpeedEngine):
    """See `neox_train.steps.Engine`."""

    def __init__(
        self,
        parts: Sequence[range],
        build: BuildPart,
        build_optimizer: BuildOptimizer,
        *,
        settings: dict[str, Any],
        states: Sequence[str],
        device: torch.device,
        mesh: Mesh,
    ):
        """Build this rank's parts and hand them over. Their values do not matter yet: `restore_master` gives them.

        Args:
            parts: pieces of the model that each stage holds (`libneox.config.partition`). Twice as many as there are
                stages mean DualPipeV: stage s holds the parts s from the front and s from the back.
            build: makes the objective over some pieces.
            settings, states: as of DeepSpeedEngine; ZeRO stage 1.
        """
        import_deepspeed(device).init_distributed(dist_init_required=False)  # it takes the process group there is
        self._folded = len(parts) > mesh.pipe_size
        module = _pipeline_module(parts, build, mesh)
        self._layers = [layer for layer in module.modules() if isinstance(layer, PartLayer)]
        parameters = _joined([layer.objective.model for layer in self._layers])
        objective = self._layers[0].objective
        self._holders = {
            name: sorted({min(part, len(parts) - 1 - part) if self._folded else part for part in found})
            for name, found in holders(objective.model.config, parts).items()
        }
        shared = self._share(parameters, mesh)
        module.get_tied_weights_and_groups = lambda: shared  # what DeepSpeed asks for when it sums their gradients
        self._shape: torch.Size | None = None
        super().__init__(
            objective, build_optimizer, settings=settings, states=states, device=device, mesh=mesh, module=module
        )

    def _share(self, parameters: dict[str, nn.Parameter], mesh: Mesh) -> list[tuple[nn.Parameter, Any]]:
        """The parameters that this stage shares with others, and the group of ranks that hold each; a collective."""
        shared = []
        for name, stages in self._holders.items():
            if len(stages) == 1:
                continue
            for line in mesh.members("pipe"):
                group = dist.new_group([line[stage] for stage in stages])
                if mesh.rank in line and mesh.pipe_rank in stages:
                    parameters[name].ds_pipe_replicated = mesh.pipe_rank != stages[0]  # type: ignore[attr-defined]
                    shared.append((parameters[name], group))
        return shared

    def backward(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Add up the gradients of micro-batches, each divided by their number; their mean loss, on every stage."""
        mean = self._run(_without_update(self._engine._train_schedule()), batches)
        self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()
        return mean

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Mean loss of micro-batches without gradients, on every stage."""
        batches = list(batches)
        if self._folded:  # the schedule is for that many; the mean stays
            batches *= -(-2 * self._mesh.pipe_size // len(batches))
        with torch.no_grad():
            return self._run(self._engine._inference_schedule(len(batches)), batches)

    def _run(self, schedule: Any, batches: Iterable[MicroBatch]) -> Tensor:
        engine, feed = self._engine, iter(batches)
        first = next(feed)
        if first.ids.shape != self._shape:  # else what is sent would be read as of the shape before
            engine.reset_activation_shape()
            self._shape = first.ids.shape
        feeds = itertools.tee(itertools.chain([first], feed), len(self._layers))
        for layer, layer_feed in zip(self._layers, feeds, strict=True):
            layer.feed = layer_feed
        nothing = torch.empty(0, device=self.device)
        engine.set_dataiterator(itertools.repeat((nothing, nothing)))  # the layers have a feed of their own
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(schedule)
        assert all(next(layer.feed, None) is None for layer in self._layers), "the schedule left micro-batches over"
        last = 0 if self._folded else self._mesh.pipe_size - 1
        mean = torch.stack(engine.fwd_outputs).mean() if self._mesh.pipe_rank == last else None
        return self._sent(last, lambda: mean, ())

    def _update(self) -> None:
        self._engine._exec_optimizer_step()

    def weight(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""
        take = super().weight
        return self._held(name, lambda: take(name), self._dtype)

    def master(self, name: str) -> Tensor:
        """A parameter in float32."""
        take = super().master
        return self._held(name, lambda: take(name))

    def gradient(self, name: str) -> Tensor:
        """Gradient of a parameter in float32, averaged over micro-batches and ranks."""
        take = super().gradient
        return self._held(name, lambda: take(name))

    def state(self, key: str, name: str) -> Tensor:
        """One state tensor."""
        take = super().state
        return self._held(name, lambda: take(key, name))

    def _held(self, name: str, take: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole tensor of the first stage that holds the parameter."""
        return self._sent(self._holders[name][0], take, self._shapes[name], dtype)

    def _sent(
        self, owner: int, take: Callable[[], Any], shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What stage `owner` has, on every stage; a collective."""
        if self._mesh.pipe_rank == owner:
            value = take().contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(value, group_src=owner, group=self._mesh.groups["pipe"])
        return value

    def restore_master(self, name: str, value: Tensor) -> None:
        """Set a parameter, on the stages that hold it."""
        if name in self._parameters:
            super().restore_master(name, value)

    def restore_state(self, key: str, name: str, value: Tensor) -> None:
        """Set one state tensor, on the stages that hold it."""
        if name in self._parameters:
            super().restore_state(key, name, value)


class PartLayer(nn.Module):
    """What DeepSpeed calls as a layer: the objective over a part of the model.

    Attributes:
        feed: the micro-batches to come; a call takes one.
    """

    def __init__(self, build: BuildPart, pieces: range):
        super().__init__()
        self.objective = build(pieces)
        self.feed: Iterator[MicroBatch] = iter(())

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the stage before gave -> what the next one takes, or the loss."""
        batch, model = next(self.feed), self.objective.model
        out_BTD = model(batch.ids, x_BTD, positions_BT=batch.positions, cu_seqlens_E=batch.cu_seqlens)
        return self.objective.loss(out_BTD, batch) if model.is_last else out_BTD


def _joined(models: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a rank's parts by name; what two parts have becomes one."""
    parameters: dict[str, nn.Parameter] = {}
    for model in models:
        for name, parameter in list(model.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, parameters.setdefault(name, parameter))
    return parameters


def _pipeline_module(parts: Sequence[range], build: BuildPart, mesh: Mesh) -> Any:
    """DeepSpeed's module, of one layer for each part; only this rank's are built."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    kind = PipelineModule if len(parts) == mesh.pipe_size else DualPipeVModule
    topology = PipeModelDataParallelTopology(mesh.pipe_size, mesh.tensor_size, mesh.data_size)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its layers
        return kind(
            [LayerSpec(PartLayer, build, pieces) for pieces in parts], topology=topology, partition_method="uniform"
        )


def _without_update(schedule: Any) -> Any:
    """A schedule of DeepSpeed up to the last backward pass."""
    from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads

    steps = schedule.steps()
    schedule.steps = lambda: (
        [command for command in commands if not isinstance(command, OptimizerStep | ReduceGrads | ReduceTiedGrads)]
        for commands in steps
    )
    return schedule
