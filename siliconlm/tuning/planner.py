"""Which model to train in a given time: a ladder of shapes and the loss that each would reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from siliconlm.config import Layer

SMALLEST_STEP = 2048  # tokens of an optimiser step
STEP_GROWS_FROM = 2e6  # tokens of a run


@dataclass(frozen=True, slots=True)
class Rung:
    """One shape of the ladder. Presets stand on it too."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.n_embd}"

    def layer(self, tokens_per_step: int) -> Layer:
        """The rung's settings, to be laid over the defaults."""
        shape = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_ff", "context")
        values = {f"model.{name}": getattr(self, name) for name in shape}
        return Layer(f"plan {self.name}", values | {"train.tokens_per_step": tokens_per_step})


# Each about twice as many parameters as the one before. Heads are 64 wide where the width allows it: Apple's fused
# kernels know that size.
LADDER = (
    Rung(2, 32, 1, 1, 32, 128, 128),
    Rung(2, 64, 1, 1, 64, 256, 128),
    Rung(4, 64, 1, 1, 64, 256, 128),
    Rung(4, 96, 3, 1, 32, 384, 128),
    Rung(4, 128, 2, 1, 64, 512, 128),
    Rung(4, 192, 3, 1, 64, 768, 128),
    Rung(5, 256, 4, 2, 64, 768, 256),
    Rung(6, 384, 6, 3, 64, 1024, 256),
    Rung(8, 448, 7, 1, 64, 1216, 512),
    Rung(12, 512, 8, 4, 64, 1536, 512),
    Rung(14, 640, 10, 5, 64, 1728, 1024),
    Rung(16, 768, 12, 4, 64, 2048, 1024),
)


def step_tokens(rung: Rung, tokens: float) -> int:
    """Tokens of an optimiser step for a run of so many tokens: a power of two that grows with their square root.

    The batch that wastes nothing grows as the loss falls (McCandlish et al. 2018), about as the root of the tokens.
    """
    wanted = SMALLEST_STEP * math.sqrt(max(1.0, tokens / STEP_GROWS_FROM))
    return max(rung.context, 2 ** int(math.log2(wanted)))
