"""The output head and its loss, forward and backward: plain, by chunks (ours), and torch's F.linear_cross_entropy.

    python benchmarks/chunked_loss.py [--sizes 2048x4096x512 ...] [--repeats 5] [--threads 2] [--device auto]

Sizes are tokens x vocabulary x width. The ways take turns, and the median of a way's times counts. Memory is what
tensors hold at most beyond the inputs and their gradients, by a count below autograd. Prints a table, and one JSON
line per size on stderr. torch's way is measured as it comes and with its chunks (LinearCrossEntropyOptions).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siliconlm.config import MachineConfig
from siliconlm.hardware.device import Device, open_device
from siliconlm.model.loss import chunked_loss

MIB = 1 << 20
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, targets, reduction="sum")


def torchs_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options)


WAYS: dict[str, Way] = {"plain": plain, "chunked": chunked_loss, "torch": torchs, "torch chunked": torchs_chunks}


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made in it that are alive, at most; views of the inputs are nothing new."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in inputs}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def step(way: Way, device: Device, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Milliseconds of one forward and backward pass."""
    x, weight, targets = inputs
    device.synchronise()
    start = time.perf_counter()
    with device.autocast():
        loss = way(x, weight, targets) / len(targets)
    torch.autograd.grad(loss, (x, weight))
    device.synchronise()
    return (time.perf_counter() - start) * 1e3


def held(way: Way, device: Device, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    with Held(*inputs) as count:
        step(way, device, inputs)
    return count.peak - sum(tensor.nbytes for tensor in inputs[:2])


def measure(size: str, repeats: int, device: Device) -> dict[str, Any]:
    tokens, vocabulary, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, width, generator=generator) for rows in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device.torch_device)
    inputs = (
        x.to(device.torch_device).requires_grad_(),
        (weight * width**-0.5).to(device.torch_device).requires_grad_(),
        targets,
    )
    row: dict[str, Any] = {"size": size, "device": device.kind, "dtype": device.dtype_name, "threads": device.threads}
    row["mib"] = {name: round(held(way, device, inputs) / MIB) for name, way in WAYS.items()}  # and warms up
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            times[name].append(step(way, device, inputs))
    row["ms"] = {name: round(statistics.median(taken), 1) for name, taken in times.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2048x4096x512", "2048x32000x512", "2048x50304x768"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 takes the physical cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    device = open_device(MachineConfig(device=given.device, dtype=given.dtype, threads=given.threads))
    print(f"{'tokens x vocabulary x width':30}" + "".join(f"{name:>24}" for name in WAYS))
    for size in given.sizes:
        row = measure(size, given.repeats, device)
        cells = (f"{row['ms'][name]:,.0f} ms {row['mib'][name]:,} MiB" for name in WAYS)
        print(f"{size:30}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
        print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
