"""The self-test finds a sound device sound, and each fault by its own check, so that only its feature is avoided."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from siliconlm.config import MachineConfig
from siliconlm.errors import SiliconError
from siliconlm.hardware import device as device_module
from siliconlm.hardware.device import Device, open_device
from siliconlm.tuning import selftest
from siliconlm.tuning.selftest import INSTEAD, Feature, Verdict, gates, run

LONG = {"matmul, 32,767 long", "matmul, 32,768 long", "linear, 50,304 rows", "linear, 32,768 tokens"}


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device(MachineConfig(device="cpu", threads=1))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is large, where the fault has nothing to do with it."""
    every = selftest.checks
    large = {"matmul", "matmul, 32,766 long", *LONG}
    monkeypatch.setattr(selftest, "checks", lambda *args: [check for check in every(*args) if check.name not in large])
    monkeypatch.setattr(selftest, "CACHED", selftest.CACHED[:4])


def failed(device: Device, **options: bool) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in run(device, **options) if not verdict.passed}


# --- faults ---------------------------------------------------------------------------------------------------------


class Fault(TorchDispatchMode):
    """Puts another kernel in the place of one operator, for one precision. The float64 of the witness stays sound."""

    def __init__(self, name: str, kernel: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name, self.kernel, self.dtype = f"aten::{name}", kernel, dtype

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(op, **(kwargs or {}))
        concerned = any(isinstance(leaf, Tensor) and leaf.dtype == self.dtype for leaf in tree_leaves(args))
        return self.kernel(call, *args) if op._schema.name == self.name and concerned else call(*args)


def long_product(mm: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """M1 and M2 before torch 2.14 (pytorch#177116)."""
    return mm(a, b) * (1.01 if a.size(1) >= 32_767 else 1.0)


def reading_too_far(mm: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The same fault as it is: what stands behind an operand counts too, be it wrong or zero."""
    if a.size(1) < 32_767 or not b.is_contiguous():
        return mm(a, b)
    behind = b.as_strided((1, b.size(1)), b.stride(), b.storage_offset() + b.numel())
    return mm(a, b) + behind


def eleven_bits(product: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """M5 in MLX (mlx#3534): the operands' last 13 bits are cut off."""
    return product(*tree_map(lambda x: x.clone().view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32), operands))


def scaled(call: Callable[..., Any], *args: Any) -> Any:
    """Wrong by 1 %; of several results the first."""
    result = call(*args)
    return result * 1.01 if isinstance(result, Tensor) else (result[0] * 1.01, *result[1:])


def nothing(call: Callable[..., Tensor], *args: Any) -> Tensor:
    return torch.zeros_like(call(*args))


def not_done(_: Callable[..., Any], x: Tensor, *__: Any) -> Tensor:
    return x


def nothing_done(*_: Any) -> None:
    """The same for an operator that returns nothing."""


def row_lost(backward: Callable[..., Tensor], *args: Any) -> Tensor:
    gradient = backward(*args)
    gradient[7] = 0
    return gradient


def only_in_order(addcdiv: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """pytorch#118115: a tensor that is not contiguous stays as it was."""
    return addcdiv(x, *args) if x.is_contiguous() else x


def last_forgotten(adamw: Callable[..., Any], *lists: list[Tensor]) -> Any:
    return adamw(*(tensors[:-1] for tensors in lists))


def ignored_counted(
    backward: Callable[..., Tensor], gradient: Tensor, logits: Tensor, target: Tensor, *args: Any
) -> Any:
    return backward(gradient, logits, target.clamp(min=0), *args)


def not_a_number(call: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    return call(x, *args).where(x.abs() < 50, math.nan)


def other_seed(bernoulli: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    torch.seed()
    return bernoulli(x, *args)


def wrong_when(condition: Callable[..., bool]) -> Callable[..., Any]:
    return lambda call, *args: (scaled if condition(*args) else lambda f, *a: f(*a))(call, *args)


def single_query(q: Tensor, *_: Any) -> bool:
    return q.size(2) == 1


def fewer_keys(q: Tensor, k: Tensor, *_: Any) -> bool:
    return q.size(1) != k.size(1)


def residual(x: Any, y: Any, *_: Any) -> bool:
    """A sum as between blocks: of two whole sequences of vectors."""
    return isinstance(y, Tensor) and x.dim() == y.dim() == 3 and x.size(-1) == y.size(-1) == 96


SDPA, FLASH = "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"
FAULTS: dict[str, tuple[Fault, set[str], set[Feature]]] = {
    "silu": (Fault("silu", scaled), {"silu"}, {"always"}),
    "silu backward": (Fault("silu_backward", scaled), {"silu"}, {"always"}),
    "gelu": (Fault("gelu", not_a_number), {"gelu"}, {"gpt2_shape"}),
    "layer norm": (Fault("native_layer_norm_backward", scaled), {"layer_norm"}, {"gpt2_shape"}),
    "bias": (Fault("addmm", scaled), {"linear with bias"}, {"gpt2_shape"}),
    "embedding": (Fault("embedding_dense_backward", row_lost), {"embedding"}, {"always"}),
    "cross-entropy": (Fault("nll_loss_backward", ignored_counted), {"cross-entropy"}, {"always"}),
    "softmax": (Fault("_log_softmax", scaled), {"cross-entropy"}, {"always"}),
    "chunked cross-entropy": (Fault("scatter_add_", nothing_done), {"chunked cross-entropy"}, {"chunked_loss"}),
    "clipping": (Fault("_foreach_mul_", nothing_done), {"gradient clipping"}, {"always"}),
    "attention": (Fault(FLASH, scaled), {"attention"}, {"always"}),
    "attention backward": (Fault(f"{FLASH}_backward", scaled), {"attention"}, {"always"}),
    "grouped": (Fault(FLASH, wrong_when(fewer_keys)), {"attention, grouped"}, {"grouped_queries"}),
    "decoding": (
        Fault(SDPA, wrong_when(single_query)),
        {"cached attention", "cached attention, grouped"},
        {"cached_decoding"},
    ),
    "fused AdamW": (Fault("_fused_adamw_", last_forgotten), {"AdamW, fused"}, {"fused_adamw"}),
    "addcdiv_": (Fault("addcdiv_", only_in_order), {"addcdiv_"}, {"unfused_adamw"}),
    "lerp_": (
        Fault("lerp_", not_done),
        {"lerp_", "moving average", "AdamW, not fused"},
        {"muon", "averaging", "unfused_adamw"},
    ),
    "batched products": (Fault("bmm", scaled), {"Newton-Schulz"}, {"muon"}),
    "dropout": (Fault("bernoulli_", other_seed), {"dropout"}, {"dropout"}),
    "16 bits": (Fault("mm", nothing, torch.bfloat16), {"bfloat16 autocast"}, {"bfloat16"}),
    "residual": (Fault("add", wrong_when(residual)), {"whole model"}, {"always"}),
}


def test_a_cpu_is_sound(device: Device) -> None:
    verdicts = list(run(device))
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    assert gates(verdicts) == {}
    float32 = [verdict for verdict in verdicts if verdict.needed not in ("bfloat16", "full_precision")]
    assert all(verdict.error < verdict.limit / 10 for verdict in float32)  # no limit is close
    names = [verdict.name for verdict in verdicts]
    assert len(names) == len(set(names)) and set(names) > LONG


def test_every_feature_has_an_alternative(device: Device) -> None:
    assert set(INSTEAD) == set(get_args(Feature))
    needed = {check.needed for check in selftest.checks(device)}
    assert needed == set(INSTEAD) - {"float16"}  # which a CPU may not use


@pytest.mark.parametrize("fault", [long_product, reading_too_far])
def test_long_products(device: Device, fault: Callable[..., Tensor]) -> None:
    with Fault("mm", fault):
        found = failed(device)
    assert set(found) == LONG
    assert set(gates(found.values())) == {"long_matmul"}
    assert all(" is off by " in verdict.detail for verdict in found.values())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_own_check(device: Device, name: str) -> None:
    fault, checks, features = FAULTS[name]
    with fault:
        found = failed(device)
    assert set(found) == checks
    assert set(gates(found.values())) == features
    assert all(" is off by " in verdict.detail for verdict in found.values())


def test_products_of_eleven_bits_are_no_other_fault(device: Device) -> None:
    """Neither are they taken for wrong kernels; what is really wrong is still found."""
    with Fault("mm", eleven_bits), Fault("bmm", eleven_bits):
        assert set(failed(device)) == {"float32 precision"}


def test_eleven_bits_do_not_hide_a_fault(device: Device, short: None) -> None:
    with Fault("mm", eleven_bits), Fault("embedding_dense_backward", row_lost):
        assert set(failed(device)) == {"float32 precision", "embedding"}


@pytest.mark.usefixtures("short")
def test_rms_norm(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A composite of operators that others use too, so the function is replaced."""
    right = F.rms_norm
    wrong = lambda x, *args: right(x, *args) * (1.01 if x.dtype == torch.float32 else 1.0)  # noqa: E731
    monkeypatch.setattr(F, "rms_norm", wrong)
    assert set(failed(device)) == {"rms_norm"}


@pytest.mark.usefixtures("short")
def test_checkpointing_that_drops_other_values(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "checkpoint", partial(device_module.checkpoint, preserve_rng_state=False))
    assert set(failed(device)) == {"checkpointing"}


@pytest.mark.usefixtures("short")
def test_autocast_that_does_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "autocast", lambda self: nullcontext())
    assert set(failed(device)) == {"bfloat16 autocast"}


@pytest.mark.usefixtures("short")
def test_an_operator_that_is_missing(device: Device) -> None:
    def missing(*_: Any) -> None:
        raise NotImplementedError("The operator 'aten::_fused_adamw_' is not currently implemented\nfor this device")

    with Fault("_fused_adamw_", missing):
        (verdict,) = failed(device).values()
    assert (verdict.name, verdict.error) == ("AdamW, fused", math.inf)
    reason = "AdamW, fused: The operator 'aten::_fused_adamw_' is not currently implemented"
    assert gates([verdict]) == {"fused_adamw": reason}


@pytest.mark.usefixtures("short")
def test_full_memory_is_no_verdict(device: Device) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 1 GiB)")

    with Fault("embedding", full), pytest.raises(SiliconError, match="no memory for the check of embedding") as raised:
        list(run(device))
    assert raised.value.kind == "out_of_memory"


def test_a_gate_gives_the_first_reason() -> None:
    verdicts = [
        Verdict("a", True, 0.0, 1.0, "always"),
        Verdict("b", False, 2.0, 1.0, "muon", "the result is off"),
        Verdict("c", False, 3.0, 1.0, "muon", "the weight is off"),
    ]
    assert gates(verdicts) == {"muon": "b: the result is off"}


# --- on the pretend Apple GPU ---------------------------------------------------------------------------------------


def _simmps() -> ModuleType:
    path = Path(__file__).parents[1] / "simmps" / "conftest.py"
    spec = importlib.util.spec_from_file_location("simmps_of_selftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


simmps = _simmps()
library, mac = simmps.library, simmps.mac

CHILD = """
import json, sys
from dataclasses import asdict
from siliconlm.config import MachineConfig
from siliconlm.hardware import device as module
from siliconlm.tuning.selftest import run
device = module.open_device(MachineConfig(device="mps", threads=1))
answers = [[asdict(verdict) for verdict in run(device)]]
if "forget" in sys.argv:
    module._keep_mps_generator = module.noop_context_fn
    answers.append([asdict(verdict) for verdict in run(device)])
print(json.dumps(answers))
"""


def in_child(mac: Any, *words: str, **environment: str) -> list[dict[str, Verdict]]:
    answers = mac.python("-c", CHILD, *words, **environment).ended().json()
    return [{verdict["name"]: Verdict(**verdict) for verdict in verdicts} for verdicts in answers]


def test_the_pretend_gpu(mac: Any) -> None:
    """It is sound; and torch's own checkpointing, which does not keep its generator (pytorch#127676), is not."""
    sound, forgetful = in_child(mac, "forget")
    assert [verdict for verdict in sound.values() if not verdict.passed] == []
    assert {"bfloat16 autocast", "float16 autocast", "checkpointing"} < sound.keys()
    assert gates(forgetful.values()).keys() == {"checkpointing"}


def test_operators_that_the_pretend_gpu_lacks(tmp_path: Path, mac: Any) -> None:
    lacking = {"aten::_fused_adamw_", "aten::gelu", "aten::lerp", "aten::lerp_"}
    native = (simmps.HERE / "ops" / "mps_ops_2.13.txt").read_text().split()
    assert lacking < {name.split(".")[0] for name in native}
    (tmp_path / "ops").write_text("\n".join(name for name in native if name.split(".")[0] not in lacking))
    (verdicts,) = in_child(mac, SIMMPS_OPS=str(tmp_path / "ops"))
    found = {name: verdict for name, verdict in verdicts.items() if not verdict.passed}
    assert set(found) == {"AdamW, fused", "gelu", "lerp_", "moving average", "AdamW, not fused"}
    assert all("is not currently implemented for the MPS device" in verdict.detail for verdict in found.values())
