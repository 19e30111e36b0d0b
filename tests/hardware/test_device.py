from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import siliconlm
from siliconlm.config import MachineConfig, ModelConfig
from siliconlm.errors import SiliconError
from siliconlm.hardware import device as devices
from siliconlm.hardware import diagnosis
from siliconlm.hardware.device import Device, available, is_out_of_memory, open_device, plain_words
from siliconlm.hardware.doctor import MATMUL_CAP, Check

GIB = 1 << 30
WATERMARK = (
    "MPS backend out of memory (MPS allocated: 9.05 GiB, other allocations: 448.00 KiB, max allowed: 9.07 GiB). "
    "Tried to allocate 242.48 MiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit "
    "for memory allocations (may cause system failure)."
)
GENUINE = [
    WATERMARK,
    "MPS backend out of memory (MPS allocated: 9.05 GiB, other allocations: 0 bytes). "
    "Tried to allocate 1.50 GiB on shared pool.",
    "Invalid buffer size: 24.00 GiB",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)",
]


def gpu(kind: str = "mps") -> Device:
    return Device(kind, torch.float32, 1)


@pytest.fixture
def old_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an M1 or M2 with torch 2.13."""
    monkeypatch.setattr(devices, "wrong_long_matmuls", lambda: True)


@pytest.fixture
def new_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "wrong_long_matmuls", lambda: False)


# --- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", GENUINE)
def test_out_of_memory_is_known_by_its_words(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_is_known_by_its_class(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "The operator 'aten::take' is not currently implemented for the MPS device.",
        "invalid low watermark ratio 1.4",
        "index 70000 is out of bounds: 0, range 0 to 50304",
    ],
)
def test_other_errors_are_not_out_of_memory(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_a_real_allocation_that_fails_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_plain_words_leave_out_the_advice_to_lift_the_limit() -> None:
    assert plain_words(RuntimeError(WATERMARK)) == WATERMARK[: WATERMARK.index(" Use ")]
    assert plain_words(RuntimeError("first line\nsecond line")) == "first line"
    assert plain_words(MemoryError()) == "MemoryError"


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("new_chip")
def test_no_tensor_reaches_4_gib() -> None:
    logits = ModelConfig(context=1024, vocab_size=32_768, n_head=1, n_kv_head=1)  # 128 MiB a sequence
    scores = ModelConfig(context=4096, vocab_size=64, n_head=8, n_kv_head=8)  # 32 MiB a sequence, by blocks of 256
    for shape, most in ((logits, 31), (scores, 127)):
        found, fault = gpu().largest_micro_batch(shape)
        assert found == most
        assert "4 GiB" in fault and "pytorch#149325" in fault
        biggest = max(shape.context * shape.vocab_size, shape.n_head * shape.context * 256) * 4
        assert found * biggest < 4 * GIB <= (found + 1) * biggest


@pytest.mark.usefixtures("new_chip")
def test_a_chunked_loss_holds_no_large_logits() -> None:
    shape = ModelConfig(context=1024, vocab_size=32_768, n_head=1, n_kv_head=1)
    assert gpu().largest_micro_batch(shape, MachineConfig())[0] == 31
    assert gpu().largest_micro_batch(shape, MachineConfig(chunked_loss=True))[0] == 4095  # then the scores' 1 MiB count


@pytest.mark.usefixtures("old_chip")
def test_matmuls_stay_short_on_old_chips() -> None:
    shape = ModelConfig(context=1024, vocab_size=256, n_head=1, n_kv_head=1)
    found, fault = gpu().largest_micro_batch(shape)
    assert found * shape.context <= MATMUL_CAP < 32_767
    assert found == 31
    assert "32,767" in fault and "pytorch#177116" in fault
    assert gpu().largest_micro_batch(ModelConfig(context=1024, vocab_size=64, n_head=256, n_kv_head=256))[0] == 15


@pytest.mark.usefixtures("old_chip")
def test_one_sequence_may_already_be_too_long() -> None:
    assert gpu().largest_micro_batch(ModelConfig(context=32_768, vocab_size=64, n_head=1, n_kv_head=1))[0] == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.usefixtures("old_chip")
def test_other_devices_have_no_such_limits(kind: str) -> None:
    shape = ModelConfig(context=65_536, vocab_size=100_000)
    assert gpu(kind).largest_micro_batch(shape) == (sys.maxsize, "")
    gpu(kind).check_model(shape)


def test_large_vocabularies_are_refused_on_old_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = ModelConfig(vocab_size=50_257)
    monkeypatch.setattr(devices, "wrong_long_matmuls", lambda: False)
    gpu().check_model(gpt2)
    monkeypatch.setattr(devices, "wrong_long_matmuls", lambda: True)
    gpu().check_model(ModelConfig(vocab_size=MATMUL_CAP))
    with pytest.raises(SiliconError, match=r"50,257 gives wrong gradients.*pytorch#177116.*--vocab-size 32000"):
        gpu().check_model(gpt2)


@pytest.mark.parametrize(
    ("chip", "version", "wrong"),
    [
        ("Apple M1", "2.13.0", True),
        ("Apple M2 Ultra", "2.13.1", True),
        ("Apple M2", "2.14.0", False),
        ("Apple M3 Max", "2.13.0", False),
        ("Apple M10", "2.13.0", False),
    ],
)
def test_which_chips_get_long_matmuls_wrong(
    chip: str, version: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: chip, raising=False)
    monkeypatch.setattr(torch, "__version__", version)
    assert devices.wrong_long_matmuls() is wrong


# --- choices ---------------------------------------------------------------------------------------------------------


def present(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, bf16: bool = False) -> None:
    """Pretend that torch sees these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", lambda fraction: None)


def chosen(device: Device) -> dict[str, tuple[str, str]]:
    return {choice.setting: (choice.value, choice.reason) for choice in device.choices}


@pytest.mark.parametrize(
    ("there", "dtype", "because"),
    [
        ({"cuda": True, "bf16": True, "mps": True}, ("cuda", "bfloat16"), "bfloat16 matrix units"),
        ({"cuda": True}, ("cuda", "float16"), "the loss is scaled"),
        ({"mps": True}, ("mps", "float32"), "nanochat#685"),
        ({}, ("cpu", "float32"), "the default on a CPU"),
    ],
)
def test_the_best_device_and_its_dtype_with_reasons(
    there: dict[str, bool], dtype: tuple[str, str], because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(monkeypatch, **there)
    device = open_device(MachineConfig(threads=1))
    assert (device.kind, device.dtype_name) == dtype
    why = chosen(device)
    assert why["machine.device"][0] == dtype[0]
    assert why["machine.device"][1] == f"the first available of cuda, mps, cpu (here: {', '.join(available())})"
    assert why["machine.dtype"][0] == dtype[1] and because in why["machine.dtype"][1]


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, mps=True)
    device = open_device(MachineConfig(device="cpu", dtype="bfloat16", threads=1))
    assert chosen(device) == {"machine.device": ("cpu", "asked for"), "machine.dtype": ("bfloat16", "asked for")}
    assert device.threads == torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("kind", "because"), [("cuda", "this torch was built without CUDA"), ("mps", "built without MPS")]
)
def test_absent_devices_are_refused_with_the_reason(kind: str, because: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    with pytest.raises(SiliconError) as caught:
        open_device(MachineConfig(device=kind))
    assert caught.value.kind == "no_device"
    assert caught.value.what.startswith(f"device {kind} is not available: ") and because in caught.value.what
    assert caught.value.fix == "Use --device cpu, or run silicon doctor."


def test_built_is_told_from_available(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(SiliconError, match="torch sees no NVIDIA GPU"):
        open_device(MachineConfig(device="cuda"))
    with pytest.raises(SiliconError, match="finds no Metal device"):
        open_device(MachineConfig(device="mps"))


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(SiliconError, match="float16 needs a GPU"):
        open_device(MachineConfig(device="cpu", dtype="float16", threads=1))


def test_apple_memory_is_capped_unless_the_user_set_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    present(monkeypatch, mps=True)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    device = open_device(MachineConfig(device="mps", threads=1))
    device.cap_memory(0.9)
    assert fractions == [1.0, 0.9]
    assert all(type(fraction) is float for fraction in fractions)  # torch refuses an int
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "1.0")
    device.cap_memory(0.5)
    assert fractions == [1.0, 0.9]


def test_what_a_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(4, 4)
    with Device("cpu", torch.bfloat16, 1).autocast():
        assert (ones @ ones).dtype == torch.bfloat16
        assert torch.softmax(ones, -1).dtype == torch.float32
    with Device("cpu", torch.float32, 1).autocast():
        assert (ones @ ones).dtype == torch.float32
    assert gpu().scaler() is None and Device("cpu", torch.bfloat16, 1).scaler() is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    dtypes = [gpu(kind).orthogonalising_dtype() for kind in ("cpu", "mps", "cuda")]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


def test_a_seed_decides_dropout_and_any_number_is_one() -> None:
    device = gpu("cpu")
    draws = []
    for number in (5, 5, 6, 2**64 - 1):
        device.seed(number)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1] != draws[2] != draws[3]


def test_memory_of_a_cpu_is_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu("cpu")
    before = device.peak_memory()
    block = torch.ones(before // 4 + (64 << 20))  # of 4 bytes each: more than the process ever held
    assert device.peak_memory() > before
    assert device.memory_budget() > block.numel()
    assert device.resident and not gpu().resident and not gpu("cuda").resident


def test_a_large_parent_does_not_make_the_child_large() -> None:
    """On Linux `ru_maxrss` goes down through fork and exec."""
    code = "from siliconlm.hardware.device import peak_resident; print(peak_resident())"
    block = b"x" * GIB  # torch alone is far smaller
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert 10 << 20 < int(done.stdout) < len(block)


def test_the_budget_is_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpu("cpu").memory_budget()
    monkeypatch.setattr(devices, "memory", lambda mac: (2 * GIB, 0))
    assert 0 < gpu("cpu").memory_budget() == pytest.approx(0.8 * devices.psutil.Process().memory_info().rss, rel=0.1)
    monkeypatch.setattr(devices, "memory", lambda mac: (1 << 50, 1 << 50))
    assert gpu("cpu").memory_budget() > before


# --- torch refuses the GPU -------------------------------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, words: str, *checks: Check) -> None:
    """As where torch raises `words` at the first use of an Apple GPU, and the doctor finds `checks`."""

    def refuse(*_: object) -> int:
        raise RuntimeError(words)

    present(monkeypatch, mps=True)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", refuse)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", refuse)
    monkeypatch.setattr(diagnosis, "examine", lambda facts, torch: list(checks))


FAILED = Check("MPS memory limit", "fail", "torch refuses the GPU", "unset it")


def test_the_doctor_shows_the_remedy_where_torch_refuses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "invalid low watermark ratio 1.4", FAILED)
    found = diagnosis.diagnose(lambda machine: devices.open_device(machine).choices)
    assert found.torch.mps_available and found.torch.recommended_memory is None
    assert not found.healthy and found.checks == [FAILED] and found.choices == []


def test_no_other_error_is_hidden_by_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "something else", FAILED)
    with pytest.raises(RuntimeError, match="something else"):
        devices.torch_facts()
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: GIB)
    with pytest.raises(RuntimeError, match="something else"):
        diagnosis.diagnose(lambda machine: devices.open_device(machine).choices)
    refusing(monkeypatch, "invalid low watermark ratio 1.4", Check("MPS memory limit", "pass", "torch's default"))
    with pytest.raises(SiliconError, match="watermark"):
        diagnosis.diagnose(lambda machine: devices.open_device(machine).choices)


# --- one file knows devices ------------------------------------------------------------------------------------------

KINDS = {"cpu", "cuda", "mps"}


def constants(node: ast.AST) -> set[str]:
    return {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)}


def test_only_one_file_names_devices() -> None:
    """Beside it, the configuration's Literal lists what may be asked for, and does no more."""
    package = Path(siliconlm.__file__).parent
    trees = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in package.rglob("*.py")
    }
    naming = {name for name, tree in trees.items() if constants(tree) & KINDS}
    assert naming == {"hardware/device.py", "config.py"}
    fields = [
        node.annotation
        for node in ast.walk(trees["config.py"])
        if isinstance(node, ast.AnnAssign) and constants(node.annotation) & KINDS
    ]
    assert [ast.unparse(field) for field in fields] == ["Literal['auto', 'cuda', 'mps', 'cpu']"]
    named = [item for item in ast.walk(trees["config.py"]) if isinstance(item, ast.Constant) and item.value in KINDS]
    assert len(named) == len(KINDS)
