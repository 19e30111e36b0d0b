"""The search for a micro-batch: two or three measurements make a line, and the line says where to look next.

`fastest` looks for speed, `largest` for memory. Neither probes until something breaks: what a size will need is
predicted first, and one that is predicted not to fit is not tried.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from siliconlm.config import RunConfig, divisors
from siliconlm.events import Probed
from siliconlm.hardware.device import Device
from siliconlm.tuning.memory import forecasts
from siliconlm.tuning.probe import CHILD_SECONDS, COLD, MEASURE_SECONDS, PATIENCE, probe, rate

ENOUGH = 0.98  # the smallest micro-batch within 2 % of the best speed is the best
# Times the seconds per token of a smaller micro-batch: memory is being squeezed, so nothing larger is tried.
CLIFF = 3.0
STRIDE = 4  # the second micro-batch tried is so many times the first: far enough for a line, near enough to fit
NEAR = 0.85  # of the best speed: so much may a busy moment cost
SPARE = 0.4  # of the time left, that a try which only refines the answer may take
SHORTEST_LIMIT = 15.0
COMPILE_SECONDS = 30.0  # to compile the blocks, on a laptop
NO_TIME = "no time left to try it"

Next = Callable[["Search"], int | None]


@dataclass(slots=True)
class Search:
    """Micro-batches of one resolved config on one device, tried until `deadline` (of time.monotonic).

    The sizes divide the sequences of a step, so that tokens per step never change. `rows` are all tries, in order.
    """

    config: RunConfig
    device: Device
    deadline: float
    forecast: dict[int, int] = field(default_factory=dict)  # bytes at the peak, by micro-batch
    rows: list[Probed] = field(default_factory=list)
    ceiling: int | None = None  # this size and larger ones are out
    limit: str = ""  # why
    budget: int = 0

    def __post_init__(self) -> None:
        self.budget = self.device.memory_budget()
        most, fault = self.device.largest_micro_batch(self.config.model, self.config.machine)
        if too_long := [size for size in sizes(self.config) if size > most]:
            self.ceiling, self.limit = too_long[0], fault

    @property
    def allowed(self) -> list[int]:
        """Sizes under the ceiling."""
        return [size for size in sizes(self.config) if self.ceiling is None or size < self.ceiling]

    @property
    def fitting(self) -> list[Probed]:
        """What fits, by size; of several tries the fastest, for what disturbs one only ever slows it."""
        fits = sorted((row for row in self.rows if row.verdict == "fits"), key=lambda row: row.tokens_per_s)
        return sorted({row.micro_batch: row for row in fits}.values(), key=lambda row: row.micro_batch)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, next_size: Next) -> Iterator[Probed]:
        """Try sizes as `next_size` names them, until it names none, or a size that does not fit any more."""
        if not self.allowed:
            yield self._not_tried(sizes(self.config)[0], "too big", self.limit, 0)
        while (micro := next_size(self)) is not None:
            needed = self.predicted(micro)
            if needed > self.budget:
                self._end(micro, f"would need {needed / 1e9:.2f} GB; the budget is {self.budget / 1e9:.2f} GB")
                yield self._not_tried(micro, "too big", self.limit, needed)
            elif self.rows and self.seconds_left < self.child_seconds(micro):
                if all(micro > row.micro_batch for row in self.fitting):
                    self._end(micro, NO_TIME)
                yield self._not_tried(micro, "stopped", NO_TIME, needed)
                return
            else:
                yield from self.attempt(micro)

    def attempt(self, micro: int) -> Iterator[Probed]:
        """Try a size. One that should fit and fails gets a second chance: it may have been the machine's mood."""
        needed = self.predicted(micro)
        for _ in range(2):
            chosen = self.config.replace("probe", **{"machine.micro_batch": micro})
            row = self._judged(probe(chosen, self.device, self.budget, self.patience(micro), needed))
            self.rows.append(row)
            yield row
            settled = row.verdict in ("fits", "slower") or row.memory > self.budget
            if settled or self.seconds_left < self.child_seconds(micro):
                break
        if row.verdict != "fits":
            self._end(micro, row.reason)

    def predicted(self, micro: int) -> int:
        """Bytes at the peak: the forecast, corrected by how far it was off at the nearest size measured; without a
        forecast the line through the measurements. 0 where nothing is known."""
        # A child that was stopped after its first step had not come to the evaluation, which may need most.
        measured = {row.micro_batch: row.memory for row in self.fitting if row.reason != COLD}
        if not self.forecast:
            return int(between(measured, micro)) if len(measured) > 1 else 0
        foreseen = between(self.forecast, micro)
        if measured:
            near = min(measured, key=lambda size: abs(size - micro))
            foreseen *= measured[near] / between(self.forecast, near)
        return int(foreseen)

    def child_seconds(self, micro: int) -> float:
        """An estimate of how long the child for a size runs: its start, two cold passes, a warm step."""
        start = CHILD_SECONDS + (COMPILE_SECONDS if self.config.machine.compile else 0.0)
        known = [row for row in self.fitting if row.forward_seconds]
        if not known:
            return start
        forward = between({row.micro_batch: row.forward_seconds for row in known}, micro)
        return start + max(MEASURE_SECONDS, 3 * forward) + 2 * known[-1].update_seconds

    def patience(self, micro: int, extra: float = 0.0) -> float:
        """Seconds after which the child for a size counts as hanging, where it should take `extra` ones beside its own.

        Half of the time left at most, so that one that hangs leaves enough to go on with.
        """
        if not self.fitting:
            return max(SHORTEST_LIMIT, self.seconds_left if self.rows else self.seconds_left / 2)
        expected = self.child_seconds(micro) + extra
        return max(SHORTEST_LIMIT, expected, min(PATIENCE * expected, self.seconds_left / 2))

    def speed(self, micro: int) -> float:
        """Tokens/s of a size: measured, or by the line through the seconds that its neighbours take."""
        known = {row.micro_batch: row for row in self.fitting}
        if micro in known:
            return known[micro].tokens_per_s
        forward = between({size: row.forward_seconds for size, row in known.items()}, micro)
        updating = sum(row.update_seconds for row in known.values()) / len(known)
        return rate(self.config, micro, max(forward, 1e-9), updating)

    def best(self) -> Probed | None:
        """The smallest micro-batch within 2 % of the best speed among those that fit."""
        top = max((row.tokens_per_s for row in self.fitting), default=0.0)
        return next((row for row in self.fitting if row.tokens_per_s >= ENOUGH * top), None)

    def _judged(self, row: Probed) -> Probed:
        smaller = [other for other in self.fitting if other.micro_batch < row.micro_batch]
        if row.verdict != "fits" or not smaller:
            return row
        quickest = min(smaller, key=lambda other: other.forward_seconds / other.micro_batch)
        ratio = row.forward_seconds / row.micro_batch / (quickest.forward_seconds / quickest.micro_batch)
        if ratio <= CLIFF:
            return row
        reason = f"{ratio:.1f} x slower per token than a micro-batch of {quickest.micro_batch}"
        return replace(row, verdict="slower", reason=reason)

    def _end(self, micro: int, reason: str) -> None:
        self.ceiling, self.limit = micro, reason

    def _not_tried(self, micro: int, verdict: str, reason: str, needed: int) -> Probed:
        model, dtype = self.config.model, self.device.dtype_name
        return Probed(micro, model.context, dtype, 0, 0.0, verdict, reason, predicted=needed)  # type: ignore[arg-type]


def fastest(search: Search) -> int | None:
    """The size to try next in search of speed: the smallest that the line puts within 2 % of the best; None at the end.

    A micro-batch takes a fixed time and one that goes with its size, so its speed grows and levels off. The first two
    sizes make the line, and each further one mends it.
    """
    open_sizes = search.allowed
    if not open_sizes:
        return None
    tried = [row.micro_batch for row in search.fitting]
    if not tried:
        return None if search.rows else open_sizes[0]
    if len(tried) == 1:
        larger = [size for size in open_sizes if size > tried[0]]
        near = [size for size in larger if size <= STRIDE * tried[0]] or larger[:1]
        return near[-1] if near else None
    speeds = {size: search.speed(size) for size in open_sizes if search.predicted(size) <= search.budget}
    wanted = min(size for size, speed in speeds.items() if speed >= ENOUGH * max(speeds.values()))
    if wanted not in tried:
        return wanted
    # Between a size and another four times as large a line can hide a hill, so the best's neighbours are tried.
    around = [size for size in speeds if size > wanted][:1] + [size for size in speeds if size < wanted][-1:]
    refining = [size for size in around if size not in tried]
    # And rivals are measured twice: for a moment the machine may have been busy with something else.
    times = Counter(row.micro_batch for row in search.rows)
    rivals = [size for size in tried if size in speeds and speeds[size] >= NEAR * speeds[wanted]]
    refining += [size for size in rivals if times[size] < 2 <= len(rivals)]
    spare = (size for size in refining if search.child_seconds(size) < SPARE * search.seconds_left)
    return next(spare, None)


def largest(search: Search) -> int | None:
    """The size to try next in search of the largest that fits; None at the end."""
    open_sizes = search.allowed
    tried = [row.micro_batch for row in search.fitting]
    if not open_sizes or (search.rows and not tried):
        return None
    if not tried:
        return open_sizes[0]
    larger = [size for size in open_sizes if size > tried[-1]]
    affordable = [size for size in larger if search.child_seconds(size) <= search.seconds_left]
    promising = [size for size in affordable if search.predicted(size) <= search.budget]
    return promising[-1] if promising else next(iter(larger), None)


def sizes(config: RunConfig) -> list[int]:
    """Divisors of the sequences of a step, each about double the one before."""
    chosen: list[int] = []
    for size in divisors(config.sequences_per_step):
        if not chosen or size >= 2 * chosen[-1] or size == config.sequences_per_step:
            chosen.append(size)
    return chosen


def forecast_sizes(config: RunConfig, device: Device, seconds: float = 60.0) -> dict[int, int]:
    """Bytes at the peak of training with the smallest, a middle and the largest micro-batch. Nothing is trained.

    SiliconError where the forecast fails or takes longer than `seconds`.
    """
    every = sizes(config)
    picked = sorted({every[0], every[len(every) // 2], every[-1]})
    sized = [config.replace("forecast", **{"machine.micro_batch": micro}) for micro in picked]
    found = forecasts(sized, device, seconds)
    return {micro: needs.resident or needs.peak for micro, needs in zip(picked, found, strict=True)}


def between(points: dict[int, float] | dict[int, int], at: int) -> float:
    """The value at a point on the line through its two neighbours among the known points, or through the two at the
    end beyond which it lies; of one point, in proportion to it."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]] * at / known[0]
    after = min(max(bisect_left(known, at), 1), len(known) - 1)
    one, two = known[after - 1], known[after]
    return points[one] + (points[two] - points[one]) / (two - one) * (at - one)
