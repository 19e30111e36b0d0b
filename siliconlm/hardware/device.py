"""The only file that says "mps", "cuda" or "cpu": precision, memory, out-of-memory, random numbers, synchronising.

Every choice carries its reason. Facts about Apple GPUs cite the PyTorch issue they rest on.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Threads of GNU OpenMP that wait spin for milliseconds by default; where another program takes a core, that made a
# training step 2 to 20 times slower here. It is read when torch loads, so it stands above the import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import psutil
import torch
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint, noop_context_fn

from siliconlm.config import MachineConfig, ModelConfig
from siliconlm.errors import SiliconError
from siliconlm.events import Chosen
from siliconlm.hardware.doctor import MATMUL_CAP, TorchFacts, matmul_is_capped
from siliconlm.hardware.facts import chip, memory, parse_peak_resident, read, usable_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_TENSOR = 1 << 32  # bytes; a bigger one can abort the whole process on an Apple GPU (pytorch#149325)
QUERY_BLOCK = 256
FEW_BYTES = 64 << 20  # decoding 1 to 40 M parameters was as fast by one thread as by two
OUT_OF_MEMORY_WORDS = ("out of memory", "invalid buffer size", "can't allocate memory", "failed to allocate")


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live and how numbers are computed there. Made by `open_device`."""

    kind: str
    dtype: torch.dtype
    threads: int
    choices: list[Chosen] = field(default_factory=list)
    faults: Mapping[str, str] = field(default_factory=dict)  # what the self-test found broken here, with the reason

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in the chosen precision; weights, residual stream, softmax and loss stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.kind, dtype=self.dtype)

    def scaler(self) -> GradScaler | None:
        """Loss scaling, which only float16 needs."""
        return GradScaler(self.kind) if self.dtype == torch.float16 else None

    def synchronise(self) -> None:
        """Wait for the device; a time taken without this is the time of queueing, not of computing."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "mps":
            torch.mps.synchronize()

    def seed(self, number: int) -> None:
        """Seed the CPU's generator and the device's own. Dropout of a micro-step is then a function of the number."""
        torch.manual_seed(number % (1 << 63))

    def forget_peak(self) -> None:
        if self.kind != "cpu":
            torch.accelerator.reset_peak_memory_stats()

    def peak_memory(self) -> int:
        """Bytes at the peak: what the driver held on a GPU, resident memory of this process on a CPU.

        On Apple GPUs the driver's figure is far above the tensors' (1 GiB heaps), and it is what the machine runs
        out of, so the larger of both counts.
        """
        if self.kind == "cuda":
            return torch.cuda.max_memory_reserved()
        if self.kind == "mps":
            return max(torch.accelerator.max_memory_reserved(), torch.mps.driver_allocated_memory())
        return peak_resident()

    def memory_budget(self) -> int:
        """Bytes a run may use: 0.9 of what the device recommends or has free, 0.8 of the memory free on a CPU.

        In a container free is what the container has left, for beyond that the process is killed.
        """
        if self.kind == "cuda":
            return int(0.9 * torch.cuda.mem_get_info()[0])
        if self.kind == "mps":
            return int(0.9 * torch.mps.recommended_max_memory())
        return int(0.8 * (memory(sys.platform == "darwin")[1] + psutil.Process().memory_info().rss))

    def cap_memory(self, fraction: float, room: int | None = None) -> None:
        """Make allocations beyond `fraction` of the recommended memory fail instead of swapping.

        Metal's default is 1.7 times the recommendation, more than a small Mac has. On a CPU `room` is how many bytes
        of address space this process may still take, where the system can hold it to that (Linux).
        """
        if self.kind == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
        elif self.kind == "mps" and "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
            torch.mps.set_per_process_memory_fraction(float(fraction))
        elif self.kind == "cpu" and room is not None and sys.platform == "linux":
            import resource

            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = psutil.Process().memory_info().vms + room
            resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))

    def checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block so that the backward pass recomputes it, with the same dropout both times.

        torch.utils.checkpoint does not keep the generator of an Apple GPU (pytorch#127676, #194478): we do.
        """
        keep = _keep_mps_generator if self.kind == "mps" else noop_context_fn
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep)

    @contextmanager
    def few_threads(self, size: int) -> Iterator[None]:
        """One thread for work on `size` bytes, if they are few: more do not make that faster, but they wait for each
        other where another program holds a core."""
        few = self.kind == "cpu" and size < FEW_BYTES
        torch.set_num_threads(1 if few else self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def orthogonalising_dtype(self) -> torch.dtype:
        """Muon's Newton-Schulz iteration needs few digits; only CUDA computes them faster than float32."""
        return torch.bfloat16 if self.kind == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

    @property
    def resident(self) -> bool:
        """Whether tensors count as resident memory of the process, which then can be watched from outside."""
        return self.kind == "cpu"

    @property
    def query_block(self) -> int:
        """Queries at a time where torch's attention would keep all scores, as on Apple GPUs in training; else 0."""
        return QUERY_BLOCK if self.kind == "mps" else 0

    @property
    def own_norm(self) -> bool:
        """Whether torch's RMSNorm goes backward through many operators here: only CUDA has it as one."""
        return self.kind != "cuda"

    @property
    def wrong_long_matmuls(self) -> bool:
        """Whether long matmuls come out wrong here: known of the chip and torch, or found by the self-test."""
        return self.kind == "mps" and ("long_matmul" in self.faults or wrong_long_matmuls())

    def in_main_memory(self) -> Device:
        """A stand-in whose tensors live in main memory: where fake tensors of an Apple GPU cannot go backward."""
        return replace(self, kind="cpu")

    def largest_micro_batch(self, model: ModelConfig, machine: MachineConfig | None = None) -> tuple[int, str]:
        """The most sequences the device's known faults allow, with the fault; (a very large number, "") if none.

        0 where already one sequence is too long.
        """
        if self.kind != "mps":
            return sys.maxsize, ""
        vocab_size = 0 if machine and machine.chunked_loss else model.vocab_size  # a chunk's logits are small
        logits = LARGEST_TENSOR // (model.context * vocab_size * 4 + 1)
        scores = LARGEST_TENSOR // (model.n_head * min(QUERY_BLOCK, model.context) * model.context * 4 + 1)
        limits = [(min(logits, scores), "a tensor of 4 GiB can abort the process on Apple GPUs (pytorch#149325)")]
        if self.wrong_long_matmuls:
            limits.append((MATMUL_CAP // model.context, _long_matmul_reason()))
        return min(limits)

    def check_model(self, model: ModelConfig) -> None:
        """Refuse to train a shape whose gradients would be silently wrong on this device."""
        if self.wrong_long_matmuls and model.vocab_size > MATMUL_CAP:
            raise SiliconError(
                f"a vocabulary of {model.vocab_size:,} gives wrong gradients here: {_long_matmul_reason()}",
                fix="Prepare with --vocab-size 32000, use torch 2.14 or newer, or --device cpu.",
            )


def open_device(machine: MachineConfig) -> Device:
    """The device that was asked for, or the best one there is: cuda, then mps, then cpu. Never a silent fallback."""
    present = available()
    if machine.device != "auto" and machine.device not in present:
        raise SiliconError(
            f"device {machine.device} is not available: {_why_absent(machine.device)}",
            fix=f"Use --device {present[0]}, or run silicon doctor.",
            kind="no_device",
        )
    kind = present[0] if machine.device == "auto" else machine.device
    why = (
        "asked for"
        if machine.device != "auto"
        else f"the first available of cuda, mps, cpu (here: {', '.join(present)})"
    )
    dtype, reason = _choose_dtype(kind, machine.dtype)
    threads = machine.threads or min(psutil.cpu_count(logical=False) or 1, usable_cores())
    torch.set_num_threads(threads)
    choices = [Chosen("machine.device", kind, why), Chosen("machine.dtype", dtype, reason)]
    device = Device(kind, DTYPES[dtype], threads, choices)
    if kind == "mps":
        _cap_or_explain(device)
    return device


def _cap_or_explain(device: Device) -> None:
    try:
        device.cap_memory(1.0)
    except RuntimeError as error:
        if not is_bad_watermark(error):
            raise
        fix = "Type: unset PYTORCH_MPS_HIGH_WATERMARK_RATIO PYTORCH_MPS_LOW_WATERMARK_RATIO, and see silicon doctor."
        raise SiliconError(plain_words(error), where="environment", fix=fix, kind="bad_environment") from None


def available() -> list[str]:
    """Device kinds that work here, best first."""
    cuda = ["cuda"] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def _why_absent(kind: str) -> str:
    if kind == "cuda":
        return "torch sees no NVIDIA GPU" if torch.version.cuda else "this torch was built without CUDA"
    if not torch.backends.mps.is_built():
        return "this torch was built without MPS (it needs the macOS arm64 build)"
    return "torch was built with MPS but finds no Metal device"


def _choose_dtype(kind: str, wanted: str) -> tuple[str, str]:
    if wanted == "float16" and kind == "cpu":
        raise SiliconError("float16 needs a GPU", where="machine.dtype", fix="Use bfloat16 or float32.")
    if wanted != "auto":
        return wanted, "asked for"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "this GPU has bfloat16 matrix units"
        return "float16", "this GPU has float16 but no bfloat16 matrix units; the loss is scaled"
    if kind == "mps":
        return (
            "float32",
            "on Apple GPUs before M5 bfloat16 saves memory, not time (nanochat#685); silicon profile measures",
        )
    return "float32", "the default on a CPU; silicon profile measures bfloat16 against it"


def torch_facts() -> TorchFacts:
    """What torch says of the devices, as plain values for the doctor."""
    mps = torch.backends.mps.is_available()
    return TorchFacts(
        version=str(torch.__version__),
        mps_built=torch.backends.mps.is_built(),
        mps_available=mps,
        cuda_devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        recommended_memory=_recommended_memory() if mps else None,
    )


def _recommended_memory() -> int | None:
    """What Metal recommends; None where torch refuses its own settings: that comes at the first use of the GPU."""
    try:
        return torch.mps.recommended_max_memory()
    except RuntimeError as error:
        if not is_bad_watermark(error):
            raise
        return None


def processor_name(kind: str) -> str:
    """The name of the chip that computes, for reports and the profile's key."""
    if kind == "cuda":
        return torch.cuda.get_device_name(0)
    if kind == "mps" and hasattr(torch.backends.mps, "get_name"):
        return str(torch.backends.mps.get_name())
    return chip(sys.platform == "darwin")


def wrong_long_matmuls() -> bool:
    """Whether this GPU and torch get long matmuls wrong (M1 and M2 before torch 2.14)."""
    return matmul_is_capped(processor_name("mps"), torch.__version__)


def _long_matmul_reason() -> str:
    return "matmuls over 32,767 or more are silently wrong on M1/M2 before torch 2.14 (pytorch#177116)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. Apple GPUs and CPUs raise a plain RuntimeError (accelerate#4226)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


def is_bad_watermark(error: BaseException) -> bool:
    """Whether torch refuses the PYTORCH_MPS_..._WATERMARK_RATIO variables, as in "invalid low watermark ratio 1.4"."""
    return isinstance(error, RuntimeError) and "watermark ratio" in str(error)


def plain_words(error: BaseException) -> str:
    """An error's first line, without torch's advice to lift the memory limit, which can bring a Mac down."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(" Use PYTORCH_")[0]


def peak_resident() -> int:
    """Bytes of this process's largest resident set so far.

    Linux hands `ru_maxrss` down through fork and exec, so a child's would be at least its parent's; VmHWM is its own.
    """
    if peak := parse_peak_resident(read(Path("/proc/self/status"))):
        return peak
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def calm_blas() -> None:
    """One thread for NumPy's matrix products, from here on: they are small, and threads would wait for each other as
    in `Device.few_threads`."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")


def bfloat16_speed(kind: str, size: int = 512) -> float:
    """How many times faster a bfloat16 matmul is than a float32 one on this device (below 1: slower). Takes < 1 s."""
    wait = Device(kind, torch.float32, 0).synchronise
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(size, size, device=kind, dtype=dtype)
        for _ in range(3):  # the last one counts; the first warm up
            wait()
            start = time.perf_counter()
            left @ left
            wait()
            took[dtype] = time.perf_counter() - start
    return took[torch.float32] / took[torch.bfloat16]


def other_dtypes(device: Device) -> Iterator[tuple[str, str]]:
    """Precisions to measure beside the device's own, each with the reason why it need not be ("" if it must)."""
    if device.kind == "cpu" and device.dtype == torch.float32:
        speed = bfloat16_speed(device.kind)
        yield "bfloat16", f"a bfloat16 matmul took {1 / speed:.1f} times as long here" if speed < 1 else ""
    elif device.kind == "mps" and device.dtype == torch.float32:
        yield "bfloat16", ""
        yield "float16", ""
    elif device.kind == "cuda" and device.dtype != torch.float32:
        yield "float32", ""


def lacks_compiler(device: Device) -> bool:
    """Whether torch.compile has nothing to work with here."""
    return device.kind == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++")))


def can_compile(device: Device) -> str:
    """Why compiling is not worth a try here; "" where it is."""
    if device.kind == "mps":
        return "torch.compile is a prototype on Apple GPUs (pytorch#150121)"
    return "there is no C++ compiler" if lacks_compiler(device) else ""


def _keep_mps_generator() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    state: list[torch.Tensor] = []

    @contextmanager
    def forward() -> Iterator[None]:
        state.append(torch.mps.get_rng_state())
        yield

    @contextmanager
    def recompute() -> Iterator[None]:
        now = torch.mps.get_rng_state()
        torch.mps.set_rng_state(state[0])
        try:
            yield
        finally:
            torch.mps.set_rng_state(now)

    return forward(), recompute()
