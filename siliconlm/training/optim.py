"""Muon and AdamW, their parameter groups, and their state by parameter name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from siliconlm.config import OptimConfig

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


class Muon(torch.optim.Optimizer):
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
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.stacks: list[tuple[dict[str, float], list[nn.Parameter], Tensor]] = []
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
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group, weights, momentum_NRC in self.stacks:
            gradients_NRC = torch.stack([weight.grad for weight in weights])  # type: ignore[misc]
            momentum_NRC.lerp_(gradients_NRC, 1 - group["momentum"])
            update_NRC = orthogonalise(gradients_NRC.lerp_(momentum_NRC, group["momentum"]), dtype=self.dtype)
            rows, columns = weights[0].shape
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for weight, update in zip(weights, update_NRC.to(weights[0].dtype).unbind(), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def build(model: nn.Module, optim: OptimConfig, muon_dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Optimisers over all trained parameters. Each group carries its `peak_lr`, which the schedule scales.

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
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,  # not the default on Apple GPUs, and many times faster there (pytorch#127242)
        )
    ]
    if inner:
        optimisers.append(Muon(inner, optim.matrix_lr, optim.momentum, optim.weight_decay, muon_dtype))
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["peak_lr"] = group["lr"]
    return optimisers


def is_block_matrix(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and ".layers." in name


def set_lr(optimisers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * scale


def state_tensors(model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimiser state by parameter name: {"model.norm.weight/exp_avg": ...}."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        f"{names[id(weight)]}/{key}": value
        for optimiser in optimisers
        for weight, state in optimiser.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def load_state_tensors(model: nn.Module, optimisers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. Raises KeyError when a parameter's state is missing."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    for optimiser in optimisers:
        for weight in (weight for group in optimiser.param_groups for weight in group["params"]):
            state = optimiser.state[weight]
            if isinstance(optimiser, Muon):
                state["momentum_buffer"].copy_(tensors[f"{names[id(weight)]}/momentum_buffer"])
                continue
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors[f"{names[id(weight)]}/{key}"]
                # A fused AdamW keeps its step counter beside the weights, a 0-dim float32.
                state[key] = saved.clone().to(weight.device)
