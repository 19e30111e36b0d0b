"""What a training step will need, before anything is trained: the step itself, run on tensors without data.

Operators on fake tensors compute shapes only, so a model of any size takes seconds and no memory. A ledger below
autograd counts the storages that live (after PyTorch's own MemTracker, torch/distributed/_tools/mem_tracker.py).

On a CPU the process needs more than its tensors: glibc's malloc keeps what was freed, and the small objects of the
autograd graph lie between the freed pieces, so that they cannot be joined (measured: 1.2 to 2.3 times the tensors).
There the dry run asks the real malloc for every tensor, in a fresh process, and never touches what it gets.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siliconlm.config import Layer, RunConfig, flatten, resolve
from siliconlm.data.batches import Batch
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import LARGEST_TENSOR, Device, open_device
from siliconlm.model.decoder import Decoder
from siliconlm.training import optim
from siliconlm.training.loop import accumulate, evaluation_batch, update
from siliconlm.training.state import TrainState
from siliconlm.tuning.child import die_with_parent, evaluate_once
from siliconlm.tuning.probe import child_environment, for_child

aten = torch.ops.aten

CHILD = (sys.executable, "-P", "-m", "siliconlm.tuning.memory")
BLOCK = 256  # bytes: allocators give whole blocks
LONGEST_SUM, NARROWEST = 32_767, 16  # matmuls this long, and this wide on both sides, are wrong on M1/M2
MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
# Made of others, with large results in between; every other operator of a step is one kernel, a view or a copy.
COMPOSITE = (aten._safe_softmax.default,)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of live tensors at the peak of training, and what they are; the four parts add up to `peak`.

    `peak` compares with torch's allocated bytes on a GPU. It leaves out what kernels allocate for themselves and what
    the allocator holds beyond what it was asked for. On a CPU `resident` compares with the process's peak resident
    memory; it is 0 where it was not asked for.
    """

    peak: int
    weights: int  # parameters, buffers and their moving average
    gradients: int
    optimizer_state: int
    activations: int  # all else: what the backward pass waits for, and what is gone an operator later
    hazards: list[str] = field(default_factory=list)
    resident: int = 0
    base: int = 0  # of `resident`: the interpreter, torch and its libraries after a step of next to no model


def forecast(config: RunConfig, device: Device) -> Forecast:
    """An optimiser step and one batch of evaluation of a resolved config, without data: peak memory and hazards.

    At most two micro-batches are run, as more need what the second needs. The time goes with the number of layers,
    not with their size, and no memory is used.
    """
    return _forecast(config, device, None)


def forecast_process(config: RunConfig, device: Device, seconds: float = 60.0) -> Forecast:
    """`forecast` in a fresh process, and with it on a CPU the peak resident memory of a process that trains so.

    SiliconError where the process fails or takes longer than `seconds`.
    """
    return forecasts([config], device, seconds)[0]


def forecasts(configs: list[RunConfig], device: Device, seconds: float = 60.0) -> list[Forecast]:
    """As `forecast_process`, each config in a process of its own, at the same time."""
    pipe, environment = subprocess.PIPE, child_environment()
    deadline = time.monotonic() + seconds
    with ExitStack() as processes:
        begun: list[subprocess.Popen[bytes]] = []
        for config in configs:
            child = subprocess.Popen(CHILD, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
            processes.enter_context(child)
            processes.callback(child.kill)
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has died already, and what it left says why
                child.stdin.write(json.dumps(for_child(config, device)).encode() + b"\n")
            # It stays open: by its end the child knows that this process has died. `communicate` would close it.
            processes.callback(child.stdin.close)
            child.stdin = None
            begun.append(child)
        return [_result(child, deadline) for child in begun]


def _result(child: subprocess.Popen[bytes], deadline: float) -> Forecast:
    try:
        out, err = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
        return Forecast(**json.loads(out))
    except subprocess.TimeoutExpired:
        raise SiliconError("the memory forecast took too long") from None
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise SiliconError(f"the memory forecast ended with code {child.returncode}: {last[0]}") from None


def main() -> None:
    """The fresh process: settings in a line on stdin, a Forecast on stdout, both as JSON. Dies with its parent."""
    tables = json.loads(sys.stdin.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    config = resolve(Layer("forecast", flatten(tables, "forecast")))
    device = open_device(config.machine)
    if device.resident:
        base = _base(config, device)
        malloc = Malloc.of_glibc()
        found = _forecast(config, device, malloc)
        found = replace(found, base=base, resident=base + (malloc.peak if malloc else found.peak))
    else:
        found = forecast(config, device)
    sys.stdout.write(json.dumps(asdict(found)))


def _base(config: RunConfig, device: Device) -> int:
    """Resident bytes of this process after one real step of the smallest model of this kind."""
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_kv_head": 1, "head_dim": 2, "n_ff": 8, "context": 8}
    small = config.model_copy(
        update={
            "model": config.model.model_copy(update={**shape, "vocab_size": 64}),
            "machine": config.machine.model_copy(update={"micro_batch": 1, "compile": False}),
        }
    )
    state = TrainState.new(small, device)
    accumulate(state, _batch(small, 1))
    update(state, 0.0)
    return int(psutil.Process().memory_info().rss)


def _forecast(config: RunConfig, device: Device, malloc: Malloc | None) -> Forecast:
    micro = config.machine.micro_batch
    assert micro is not None and config.model.vocab_size
    with _dry(device, malloc) as (stand_in, ledger):
        state = _state(config, stand_in, ledger)
        state.suit(device)  # not the stand-in's
        accumulate(state, _batch(config, min(2, config.sequences_per_step // micro)))
        update(state, 1.0)
        evaluate_once(state, _batch(config, 1, evaluation_batch(config.model.context, micro)))
    parts = {name: ledger.parts[name] for name in ("weights", "gradients", "optimizer_state", "activations")}
    return Forecast(ledger.peak, **parts, hazards=list(ledger.hazards))


@contextmanager
def _dry(device: Device, malloc: Malloc | None) -> Iterator[tuple[Device, Ledger]]:
    """Fake tensors, attention as the device trains it, and a ledger of them."""
    apple = device.query_block > 0
    stand_in = device.in_main_memory() if apple else device
    attention: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if apple else nullcontext()
    ledger = Ledger(stand_in.torch_device, malloc, largest=apple, long_matmuls=device.wrong_long_matmuls)
    with FakeTensorMode(), attention, ledger:
        yield stand_in, ledger


def _state(config: RunConfig, device: Device, ledger: Ledger) -> TrainState:
    """As TrainState.new. Modules of fake tensors cannot be moved; a scaler, and AdamW that is not fused, would read a
    value that is not there."""
    with device.torch_device:
        model = Decoder(config.model)
    model.initialise(config.train.seed)
    machine = config.machine.model_copy(update={"compile": False, "fused": True})
    state = TrainState.around(config.model_copy(update={"machine": machine}), device, model, None)
    ledger.label("weights", [*model.parameters(), *model.buffers(), *state.ema.values()])
    ledger.label("optimizer_state", _optimizer_state(state))
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda done: ledger.label("gradients", [done.grad]))
    return state


def _optimizer_state(state: TrainState) -> list[Tensor]:
    return list(optim.state_tensors(state.model, state.optimisers).values())


def _batch(config: RunConfig, micro_batches: int, micro: int | None = None) -> Batch:
    shape = (micro_batches * (micro or config.machine.micro_batch or 1), config.model.context + 1)
    return Batch.of(np.zeros(shape, dtype=np.int64), apart=config.data.document_mask)


class Ledger(TorchDispatchMode):
    """Counts the live bytes of one kind of device while it is entered, and notes operators that are known to fail."""

    def __init__(self, device: torch.device, malloc: Malloc | None, largest: bool, long_matmuls: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.malloc = malloc
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
        for tensor in made:
            self._hold(tensor)
        if self.long_matmuls and op in MATMULS:
            self._check_matmul(args)
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
        if self.largest and storage.nbytes() >= LARGEST_TENSOR:
            shape = " x ".join(f"{length:,}" for length in tensor.shape)
            size_gib = storage.nbytes() / 2**30
            self._note(f"a tensor of {size_gib:.1f} GiB ({shape}) can abort the process (pytorch#149325)")
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.held[key] = size, "activations"
        weakref.finalize(storage, self._release, key).atexit = False
        self.live["activations"] += size
        self.total += size
        if self.malloc:
            self.malloc.allocate(key, storage.nbytes())
        if self.total >= self.peak:  # of equal peaks the last, when everything has its label
            self.peak, self.parts = self.total, self.live.copy()

    def _release(self, key: int) -> None:
        size, purpose = self.held.pop(key)
        self.live[purpose] -= size
        self.total -= size
        if self.malloc:
            self.malloc.free(key)

    def _check_matmul(self, args: Any) -> None:
        left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
        rows, terms, columns = left.size(-2), left.size(-1), right.size(-1)
        if terms >= LONGEST_SUM and min(rows, columns) >= NARROWEST:
            self._note(f"a matmul over {terms:,} terms ({rows:,} x {columns:,}) is silently wrong (pytorch#177116)")

    def _note(self, hazard: str) -> None:
        self.hazards[hazard] = None


class Malloc:
    """The C library's malloc, asked for memory that nobody touches; `peak` is what it took from the system at most.

    Only for glibc, whose heap ends at sbrk(0); above that end lie the big pieces, which it maps one by one. It must be
    used in a fresh process: in an old one the heap already has room.
    """

    ALIGNMENT = 64  # bytes, as torch's CPU allocator asks

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self.pieces: dict[int, tuple[int | None, int]] = {}  # by key: the address, and the bytes that were mapped
        self.mapped = self.peak = 0
        self.began = library.sbrk(0)

    @classmethod
    def of_glibc(cls) -> Malloc | None:
        return cls(ctypes.CDLL(None)) if platform.libc_ver()[0] == "glibc" else None

    def allocate(self, key: int, size: int) -> None:
        """Bytes for a tensor. More than the system would ever give are counted all the same."""
        address = ctypes.c_void_p()
        refused = self.library.posix_memalign(ctypes.byref(address), self.ALIGNMENT, size)
        end = self.library.sbrk(0)
        mapped = size if refused or (address.value or 0) > end else 0
        self.pieces[key] = None if refused else address.value, mapped
        self.mapped += mapped
        self.peak = max(self.peak, end - self.began + self.mapped)

    def free(self, key: int) -> None:
        address, mapped = self.pieces.pop(key)
        self.mapped -= mapped
        self.library.free(address)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the probe's child: autograd's threads may abort an interpreter that ends
