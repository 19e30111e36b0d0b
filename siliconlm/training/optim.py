"""Muon and AdamW, their parameter groups, and their state by parameter name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from siliconlm.config import OptimConfig

Group = dict[str, Any]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients, Jordan et al. 2024


def orthogonalise(matrices_NRC: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push the singular values of a batch of matrices [N, R, C] towards 1 by a Newton-Schulz iteration.

    They end between about 0.7 and 1.2, which is as good as 1 for Muon (Jordan et al. 2024).
    """
    x = matrices_NRC.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Optimiser(ABC):
    """Parameter groups, and state by parameter. In a group, `lr` is the rate now and `peak_lr` what a schedule scales.

    Not a torch.optim.Optimizer: making or stepping one imports torch's compiler, which takes more than a second.
    """

    def __init__(self, groups: Iterable[Group], lr: float) -> None:
        self.param_groups: list[Group] = [{"lr": lr, "peak_lr": lr, **group} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    @abstractmethod
    def step(self) -> None:
        """Move the parameters by their gradients."""


class AdamW(Optimiser):
    """AdamW (Loshchilov & Hutter 2019) by torch's kernels. Groups hold `params` and `weight_decay`.

    Parameters without a gradient stay as they are. `fused` is one kernel for all tensors; otherwise plain operators
    work on one tensor after the other.
    """

    def __init__(
        self, groups: Iterable[Group], lr: float, beta1: float, beta2: float, eps: float, fused: bool = True
    ) -> None:
        super().__init__(groups, lr)
        self.beta1, self.beta2, self.eps, self.fused = beta1, beta2, eps, fused
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            # A fused kernel counts steps beside the weights; the plain operators read the count on the host.
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device if fused else None),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.state[weight] for weight in weights]
            adamw(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=False,
                fused=self.fused,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )


class Muon(Optimiser):
    """Momentum orthogonalised by Newton-Schulz, for the matrices inside the blocks (Jordan et al. 2024).

    The update is torch.optim.Muon's (Nesterov momentum, learning rate times sqrt(max(1, rows/columns)), decoupled
    weight decay). It differs in two ways that pay on small models: matrices of one shape are orthogonalised as one
    batch, and the precision is the device's choice (bfloat16 made a step 20 times slower on a CPU without bfloat16
    units).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__([{"params": list(params), "momentum": momentum, "weight_decay": weight_decay}], lr)
        self.dtype = dtype
        self.stacks: list[tuple[Group, list[nn.Parameter], Tensor]] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                momentum_NRC = torch.zeros(len(weights), *weights[0].shape, device=weights[0].device)
                for weight, buffer in zip(weights, momentum_NRC.unbind(), strict=True):
                    self.state[weight]["momentum_buffer"] = buffer  # a view: saved and loaded by parameter name
                self.stacks.append((group, weights, momentum_NRC))

    @torch.no_grad()
    def step(self) -> None:
        for group, weights, momentum_NRC in self.stacks:
            gradients_NRC = torch.stack([weight.grad for weight in weights])  # type: ignore[misc]
            momentum_NRC.lerp_(gradients_NRC, 1 - group["momentum"])
            update_NRC = orthogonalise(gradients_NRC.lerp_(momentum_NRC, group["momentum"]), dtype=self.dtype)
            rows, columns = weights[0].shape
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for weight, update in zip(weights, update_NRC.to(weights[0].dtype).unbind(), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def build(model: nn.Module, optim: OptimConfig, muon_dtype: torch.dtype, fused: bool = True) -> list[Optimiser]:
    """Optimisers over all trained parameters, their state made.

    Matrices inside blocks go to Muon; embeddings, output head, norms and biases to AdamW. Only matrices decay.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    inner = [weight for name, weight in trained.items() if optim.name == "muon" and is_block_matrix(name, weight)]
    taken = {id(weight) for weight in inner}
    others = [weight for weight in trained.values() if id(weight) not in taken]
    groups = [
        {"params": [weight for weight in others if weight.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [weight for weight in others if weight.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimisers: list[Optimiser] = [AdamW(groups, optim.lr, optim.beta1, optim.beta2, optim.eps, fused)]
    if inner:
        optimisers.append(Muon(inner, optim.matrix_lr, optim.momentum, optim.weight_decay, muon_dtype))
    return optimisers


def is_block_matrix(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and ".layers." in name


def set_lr(optimisers: list[Optimiser], scale: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * scale


def state_tensors(model: nn.Module, optimisers: list[Optimiser]) -> dict[str, Tensor]:
    """Optimiser state by parameter name: {"model.norm.weight/exp_avg": ...}."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        f"{names[id(weight)]}/{key}": value
        for optimiser in optimisers
        for weight, state in optimiser.state.items()
        for key, value in state.items()
    }


@torch.no_grad()
def load_state_tensors(model: nn.Module, optimisers: list[Optimiser], tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. Raises KeyError when a parameter's state is missing."""
    for name, value in state_tensors(model, optimisers).items():
        value.copy_(tensors[name])
