# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed as the engine. Only this module and `neox_train.pipeline`, which builds on it, import DeepSpeed.

ZeRO 1, 2 and 3. DeepSpeed gets the model, a torch optimiser and numbers; start-up of processes, schedules, data,
checkpoints and the fp32 values everything begins with are ours. Nothing is compiled at run time: torch's optimisers
are used, and the shared-memory operator that DeepSpeed would build on a CPU is switched off.

Private parts of DeepSpeed 0.19 that are touched, each covered by a test: the table of operators, the list of flat
float32 partitions (the optimiser's state is keyed by them), and the linking of that state to parameters.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libneox.errors import NonFiniteLoss, UsageError
from libneox.parallel.mesh import Mesh
from libneox.parallel.shard import Pieces, Shard
from neox_train.mpu import Mpu
from neox_train.objective import LanguageModeling, MicroBatch
from neox_train.optimizers import set_lr
from neox_train.steps import Outcome

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """See `neox_train.steps.Engine`."""

    queues = False  # DeepSpeed looks at the gradient itself

    def __init__(
        self,
        objective: LanguageModeling,
        build_optimizer: BuildOptimizer,
        *,
        settings: dict[str, Any],
        states: Sequence[str],
        device: torch.device,
        mesh: Mesh,
        module: nn.Module | None = None,
    ):
        """Hand the model over. Its values do not matter yet: `restore_master` gives every parameter its own.

        Args:
            objective: over this rank's part of the model.
            settings: DeepSpeed's configuration, ZeRO stage 1 or more.
            states: names of the optimiser's per-parameter tensors.
            module: what DeepSpeed runs, if not the objective itself but something around it.
        Raises:
            UsageError: DeepSpeed does not know, or no longer has, what the settings say.
        """
        deepspeed = import_deepspeed(device)
        self._logs_comms = bool((settings.get("comms_logger") or {}).get("enabled"))
        if self._logs_comms or settings.get("dump_state"):
            _talk()
        self.objective, self.device = objective.to(device), device
        self._stage: int = settings["zero_optimization"]["stage"]
        self._states, self._has_state = tuple(states), False
        objectives = [part for part in (module or objective).modules() if isinstance(part, LanguageModeling)]
        parameters = {name: p for part in objectives for name, p in part.model.named_parameters()}
        self._shapes = objective.model.config.parameter_shapes()
        self._pieces, self._mesh = Pieces(objective.model.config, Shard.of(mesh)), mesh
        if self._stage == 3:  # the loss multiplies with the head outside the head's own forward
            deepspeed.zero.register_external_parameter(objective, objective.model.head_weight)
        self._optimizer = build_optimizer(parameters.items())
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module or objective,
                optimizer=self._optimizer,
                config=_settings(settings),
                dist_init_required=False,
                mpu=Mpu(mesh) if mesh.tensor_size > 1 and module is None else None,
            )
        except (ValueError, deepspeed.DeepSpeedConfigError) as error:
            raise UsageError(f"DeepSpeed does not take its settings: {' '.join(str(error).split())}") from error
        self._parameters = parameters
        self._dtype = next(iter(parameters.values())).dtype

    def train(self, on: bool) -> None:
        """Switch dropout on or off."""
        self._engine.train(on)

    def backward(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Add up the gradients of micro-batches, each divided by their number; returns their mean loss."""
        losses = []
        for batch in batches:
            loss = self._engine(*batch)
            self._engine.backward(loss)
            losses.append(loss.detach())
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # counts the micro-batch
        return torch.stack(losses).mean()

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Mean loss of micro-batches without gradients."""
        with torch.no_grad():
            return torch.stack([self._engine(*batch) for batch in batches]).mean()

    def step(self, lr: float) -> Outcome:
        """Reduce, clip, update."""
        set_lr(self._optimizer, lr)
        try:
            self._update()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise NonFiniteLoss(
                "the gradient is not finite at the smallest loss scale either; lower the learning rate, or set "
                "precision: bfloat16"
            ) from error
        skipped = bool(self._engine.optimizer.overflow)
        norm = self._engine.get_global_grad_norm()
        if not skipped and not self._has_state:
            self._link_state()
        return Outcome(float("nan") if norm is None else float(norm), skipped)

    def _update(self) -> None:
        self._engine.step()

    def names(self) -> list[str]:
        """Logical parameters in the model's order."""
        return list(self._shapes)

    def local(self) -> Mapping[str, Tensor]:
        """What this rank holds of the parameters."""
        return self._parameters

    def weight(self, name: str) -> Tensor:
        """A parameter in the compute dtype: its master rounded, which is what the engine computes with."""
        if self._stage < 3:
            return self._pieces.whole(name, self._parameters[name].detach())
        return self.master(name).to(self._dtype)

    def master(self, name: str) -> Tensor:
        """A parameter in float32."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._pieces.whole(name, safe_get_full_fp32_param(self._parameters[name]))

    def gradient(self, name: str) -> Tensor:
        """Gradient of a parameter in float32, averaged over ranks."""
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(self._parameters[name]).float()
        if self._dtype == torch.float16:
            gradient = gradient / self._engine.optimizer.loss_scale
        return self._pieces.whole(name, gradient)

    def state_specs(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(state, parameter, shape) of every state tensor of the optimiser."""
        if self._has_state:
            for key in self._states:
                for name, shape in self._shapes.items():
                    yield key, name, shape

    def state(self, key: str, name: str) -> Tensor:
        """One of them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return self._pieces.whole(name, safe_get_full_optimizer_state(self._parameters[name], key))

    def scalars(self) -> dict[str, Any]:
        """Adam's step, and the loss scaler of fp16."""
        found: dict[str, Any] = {}
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        if steps:
            found["step"] = int(max(steps))
        scaler = self._scaler
        if scaler is not None:
            found["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER}
        return found

    @property
    def _scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if self._dtype == torch.float16 and getattr(scaler, "dynamic", False) else None

    def restore_master(self, name: str, value: Tensor) -> None:
        """Set a parameter: the float32 partition and the copy that computes."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = self._pieces.mine(name, value).contiguous()
        parameter, value = self._parameters[name], value.to(self.device, torch.float32)
        with torch.no_grad():
            if self._stage < 3:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value)
                return
            part = self._partition(parameter, value)
            safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)
            if parameter.data.numel() == value.numel():  # small ones are kept whole on every rank
                parameter.data.copy_(value.view_as(parameter.data))

    def restore_state(self, key: str, name: str, value: Tensor) -> None:
        """Set one state tensor."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._make_state()
        parameter, value = self._parameters[name], self._pieces.mine(name, value).contiguous().to(self.device)
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_local_optimizer_state(parameter, self._partition(parameter, value), key)

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Set what `scalars` gave; after the state tensors."""
        if "step" in scalars:
            self._make_state()
            for flat in self._flat_partitions():
                self._optimizer.state[flat]["step"] = torch.tensor(float(scalars["step"]), device=flat.device)
        if "loss_scaler" in scalars and self._scaler is not None:
            for name, value in scalars["loss_scaler"].items():
                setattr(self._scaler, name, value)

    def _make_state(self) -> None:
        """Create the optimiser's tensors, which torch makes at the first step, so that they can be filled."""
        if self._has_state:
            return
        for flat in self._flat_partitions():
            for key in self._states:
                self._optimizer.state[flat][key] = torch.zeros_like(flat)
        self._link_state()

    def _link_state(self) -> None:
        """Connect the optimiser's state, now that it exists, with the parameters.

        DeepSpeed does this after the first step of the first group, when the state of the others is not there yet.
        """
        self._has_state = True
        if self._stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[Tensor]:
        zero = self._engine.optimizer
        if self._stage == 3:
            return zero.fp32_partitioned_groups_flat
        if hasattr(zero, "single_partition_of_fp32_groups"):
            return zero.single_partition_of_fp32_groups
        return zero.fp32_groups_flat_partition  # bfloat16 with gradients summed in float32 has an optimiser of its own

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a stage 3 parameter, padded with zeros where the last slice is short."""
        size = parameter.ds_tensor.numel()
        whole = value.reshape(-1)
        start = min(self._mesh.data_rank * size, whole.numel())
        part = whole.new_zeros(size)
        taken = whole[start : start + size]
        part[: taken.numel()] = taken
        return part

    def close(self) -> None:
        """Let go of hooks and buffers."""
        if self._logs_comms:
            from deepspeed import comm

            comm.log_summary()  # nobody else asks for it
        self._engine.destroy()


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What every run needs, under what the user says."""
    fixed: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    defaults: dict[str, Any] = {"steps_per_print": 1_000_000_000}
    if "bf16" in settings:  # a step with a NaN gradient is left out, as in the other precisions
        settings = settings | {"bf16": {"check_grad_overflow": True} | settings["bf16"]}
    return defaults | settings | fixed


def _talk() -> None:
    """Let DeepSpeed print what it was asked for; its own default is to print warnings alone."""
    logger = logging.getLogger("DeepSpeed")
    for part in (logger, *logger.handlers):
        part.setLevel(logging.INFO)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet and without anything to compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said outright, there is nothing to detect and to warn about
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # it insists, and takes it for the number of the device
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # which Open MPI's need not be
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls collectives by names that torch 2.13 deprecates, at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        # asked for at each start of a CPU run; building it takes a compiler and half a minute, gloo does the work
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    return deepspeed
