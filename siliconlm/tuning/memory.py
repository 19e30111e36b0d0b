"""What a training step will need, before anything is trained: the step itself, run on tensors without data.

Operators on fake tensors compute shapes only, so a model of any size takes seconds and no memory. A ledger below
autograd counts the storages that live (after PyTorch's own MemTracker, torch/distributed/_tools/mem_tracker.py).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siliconlm.config import RunConfig
from siliconlm.data.shards import Tokens
from siliconlm.hardware.device import LARGEST_TENSOR, Device, wrong_long_matmuls
from siliconlm.model.decoder import Decoder
from siliconlm.training import optim
from siliconlm.training.loop import accumulate, evaluation_batch, to_device, update
from siliconlm.training.state import TrainState

aten = torch.ops.aten

BLOCK = 256  # bytes: allocators give whole blocks
STEPS = 2  # the first makes the optimisers' state, the second finds it in place
LONGEST_SUM, NARROWEST = 32_767, 16  # matmuls this long, and this wide on both sides, are wrong on M1/M2
MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
# Made of others, with large results in between; every other operator of a step is one kernel, a view or a copy.
COMPOSITE = (aten._safe_softmax.default,)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of live tensors at the peak of training, and what they are; the four parts add up to `peak`.

    Not in it: what kernels allocate for themselves, what an allocator holds beyond what it was asked for, and the
    process itself. `resident` adds these for a CPU.
    """

    peak: int
    weights: int  # parameters, buffers and their moving average
    gradients: int
    optimizer_state: int
    activations: int  # all else: what the backward pass waits for, and what is gone an operator later
    hazards: list[str] = field(default_factory=list)


def forecast(config: RunConfig, device: Device) -> Forecast:
    """Two optimiser steps and one batch of evaluation of a resolved config, without data: peak memory and hazards.

    At most two micro-batches are run, as any more need what the second needs. Takes a few milliseconds an operator
    of the model, whatever its width, and no memory.
    """
    assert config.machine.micro_batch is not None and config.model.vocab_size
    with _dry(config, device) as (stand_in, ledger):
        state = _state(config, stand_in, ledger)
        sequences = _sequences(config, min(2, config.sequences_per_step // config.machine.micro_batch))
        for _ in range(STEPS):
            accumulate(state, sequences)
            update(state, 1.0)
            ledger.label("optimizer_state", _optimizer_state(state))
        _evaluate(state)
    parts = ledger.parts
    return Forecast(
        ledger.peak,
        parts["weights"],
        parts["gradients"],
        parts["optimizer_state"],
        parts["activations"],
        list(ledger.hazards),
    )


@contextmanager
def _dry(config: RunConfig, device: Device) -> Iterator[tuple[Device, Ledger]]:
    """Fake tensors, attention as the device trains it, and a ledger of them."""
    faulty = _has_faults(config, device)
    # Fake tensors of an Apple GPU cannot go backward without one; in main memory the same operators run.
    stand_in = replace(device, kind=torch.get_default_device().type) if faulty else device
    attention: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if faulty else nullcontext()
    ledger = Ledger(stand_in.torch_device, largest=faulty, long_matmuls=faulty and wrong_long_matmuls())
    with FakeTensorMode(), attention, ledger:
        yield stand_in, ledger


def _has_faults(config: RunConfig, device: Device) -> bool:
    """Whether it is an Apple GPU: there attention keeps all its scores while training, and 4 GiB are too much."""
    return bool(device.largest_micro_batch(config.model)[1])


def _state(config: RunConfig, device: Device, ledger: Ledger) -> TrainState:
    """As TrainState.new. Modules of fake tensors cannot be moved, and a scaler would read a value that is not there."""
    model = Decoder(config.model)
    model.initialise(config.train.seed)
    model.train()
    if config.machine.checkpointing:
        model.model.checkpoint = device.checkpointed
    state = TrainState(config, device, model, optim.build(model, config.optim, device.orthogonalising_dtype()), None)
    if config.train.ema:
        state.ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ledger.label("weights", [*model.parameters(), *model.buffers(), *state.ema.values()])
    ledger.label("optimizer_state", _optimizer_state(state))
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda done: ledger.label("gradients", [done.grad]))
    return state


def _optimizer_state(state: TrainState) -> list[Tensor]:
    return list(optim.state_tensors(state.model, state.optimisers).values())


def _sequences(config: RunConfig, micro_batches: int) -> Tokens:
    shape = (micro_batches * (config.machine.micro_batch or 1), config.model.context + 1)
    return np.zeros(shape, dtype=np.int64)


def _evaluate(state: TrainState) -> None:
    config = state.config
    batch = evaluation_batch(config.model.context, config.machine.micro_batch)
    ids, targets = to_device(np.zeros((batch, config.model.context + 1), dtype=np.int64), state.device)
    state.model.eval()
    with state.averaged(), torch.no_grad(), state.device.autocast():
        state.model.losses(ids, targets)
    state.model.train()


class Ledger(TorchDispatchMode):
    """Counts the live bytes of one kind of device while it is entered, and notes operators that are known to fail."""

    def __init__(self, device: torch.device, largest: bool, long_matmuls: bool) -> None:
        super().__init__()
        self.device = device
        self.largest, self.long_matmuls = largest, long_matmuls
        self.held: dict[int, tuple[int, str]] = {}  # by storage: bytes, and what for
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.parts: Counter[str] = Counter()  # at the peak
        self.hazards: dict[str, None] = {}  # in order, each once

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in COMPOSITE:
            with self:
                return op._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = op(*args, **(kwargs or {}))
        made = [
            leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type == self.device.type
        ]
        self._look(op, args, made)
        for tensor in made:
            self._hold(tensor)
        return result

    def label(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for; until then they count as activations."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            size, before = self.held[key]
            self.live[before] -= size
            self.live[purpose] += size
            self.held[key] = size, purpose

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.held[key] = size, "activations"
        weakref.finalize(storage, self._release, key).atexit = False
        self.live["activations"] += size
        self.total += size
        if self.total >= self.peak:  # of equal peaks the last, when everything has its label
            self.peak, self.parts = self.total, self.live.copy()

    def _release(self, key: int) -> None:
        size, purpose = self.held.pop(key)
        self.live[purpose] -= size
        self.total -= size

    def _look(self, op: Any, args: Any, made: list[Tensor]) -> None:
        for tensor in made if self.largest else []:
            size = tensor.untyped_storage().nbytes()
            if size >= LARGEST_TENSOR:
                shape = " x ".join(f"{length:,}" for length in tensor.shape)
                self._note(f"a tensor of {size / 2**30:.1f} GiB ({shape}) can abort the process (pytorch#149325)")
        if self.long_matmuls and op in MATMULS:
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            rows, terms, columns = left.size(-2), left.size(-1), right.size(-1)
            if terms >= LONGEST_SUM and min(rows, columns) >= NARROWEST:
                self._note(f"a matmul over {terms:,} terms ({rows:,} x {columns:,}) is silently wrong (pytorch#177116)")

    def _note(self, hazard: str) -> None:
        self.hazards[hazard] = None
