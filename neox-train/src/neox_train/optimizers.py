# SPDX-License-Identifier: Apache-2.0
"""Which optimiser, with which groups: from the configuration to a torch optimiser over a model's parameters.

Every entry of the table says which tensors make up the optimiser's state, so that a checkpoint can hold them by the
parameter's name, and whether an update looks at the shape of a matrix. ZeRO flattens what it partitions; an optimiser
that looks at shapes is therefore run by the plain engine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from libneox.config import NeoxConfig
from libneox.errors import UsageError
from neox_train.states import States

Groups = list[dict[str, Any]]
Build = Callable[[Groups, dict[str, Any], float], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """An optimiser.

    Attributes:
        build: (groups, optimizer.params, weight_decay) -> optimiser.
        state: names of its per-parameter tensors of the parameter's own shape, float32.
        shaped: it uses the shape of a parameter, so it cannot run on ZeRO's flat partitions.
    """

    build: Build
    state: tuple[str, ...]
    shaped: bool = False


def _adamw(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    adam_w = params.get("adam_w_mode", params.get("adamw_mode", True))
    cls = torch.optim.AdamW if adam_w else torch.optim.Adam
    return cls(groups, weight_decay=decay, fused=params.get("fused", True), **_common(params, "amsgrad"))


def _torch_adam(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, weight_decay=decay, fused=True, **_common(params, "amsgrad"))


def _sgd(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    given = {key: params[key] for key in ("momentum", "dampening", "nesterov") if key in params}
    return torch.optim.SGD(groups, lr=params.get("lr", 1e-3), weight_decay=decay, **given)


def _lion(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    from neox_train.own_optimizers import Lion

    return Lion(groups, lr=params.get("lr", 1e-4), betas=tuple(params.get("betas", (0.9, 0.99))), weight_decay=decay)


def _madgrad(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    from neox_train.own_optimizers import MadGradWd

    given = {key: params[key] for key in ("momentum", "eps") if key in params}
    return MadGradWd(groups, lr=params.get("lr", 1e-2), weight_decay=decay, **given)


def _sm3(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    from neox_train.own_optimizers import SM3

    given = {key: params[key] for key in ("momentum", "beta", "eps") if key in params}
    return SM3(groups, lr=params.get("lr", 0.1), **given)


def _adafactor(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    given = {key: params[key] for key in ("beta2_decay", "d") if key in params}
    if "eps" in params:
        given["eps"] = tuple(params["eps"])
    return torch.optim.Adafactor(groups, lr=params.get("lr", 1e-2), weight_decay=decay, **given)


def _muon(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    from neox_train.muon import build_muon

    return build_muon(groups, params, decay)


def _eight_bit(groups: Groups, params: dict[str, Any], decay: float) -> torch.optim.Optimizer:
    from neox_train.eight_bit import build_eight_bit

    return build_eight_bit(groups, params, decay)


def _common(params: dict[str, Any], *extra: str) -> dict[str, Any]:
    given = {key: params[key] for key in extra if key in params}
    return given | {"lr": params["lr"], "betas": tuple(params["betas"]), "eps": float(params["eps"])}


_ADAM = ("exp_avg", "exp_avg_sq")
KINDS: dict[str, Kind] = {
    "adam": Kind(_adamw, _ADAM),
    "adamw": Kind(_adamw, _ADAM),
    "cpu_adam": Kind(_adamw, _ADAM),
    "cpu_torch_adam": Kind(_torch_adam, _ADAM),
    "sgd": Kind(_sgd, ("momentum_buffer",)),
    "lion": Kind(_lion, ("exp_avg",)),
    "madgrad_wd": Kind(_madgrad, ("grad_sum", "grad_sum_sq", "start")),
    "sm3": Kind(_sm3, ("momentum_buffer",), shaped=True),
    "adafactor": Kind(_adafactor, (), shaped=True),
    "muon": Kind(_muon, (), shaped=True),
}


EIGHT_BIT = Kind(_eight_bit, (), shaped=True)  # its blocks are of a whole tensor


def kind_of(config: NeoxConfig) -> Kind:
    """The optimiser of a configuration (which config loading has checked)."""
    return EIGHT_BIT if config.optim.use_bnb_optimizer else KINDS[config.optimizer_type]


def states_of(optimizer: torch.optim.Optimizer) -> States:
    """The state of an optimiser as checkpoints hold it."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from neox_train.eight_bit import EightBitStates

        return EightBitStates(optimizer)
    return States(optimizer)


def state_names(config: NeoxConfig) -> tuple[str, ...]:
    """Names of the per-parameter state tensors of the configured optimiser."""
    names = kind_of(config).state
    if config.optimizer_type == "sgd" and not config.optimizer_params.get("momentum"):
        return ()
    if config.optimizer_params.get("amsgrad"):
        names = (*names, "max_exp_avg_sq")
    return names


def build_optimizer(
    config: NeoxConfig, named: Iterable[tuple[str, nn.Parameter]], *, mup_width_mult: float = 1.0
) -> torch.optim.Optimizer:
    """The configured optimiser over named parameters, in groups with and without weight decay.

    Raises:
        UsageError: one of its arguments is out of range.
    """
    rates = functools.partial(
        lr_scale,
        width_mult=mup_width_mult,
        sgd=config.optimizer_type == "sgd",
        scalar_norms=config.model.norm == "scalenorm",
    )
    groups = decay_groups(config.optim.weight_decay, named, rates=rates)
    try:
        return kind_of(config).build(groups, config.optimizer_params, config.optim.weight_decay)
    except (TypeError, ValueError) as error:  # torch's own check of the arguments
        raise UsageError(f"optimizer.params: {error}") from error


def decays(name: str) -> bool:
    """Whether a parameter decays: biases and norms do not, embeddings and the head do (as in GPT-NeoX)."""
    return not name.endswith((".bias", "norm.weight"))


def is_hidden_matrix(name: str) -> bool:
    """Whether both dimensions of a parameter grow with the model's width."""
    return name.endswith(("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight"))


def lr_scale(name: str, *, width_mult: float, sgd: bool = False, scalar_norms: bool = False) -> float:
    """What muP multiplies a parameter's learning rate with (arXiv 2203.03466, table 8).

    Optimisers whose update has the size of the rate whatever the gradient's (Adam, Lion, SM3) take the matrices between
    hidden layers slower, by the width multiplier. Gradients of SGD shrink by themselves there; instead everything that
    grows with the width in one dimension alone learns faster. A weight of fixed size stays as it is either way.
    """
    if is_hidden_matrix(name):
        return 1.0 if sgd else 1.0 / width_mult
    fixed = name.endswith((".q_norm.weight", ".k_norm.weight")) or (scalar_norms and name.endswith("norm.weight"))
    return width_mult if sgd and not fixed else 1.0


def decay_groups(
    weight_decay: float, named: Iterable[tuple[str, nn.Parameter]], *, rates: Callable[[str], float] = lambda name: 1.0
) -> Groups:
    """Parameter groups; each carries `lr_scale`, what the schedule's rate is multiplied with: `rates` of the name.

    One group if nothing distinguishes the parameters. Decay does not follow `lr_scale`: its product with the rate, the
    share of a weight that is lost in a step, is the same for all (and so at every width with muP).
    """
    found: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        found.setdefault((weight_decay == 0 or decays(name), rates(name)), []).append((name, parameter))
    groups: Groups = []
    for (decay, scale), pairs in sorted(found.items(), key=lambda item: (not item[0][0], -item[0][1])):
        group: dict[str, Any] = {"params": [parameter for _, parameter in pairs], "lr_scale": scale}
        group["names"] = [name for name, _ in pairs]
        if not decay:
            group["weight_decay"] = 0.0
        elif scale != 1.0:
            group["weight_decay"] = weight_decay / scale
        groups.append(group)
    return groups


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
