"""Every operator that training, evaluating and sampling use has a path on Apple GPUs.

The operators are recorded on the CPU below autograd, attention on its math path as there (while training it has no
other). The lists name what torch 2.13, the oldest we allow, has for Apple GPUs, read off its macOS build: native
kernels, and operators made of others. Those are opened, so that what they are made of is held against the list too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C import DispatchKey
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from siliconlm import engine
from siliconlm.config import DataConfig, Layer, ModelConfig, RunConfig, SampleConfig, resolve
from siliconlm.data import builtin
from siliconlm.data.batches import Batch
from siliconlm.data.dataset import open_dataset
from siliconlm.data.packing import validation
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.hardware.device import Device
from siliconlm.inference.batch import BatchGenerator, Row
from siliconlm.inference.decode import OneToken
from siliconlm.inference.sampler import sample
from siliconlm.inference.session import Session
from siliconlm.model.decoder import Decoder
from siliconlm.training.loop import evaluate, result_of, train_step
from siliconlm.training.state import TrainState

OPS = Path(__file__).parent / "simmps" / "ops"
NATIVE, COMPOSITE = (
    frozenset((OPS / name).read_text().split()) for name in ("mps_ops_2.13.txt", "mps_ops_2.13_composite.txt")
)
EXPLICIT = (DispatchKey.CompositeExplicitAutograd, DispatchKey.CompositeExplicitAutogradNonFunctional)

QWEN3 = {"model.n_layer": 2, "model.n_embd": 16, "model.n_head": 2, "model.n_kv_head": 1, "model.head_dim": 8}
QWEN3 |= {"model.n_ff": 24, "model.vocab_size": 320, "model.context": 8, "train.tokens_per_step": 32}
LLAMA = QWEN3 | {"model.qk_norm": False, "model.tied": False, "model.n_kv_head": 2}
GPT2 = QWEN3 | {"model.norm": "layernorm", "model.position": "learned", "model.mlp": "gelu", "model.n_kv_head": 2}
GPT2 |= {"model.qk_norm": False, "model.bias": True}
SHAPES = {"qwen3": QWEN3, "llama": LLAMA, "gpt2": GPT2}


class Audit(TorchDispatchMode):
    """Records the operators that run inside it; `missing` are those without a path on Apple GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.opened: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
        self.used.add(name)
        kernel = self.inside(op, name)
        self.opened.append(name)
        try:
            if kernel is None:
                return op(*args, **(kwargs or {}))
            with self:
                return kernel(*args, **(kwargs or {}))
        finally:
            self.opened.pop()

    def inside(self, op: Any, name: str) -> Callable[..., Any] | None:
        """The kernel that makes a composite operator of others; None for one that is not, or that calls itself."""
        if name in NATIVE or name not in COMPOSITE or name in self.opened:
            return None
        if op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            return op.decompose
        keys = [key for key in EXPLICIT if op.has_kernel_for_dispatch_key(key)]
        return partial(op._op_dk, keys[0]) if keys else None

    @property
    def missing(self) -> set[str]:
        return {name for name in self.used if name.startswith("aten::") and name not in NATIVE | COMPOSITE}


def audited(work: Callable[[], object]) -> set[str]:
    """The operators `work` uses. Fails and names those that Apple GPUs lack."""
    with sdpa_kernel(SDPBackend.MATH), Audit() as audit:
        work()
    if audit.missing:
        pytest.fail(f"no path on Apple GPUs for: {', '.join(sorted(audit.missing))}")
    return audit.used


def configured(shape: str, **settings: Any) -> RunConfig:
    more = {name.replace("__", "."): value for name, value in settings.items()}
    return resolve(Layer("test", {**SHAPES[shape], "machine.micro_batch": 2, "train.steps": 3, **more}))


def one_step(config: RunConfig, device: Device) -> Callable[[], object]:
    """A whole optimiser step of two micro-batches, after one that makes the optimisers' state."""
    state = TrainState.new(config, device)
    state.suit(Device("mps", torch.float32, 1))  # as training does there
    shape = (config.sequences_per_step, config.model.context + 1)
    sequences = Batch.of(np.random.default_rng(0).integers(0, 320, shape), config.data.document_mask)

    def work() -> object:
        train_step(state, sequences, 1.0)
        train_step(state, sequences, 0.5)
        return state.is_finite()

    return work


@pytest.fixture
def device() -> Device:
    return Device("cpu", torch.float32, 1)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape: str, optimiser: str, device: Device) -> None:
    used = audited(one_step(configured(shape, optim__name=optimiser), device))
    # Attention by blocks, the tied or free head, and the fused AdamW were really there to be seen.
    assert {"aten::_fused_adamw_", "aten::bmm", "aten::logsumexp", "aten::nll_loss_forward"} <= used
    assert "aten::linalg_vector_norm" in used  # inside aten::_foreach_norm, of which clipping is made


@pytest.mark.parametrize("shape", SHAPES)
def test_training_on_documents_that_are_kept_apart(shape: str, device: Device) -> None:
    used = audited(one_step(configured(shape, data__document_mask=True), device))
    assert "aten::repeat_interleave.self_int" in used or "aten::masked_fill_.Scalar" in used


def test_the_chunked_loss(device: Device) -> None:
    used = audited(one_step(configured("qwen3", machine__chunked_loss=True), device))
    assert {"aten::addmm_", "aten::scatter_add_", "aten::_log_softmax"} <= used
    assert not used & {"aten::_log_softmax_backward_data", "aten::nll_loss_backward"}  # of the plain loss


def test_training_with_everything_on(device: Device) -> None:
    halved = Device("cpu", torch.bfloat16, 1)
    settings = {"model__dropout": 0.1, "machine__checkpointing": True, "train__ema": 0.9, "optim__name": "muon"}
    settings |= {"machine__chunked_loss": True}
    used = audited(one_step(configured("qwen3", **settings), halved))
    assert {"aten::_to_copy", "aten::lerp_.Scalar"} <= used  # autocast, the weights' average
    assert used & {"aten::bernoulli_.float", "aten::native_dropout"}


def test_evaluating(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    text = tmp_path / "plays.txt"
    text.write_text("".join(piece.text for piece in builtin.pieces(size=3000, seed=7)))
    list(engine.prepare([str(text)], "plays"))
    model = Decoder(configured("qwen3").model)
    model.initialise(1)
    with open_dataset("plays") as dataset:
        windows = validation(dataset, model.config.context, DataConfig())
        used = audited(lambda: result_of(evaluate(model, dataset, windows, device, 4, 0)))
    assert "aten::nll_loss_forward" in used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sampling(shape: str, dtype: torch.dtype) -> None:
    """Prefill, one token at a time, a chunk after others (with a mask), a refilled cache, and every filter."""
    config: ModelConfig = configured(shape).model
    model = Decoder(config).eval()
    model.initialise(1)
    settings = SampleConfig(top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)

    def work() -> None:
        session = Session(model, Device("cpu", dtype, 1))
        if session.one_token:
            session.one_token = OneToken(model, session.cache)  # a GPU's, not NumPy's
        generator = torch.Generator().manual_seed(0)
        for ids in ([1, 2, 3], [4], [5, 6], [7], [8, 9]):
            logits = session.feed([ids])[0].index_fill(0, torch.tensor([300]), -torch.inf)
            sample(logits, session.ids[0], settings, generator)

    used = audited(work)
    assert {"aten::tril", "aten::topk", "aten::cumsum"} <= used
    assert "aten::_scaled_dot_product_attention_math_for_mps" in NATIVE  # what attention is there without gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_together(shape: str, dtype: torch.dtype) -> None:
    """Texts of unequal length that share a forward pass; one joins later, one leaves its row to another."""
    model = Decoder(configured(shape).model).eval()
    model.initialise(1)

    def work() -> None:
        batch = BatchGenerator(model, Device("cpu", dtype, 1), 3)
        if batch.reader.one_token:
            batch.reader.one_token = OneToken(model, batch.cache)
        for prompt in ([1, 2, 3], [4]):
            batch.join(Row(model, byte_tokenizer(), prompt, SampleConfig(temperature=0), 0))
            batch.step()
        batch.leave(batch.rows[0])

    used = audited(work)
    assert used & {"aten::index_put_", "aten::_index_put_impl_"} and "aten::le.Tensor" in used


LACKING = {
    "aten::mode": lambda: torch.mode(torch.ones(3)),
    "aten::take": lambda: torch.take(torch.ones(3), torch.tensor([1])),
    "aten::_linalg_eigh": lambda: torch.linalg.eigh(torch.eye(3)),
    # made of others, of which one is lacking
    "aten::_linalg_svd": lambda: torch.linalg.matrix_norm(torch.eye(3), 2),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_apple_gpus_lack_is_caught(name: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=name):
        audited(LACKING[name])
