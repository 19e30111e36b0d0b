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

Quintic = tuple[float, float, float]
"""a, b, c of a x + b x^3 + c x^5."""

# Each is the nearest to 1, at worst, on the interval that those before it leave of [0.01, 1]: the method of the Polar
# Express (Amsel et al. 2025, arXiv 2505.16932). Three come as near as five times Jordan's fixed one (2024).
POLAR: tuple[Quintic, ...] = (
    (8.0941, -23.6229, 17.4479),
    (3.6378, -2.7228, 0.5367),
    (2.6630, -1.9786, 0.4528),
)
WIDE = 1.5  # columns to rows: from here on the small products cost less
STACKED = 1 << 22  # numbers in matrices that are orthogonalised as one batch: more would take memory and gain nothing
TINY = 1e-10  # under a mean square, so that no gradient gives no update


def orthogonalise(
    matrices_NRC: Tensor, quintics: tuple[Quintic, ...] = POLAR, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Push the singular values of a batch of matrices [N, R, C] towards 1 by odd polynomials of the matrices.

    Those above a hundredth of the matrix's norm end between 0.73 and 1.27, which is as good as 1 for Muon. An odd
    polynomial p of x is q(x x') x: where x is wide, q is put together from the small x x' and meets x once. In
    half precision x x' has too few digits for that.
    """
    x = matrices_NRC.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if dtype.itemsize < 4 or x.size(-1) < WIDE * x.size(-2):
        for quintic in quintics:
            x = _factor(x @ x.mT, quintic) @ x
        return x.mT if tall else x
    gram = x @ x.mT
    whole = _factor(gram, quintics[0])
    last = whole
    for quintic in quintics[1:]:
        gram = last @ gram @ last  # all of them are polynomials of the first, so their order does not matter
        last = _factor(gram, quintic)
        whole = last @ whole
    x = whole @ x
    return x.mT if tall else x


def _factor(gram_NRR: Tensor, quintic: Quintic) -> Tensor:
    """a + b g + c g^2 [N, R, R]: what the quintic multiplies x by."""
    a, b, c = quintic
    factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
    factor_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor_NRR


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
    work on one tensor after the other. `state_dtype` is what the moments of matrices are kept in between steps.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        fused: bool = True,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, lr)
        self.beta1, self.beta2, self.eps, self.fused = beta1, beta2, eps, fused
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            dtype = state_dtype if weight.dim() >= 2 else weight.dtype
            # A fused kernel counts steps beside the weights; the plain operators read the count on the host.
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device if fused else None),
                "exp_avg": torch.zeros_like(weight, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(weight, dtype=dtype),
            }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            narrow = [weight for weight in weights if self.state[weight]["exp_avg"].dtype != weight.dtype]
            kept = {id(weight) for weight in narrow}
            exact = [weight for weight in weights if id(weight) not in kept]
            # Narrow moments one at a time, so that only one weight has them in full.
            for batch in filter(None, [exact, *([weight] for weight in narrow)]):
                self._move(batch, group)

    def _move(self, weights: list[Any], group: Group) -> None:
        states = [self.state[weight] for weight in weights]
        means, squares = (
            [state[key].to(weight.dtype) for weight, state in zip(weights, states, strict=True)]
            for key in ("exp_avg", "exp_avg_sq")
        )
        adamw(
            weights,
            [weight.grad for weight in weights],
            means,
            squares,
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
        for state, mean, square in zip(states, means, squares, strict=True):
            if state["exp_avg"].dtype != mean.dtype:
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)


class Muon(Optimiser):
    """Momentum orthogonalised, for the matrices inside the blocks (Jordan et al. 2024).

    The update is torch.optim.Muon's (Nesterov momentum, learning rate times sqrt(max(1, rows/columns)), decoupled
    weight decay) but for three things: matrices of one shape are orthogonalised in batches; the precision is the
    device's choice (bfloat16 made a step 20 times slower on a CPU without bfloat16 units); and with `beta2` the rows
    of an update (its columns, where it is wide) are brought to like sizes by a moving average of their mean squares,
    the norm of the whole staying what it was (NorMuon, Li et al. 2025, arXiv 2510.05491). `state_dtype` is what the
    momentum is kept in between steps.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.0,
        dtype: torch.dtype = torch.float32,
        quintics: tuple[Quintic, ...] = POLAR,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__([{"params": list(params), "momentum": momentum, "weight_decay": weight_decay}], lr)
        self.beta2, self.dtype, self.quintics = beta2, dtype, quintics
        self.stacks: list[tuple[Group, list[nn.Parameter], Tensor, Tensor]] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for weights in (batch for alike in by_shape.values() for batch in _batches(alike)):
                first, (rows, columns) = weights[0], weights[0].shape
                momentum_NRC = torch.zeros(len(weights), rows, columns, device=first.device, dtype=state_dtype)
                lines = (rows, 1) if rows >= columns else (1, columns)
                squares_N11 = torch.zeros(len(weights), *lines, device=first.device)
                # Views: saved and loaded by parameter name.
                for weight, momentum_RC, squares in zip(weights, momentum_NRC, squares_N11, strict=True):
                    self.state[weight]["momentum_buffer"] = momentum_RC
                    if beta2:
                        self.state[weight]["mean_squares"] = squares
                self.stacks.append((group, weights, momentum_NRC, squares_N11))

    @torch.no_grad()
    def step(self) -> None:
        for group, weights, kept_NRC, squares_N11 in self.stacks:
            gradients_NRC = torch.stack([weight.grad for weight in weights])  # type: ignore[misc]
            momentum_NRC = kept_NRC.to(gradients_NRC.dtype).lerp_(gradients_NRC, 1 - group["momentum"])
            if momentum_NRC is not kept_NRC:
                kept_NRC.copy_(momentum_NRC)
            direction_NRC = gradients_NRC.lerp_(momentum_NRC, group["momentum"])
            update_NRC = orthogonalise(direction_NRC, self.quintics, self.dtype).to(weights[0].dtype)
            if self.beta2:
                update_NRC = self._evened(update_NRC, squares_N11)
            rows, columns = weights[0].shape
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for weight, update_RC in zip(weights, update_NRC, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update_RC, alpha=-rate)

    def _evened(self, update_NRC: Tensor, squares_N11: Tensor) -> Tensor:
        """The update with its rows (or columns) of like sizes; all norms come from the one look at its squares."""
        averaged = -1 if squares_N11.size(-1) == 1 else -2
        squares_now = update_NRC.square().mean(averaged, keepdim=True)
        squares_N11.lerp_(squares_now, 1 - self.beta2)
        factors = squares_N11.clamp(min=TINY).rsqrt()
        before, after = (part.sum((-2, -1), keepdim=True) for part in (squares_now, squares_now * factors.square()))
        return update_NRC * (factors * (before / after.clamp(min=TINY)).sqrt())


def _batches(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Weights of one shape, in as few lists as STACKED allows."""
    size = max(1, STACKED // weights[0].numel())
    return [weights[start : start + size] for start in range(0, len(weights), size)]


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
    kept = {"state_dtype": getattr(torch, optim.state_dtype)}
    optimisers: list[Optimiser] = [AdamW(groups, optim.lr, optim.beta1, optim.beta2, optim.eps, fused, **kept)]
    if inner:
        rule = (optim.matrix_lr, optim.momentum, optim.weight_decay, optim.matrix_beta2)
        optimisers.append(Muon(inner, *rule, muon_dtype, **kept))
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
