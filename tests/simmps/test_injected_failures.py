"""probe-batch while children run out of memory, are killed, hang or compute nonsense: it still names what trains.

Each seed draws which tries of which micro-batches meet what (child/fates.py). Every second seed has a GPU with less
room than it recommends, as where other programs have the rest, so that a size which should fit by forecast does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MOST = 2 << 30
SEQUENCES = 128  # of a step; at once their logits alone take more than there is
ROOM = {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.4", "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.3"}
# Faults of fresh memory, which every step asks for, would take most of the time with pages of 4 KiB.
PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STEPS = 50


def shape(recommended: int) -> dict[str, Any]:
    """One thin layer under a vocabulary for which the GPU has room for 64 sequences, and with less room for 32."""
    layer = {"n_layer": 1, "n_embd": 16, "head_dim": 16, "n_ff": 16, "context": 64}
    settings = {f"model__{name}": value for name, value in layer.items()}
    settings |= {"train__tokens_per_step": SEQUENCES * 64, "optim__name": "adamw"}
    return settings | {"model__vocab_size": 22_528 * recommended // MOST}


@pytest.fixture(scope="module")
def gpu(mac: Any) -> Callable[..., dict[str, str]]:
    """The environment of a GPU, by its memory and room."""

    def describe(recommended: int, little_room: bool) -> dict[str, str]:
        return {"SIMMPS_RECOMMENDED": str(recommended), **PAGES, **(ROOM if little_room else {})}

    return describe


def words(mac: Any, recommended: int, name: str, steps: int, micro: int) -> list[str]:
    settings = shape(recommended) | {"machine__micro_batch": micro, "train__eval_every": 1000}
    return [*mac.training(name, steps, **settings), "--device", "mps"]


@pytest.fixture(scope="module")
def largest(mac: Any, gpu: Any) -> Callable[[int, bool], int]:
    """The largest micro-batch with which a step of training ends well on a GPU, of all; found once for each GPU."""
    found: dict[tuple[int, bool], int] = {}

    def look(*of: Any) -> int:
        if of not in found:
            sizes = [2**power for power in range(8)]
            runs = [words(mac, of[0], f"one-{of[0]}-{of[1]}-{size}", 1, size) for size in sizes]
            ended = mac.silicons(*runs, **gpu(*of))
            found[of] = max(size for size, run in zip(sizes, ended, strict=True) if run.code == 0)
        return found[of]

    return look


@pytest.fixture(scope="module")
def trained(mac: Any, gpu: Any) -> Callable[[int, bool, int], int]:
    """The steps that a training with a micro-batch came to, out of STEPS; it is run once for each."""
    found: dict[tuple[int, bool, int], int] = {}

    def train(*of: Any) -> int:
        if of not in found:
            recommended, little_room, micro = of
            command = words(mac, recommended, f"chosen-{recommended}-{little_room}-{micro}", STEPS, micro)
            run = mac.silicon(*command, **gpu(recommended, little_room)).ended()
            found[of] = run.events("finished")[0]["step"]
        return found[of]

    return train


@pytest.mark.parametrize(
    ("recommended", "seed"),
    [(MOST // 32, 7), (MOST // 32, 9)] + [pytest.param(MOST, seed, marks=pytest.mark.slow) for seed in range(20)],
)
def test_what_is_chosen_among_failures_trains(
    mac: Any, gpu: Any, largest: Any, trained: Any, tmp_path: Path, recommended: int, seed: int
) -> None:
    little_room = seed % 2 == 1
    sets = mac.training("unused", 1, **shape(recommended))
    command = ["probe-batch", "--data", "plays", "--device", "mps", "--limit", "2m", "--json"]
    command += sets[sets.index("--set") :]
    told = mac.silicon(*command, **gpu(recommended, little_room), SIMMPS_FATES=f"{seed}:{tmp_path}").ended().json()
    chosen = told["choices"][0]["value"]
    struck = sorted(path.name for path in tmp_path.iterdir())
    print(f"seed {seed}: chosen {chosen} of {largest(recommended, little_room)}; struck: {'; '.join(struck) or 'none'}")
    assert 2 * chosen >= largest(recommended, little_room), told["probes"]
    assert trained(recommended, little_room, chosen) == STEPS
