"""The learning rate and the budget: pure functions of the share of the budget that is used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from siliconlm.config import TrainConfig, duration
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
    An extended run's schedule begins anew at `start` seconds. With a `deadline` the budget ends at that moment.
    """

    steps: int | None
    seconds: float | None
    start: float = 0.0
    deadline: datetime | None = None

    @classmethod
    def of(cls, train: TrainConfig, start: float = 0.0, deadline: datetime | None = None) -> Budget:
        if train.time is not None:
            return cls(None, train.time, start, deadline)
        if train.tokens is not None:
            return cls(max(1, -(-train.tokens // train.tokens_per_step)), None)
        if train.steps is not None:
            return cls(train.steps, None)
        raise SiliconError(
            "no budget: nothing says how long to train", fix="Give --steps, --tokens, --time or --until."
        )

    @property
    def span(self) -> float:
        """Seconds of a time budget that the schedule runs over: of an extended run, those it was extended by."""
        assert self.seconds is not None
        return self.seconds - self.start

    def done(self, step: int, seconds: float, reserve: float = 0.0) -> float:
        """The share used after `step` steps or `seconds` of wall time."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, max(0.0, seconds - self.start) / max(1e-9, self.span - reserve))

    def middle(self, step: int, seconds: float, step_seconds: float, reserve: float = 0.0) -> float:
        """The share used at the middle of step number `step` (from 0): where its learning rate is read."""
        return self.done(step, seconds + step_seconds / 2, reserve) + (0.5 / self.steps if self.steps else 0.0)

    def seconds_left(self, done: float, seconds: float) -> float | None:
        """An estimate from the pace so far; for a time budget, the time itself."""
        if self.seconds is not None:
            return max(0.0, self.seconds - seconds)
        return seconds * (1 - done) / done if done > 0 else None

    def extended(self, step: int, seconds: float, extra: float) -> Budget:
        """With `extra` seconds more, for a run that has used `seconds`.

        Where the budget is used up, the schedule begins anew: from the end of a decay a second warm-up to the peak and
        a second decay do what they did the first time (Ibrahim et al. 2024; Hägele et al. 2024). SiliconError when
        steps are left, which no time can be added to. A deadline moves by as much.
        """
        if self.done(step, seconds) >= 1:
            return Budget(None, seconds + extra, start=seconds)
        if self.seconds is None:
            raise SiliconError(
                f"only {step:,} of {self.describe()} are done: time can be added to a time budget or a finished run",
                fix="Type silicon resume without --extend first.",
            )
        later = self.deadline + timedelta(seconds=extra) if self.deadline else None
        return replace(self, seconds=self.seconds + extra, deadline=later)

    def resumed(self, seconds: float, now: datetime) -> Budget:
        """With the time until the deadline, for a run that has used `seconds`; without the deadline when it is past."""
        if self.deadline is None or self.deadline <= now:
            return replace(self, deadline=None)
        return replace(self, seconds=seconds + (self.deadline - now).total_seconds())

    def describe(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,} steps"
        words = " + ".join(map(_words, [self.start, self.span] if self.start else [self.span]))
        return words + (f" until {self.deadline:%Y-%m-%d %H:%M}" if self.deadline else "")


def _words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds <= 120 else duration(seconds)
