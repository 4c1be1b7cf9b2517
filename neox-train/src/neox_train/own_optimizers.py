# SPDX-License-Identifier: Apache-2.0
"""Optimisers that GPT-NeoX offers and torch does not have: Lion, SM3, MADGRAD with decoupled decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """p -= lr * (sign(b1 m + (1 - b1) g) + wd p); m = b2 m + (1 - b2) g  (Chen et al. 2023, arXiv 2302.06675)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, ...] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = _slot(self.state[p], "exp_avg", p)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.lerp(p.grad, momentum, beta1).sign_(), alpha=-lr)
                momentum.lerp_(p.grad, 1 - beta2)


class MadGradWd(torch.optim.Optimizer):
    """MADGRAD with decoupled weight decay (Defazio and Jelassi 2021, arXiv 2101.11075).

    With lambda_k = (lr + eps) sqrt(k + 1): s += lambda g, v += lambda g^2, z = x0 - s / (v^(1/3) + eps),
    x = (1 - c) x + c z, c = 1 - momentum. The decay shrinks x before that.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, eps, keep = group["lr"] + group["eps"], group["eps"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "start" not in state:
                    state["start"] = p.detach().clone(memory_format=torch.preserve_format)
                state["step"] = state.get("step", torch.tensor(0.0)) + 1  # a tensor, as in torch's own optimisers
                weight = lr * float(state["step"]) ** 0.5
                total, squares = _slot(state, "grad_sum", p), _slot(state, "grad_sum_sq", p)
                total.add_(p.grad, alpha=weight)
                squares.addcmul_(p.grad, p.grad, value=weight)
                p.mul_(1 - lr * group["weight_decay"])
                target = state["start"].addcdiv(total, squares.pow(1 / 3).add_(eps), value=-1)
                p.mul_(keep).add_(target, alpha=1 - keep)


class SM3(torch.optim.Optimizer):
    """SM3-II: one accumulator per index of every dimension (Anil et al. 2019, arXiv 1901.11150).

    GPT-NeoX gives it no weight decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, momentum: float = 0.0, beta: float = 0.0, eps: float = 1e-30
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta, momentum = group["beta"], group["momentum"]
        for dim in range(p.dim()):
            if f"accumulator_{dim}" not in state:
                shape = [size if d == dim else 1 for d, size in enumerate(p.shape)]
                state[f"accumulator_{dim}"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
        accumulators = [state[f"accumulator_{dim}"] for dim in range(p.dim())]
        nu = accumulators[0]
        for other in accumulators[1:]:
            nu = torch.minimum(nu, other)
        nu = nu * beta + grad * grad * (1 - beta) if beta > 0 else nu + grad * grad
        update = grad * (nu + group["eps"]).rsqrt()
        for dim, accumulator in enumerate(accumulators):
            largest = nu.amax([d for d in range(p.dim()) if d != dim], keepdim=True) if p.dim() > 1 else nu
            accumulator.copy_(torch.maximum(accumulator, largest) if beta > 0 else largest)
        if momentum > 0:
            buffer = _slot(state, "momentum_buffer", p)
            update = buffer.mul_(momentum).add_(update, alpha=1 - momentum)
        p.add_(update, alpha=-group["lr"])


def _slot(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state[name]
