# SPDX-License-Identifier: Apache-2.0
"""The engine without partitioning: whole weights, gradients and optimiser states on every rank.

It runs what ZeRO cannot (optimisers that look at the shape of a matrix) and is the reference the other engine is
tested against. Low precision keeps float32 masters, as ZeRO does. Gradients are averaged over data-parallel ranks in
float32; with tensor parallelism weights, gradients and states are those of the rank's pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libneox.errors import UsageError
from libneox.parallel.mesh import Mesh
from libneox.parallel.shard import Pieces, Shard
from neox_train import tiles
from neox_train.objective import LanguageModeling, MicroBatch
from neox_train.optimizers import set_lr, states_of
from neox_train.recorded import Recorded
from neox_train.steps import Outcome

ALONE = Mesh()


class PlainEngine:
    """See `neox_train.steps.Engine`."""

    def __init__(
        self,
        objective: LanguageModeling,
        build_optimizer: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        grad_accum: int,
        clipping: float,
        mesh: Mesh = ALONE,
        recorded: bool = False,
        queues: bool = False,
    ):
        """Take over the model.

        Args:
            recorded: replay micro-batches as CUDA graphs.
            queues: do not wait for the device in `step`, if the optimiser can leave out an update by itself.
        """
        if dtype == torch.float16:
            raise UsageError("precision: fp16 with this optimizer has no loss scaling; set precision to bfloat16")
        self.objective = objective.to(device)
        self.device, self._accumulate, self._clipping, self._mesh = device, grad_accum, clipping, mesh
        self._pieces = Pieces(objective.model.config, Shard.of(mesh))
        self._shapes = objective.model.config.parameter_shapes()
        masters = {name: p.detach().float().clone() for name, p in objective.model.named_parameters()}
        self._same = dtype == torch.float32
        objective.to(dtype)
        self._weights = dict(objective.model.named_parameters())
        self._cut = torch.tensor([hasattr(p, "model_parallel") for p in self._weights.values()], device=device)
        self._masters = self._weights if self._same else {n: nn.Parameter(t.to(device)) for n, t in masters.items()}
        self._optimizer: torch.optim.Optimizer = build_optimizer(self._masters.items())
        self._states = states_of(self._optimizer)
        self.queues = queues and can_skip(self._optimizer)
        self._bad = torch.zeros((), device=device)  # 1.0 after a loss or gradient that was not finite
        self._tiled = tiles.takes(self._optimizer, device) and not self.queues
        self._recorded = Recorded(self._micro_batch, self._weights.values()) if recorded else None

    def train(self, on: bool) -> None:
        """Switch dropout on or off."""
        self.objective.train(on)

    def backward(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Add up the gradients of a step's micro-batches, each divided by their number; returns their mean loss."""
        work = self._recorded or self._micro_batch
        mean = torch.stack([work(batch) for batch in batches]).mean()
        if self.queues:
            self._bad = torch.maximum(self._bad, (~torch.isfinite(mean)).float())
        return mean

    def _micro_batch(self, batch: MicroBatch) -> Tensor:
        loss = self.objective(*batch)
        (loss / self._accumulate).backward()
        return loss.detach()

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Mean loss of micro-batches without gradients."""
        with torch.no_grad():
            return torch.stack([self.objective(*batch) for batch in batches]).mean()

    def step(self, lr: float) -> Outcome:
        """Reduce, clip, update."""
        set_lr(self._optimizer, lr)
        gradients = self._gradients()
        if self._mesh.data_size > 1:
            gradients = {name: gradient.float() for name, gradient in gradients.items()}
            for gradient in gradients.values():
                dist.all_reduce(gradient, group=self._mesh.groups.get("data"))
                gradient /= self._mesh.data_size
        norm = self._norm(gradients)
        bad = ~torch.isfinite(norm)
        if self.queues:
            self._optimizer.found_inf = self._bad = torch.maximum(self._bad, bad.float())
        elif bool(bad):
            self._clear()
            return Outcome(norm, bad)
        # the same coefficient as torch's clip_grad_norm_ and DeepSpeed's
        coefficient = (self._clipping / (norm + 1e-6)).clamp(max=1.0) if self._clipping > 0 else None
        self._update(gradients, coefficient)
        self._clear()
        return Outcome(norm, bad)

    def _update(self, gradients: dict[str, Tensor], coefficient: Tensor | None) -> None:
        if self._tiled:
            leaves = (tiles.Leaf(self._masters[n], self._weights[n], gradient) for n, gradient in gradients.items())
            tiles.update(self._optimizer, leaves, coefficient)
            return
        for name, gradient in gradients.items():
            self._masters[name].grad = gradient.float()
        if coefficient is not None:
            torch._foreach_mul_([master.grad for master in self._masters.values()], coefficient)
        self._optimizer.step()
        if not self._same:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(self._masters[name])

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Global L2 norm, of the whole tensors."""
        if self.device.type == "cpu":
            norms = torch.stack([tiles.norm(gradient) for gradient in gradients.values()])
        else:
            norms = torch.stack(torch._foreach_norm(list(gradients.values()), dtype=torch.float32))
        if self._mesh.tensor_size == 1:
            return torch.linalg.vector_norm(norms)
        pieces = torch.where(self._cut, norms, 0.0).square().sum()
        dist.all_reduce(pieces, group=self._mesh.groups["tensor"])
        return (pieces + torch.where(self._cut, 0.0, norms).square().sum()).sqrt()

    def _gradients(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._weights.items()}

    def _clear(self) -> None:
        if not self._same:
            for master in self._masters.values():
                master.grad = None
        if self._recorded is not None:  # its gradients stay where they are
            torch._foreach_zero_([weight.grad for weight in self._weights.values() if weight.grad is not None])
            return
        for weight in self._weights.values():
            weight.grad = None

    def names(self) -> list[str]:
        """Logical parameters in the model's order."""
        return list(self._weights)

    def local(self) -> Mapping[str, Tensor]:
        """What this rank holds of the parameters."""
        return self._weights

    def weight(self, name: str) -> Tensor:
        """A parameter in the compute dtype."""
        return self._pieces.whole(name, self._weights[name].detach())

    def master(self, name: str) -> Tensor:
        """A parameter in float32."""
        return self._pieces.whole(name, self._masters[name].detach())

    def gradient(self, name: str) -> Tensor:
        """Gradient of a parameter in float32, averaged over ranks."""
        weight = self._weights[name]
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if self._mesh.data_size > 1:
            mine = mine.to(torch.float32, copy=True)
            dist.all_reduce(mine, group=self._mesh.groups.get("data"))
            mine /= self._mesh.data_size
        return self._pieces.whole(name, mine.float())

    def state_specs(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(state, parameter, shape) of every state tensor of the optimiser."""
        for name, parameter in self._masters.items():
            for key, value in self._states.of(parameter).items():
                like = value.shape == parameter.shape
                yield key, name, self._shapes[name] if like else tuple(value.shape)

    def state(self, key: str, name: str) -> Tensor:
        """One of them."""
        return self._pieces.whole(name, self._states.of(self._masters[name])[key])

    def scalars(self) -> dict[str, Any]:
        """What else a checkpoint must hold."""
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        return {"step": int(max(steps))} if steps else {}

    def restore_master(self, name: str, value: Tensor) -> None:
        """Set a parameter, master and working copy."""
        value = self._pieces.mine(name, value)
        with torch.no_grad():
            self._masters[name].copy_(value)
            self._weights[name].copy_(value)

    def restore_state(self, key: str, name: str, value: Tensor) -> None:
        """Set one state tensor."""
        mine = self._pieces.mine(name, value).contiguous()
        self._states.set(self._masters[name], key, mine.to(self.device, copy=True))

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Set what `scalars` gave; after the state tensors."""
        if "step" in scalars:
            self._states.set_step(int(scalars["step"]), self.device)

    def close(self) -> None:
        """Nothing to do."""


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves out its step where its attribute `found_inf`, a float32 scalar, is 1: fused Adam."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(g["fused"] for g in optimizer.param_groups)
