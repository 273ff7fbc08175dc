"""Muon, the optimiser of the embedded model's hidden matrices, in fp32.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
torch ships one whose orthogonalisation runs in bf16, which is two orders of magnitude
slower than fp32 on common CPUs; this one stays in fp32 and batches matrices of one shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz approximation of the nearest orthogonal matrices; `[n, rows, cols]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if tall else x
    return found


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose step is orthogonalised; for 2D hidden weights only."""

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Parameter, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                by_shape[param.shape].append((param, param.grad.lerp(state["momentum"], group["momentum"])))
            for shape, entries in by_shape.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (param, _), step in zip(
                    entries, orthogonalised(torch.stack([g for _, g in entries])), strict=True
                ):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=scale)
