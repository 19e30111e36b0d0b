"""The learning rate and the budget: pure functions of the share of the budget that is used."""

from __future__ import annotations

from dataclasses import dataclass

from siliconlm.config import TrainConfig
from siliconlm.errors import SiliconError


def lr_scale(train: TrainConfig, done: float) -> float:
    """The learning rate as a share of its peak, `done` in [0, 1] being the share of the budget used.

    wsd: warm up, hold, decay linearly (Hu et al. 2024, MiniCPM; Hägele et al. 2024). cosine: Loshchilov & Hutter 2017.
    """
    import math

    if done < train.warmup:
        return done / train.warmup
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "cosine":
        after = (done - train.warmup) / max(1e-9, 1 - train.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
    else:
        share = min(1.0, max(0.0, 1 - done) / train.decay) if train.decay else 1.0
    return train.final_lr + (1 - train.final_lr) * share


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train. Steps or seconds; tokens become whole steps.

    Of a time budget, `reserve` seconds are kept for the final evaluation and save, so that those end by the deadline.
    """

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, train: TrainConfig) -> Budget:
        if train.time is not None:
            return cls(None, train.time)
        if train.tokens is not None:
            return cls(max(1, -(-train.tokens // train.tokens_per_step)), None)
        if train.steps is not None:
            return cls(train.steps, None)
        raise SiliconError("no budget: nothing says how long to train", fix="Give --steps, --tokens or --time.")

    def done(self, step: int, seconds: float, reserve: float = 0.0) -> float:
        """The share used after `step` steps or `seconds` of wall time."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, seconds / max(1e-9, self.seconds - reserve))

    def middle(self, step: int, seconds: float, step_seconds: float, reserve: float = 0.0) -> float:
        """The share used at the middle of step number `step` (from 0): where its learning rate is read."""
        return self.done(step, seconds + step_seconds / 2, reserve) + (0.5 / self.steps if self.steps else 0.0)

    def seconds_left(self, done: float, seconds: float) -> float | None:
        """An estimate from the pace so far; for a time budget, the time itself."""
        if self.seconds is not None:
            return max(0.0, self.seconds - seconds)
        return seconds * (1 - done) / done if done > 0 else None

    def describe(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,} steps"
        return f"{self.seconds:g} s"
