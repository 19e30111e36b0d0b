from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from siliconlm.config import MachineConfig, ModelConfig
from siliconlm.hardware.device import Device, open_device
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def device() -> Device:
    return open_device(MachineConfig(device="cpu", threads=1))


@pytest.fixture
def random_model() -> Callable[..., Decoder]:
    """A small decoder in which every parameter matters, with logits far apart."""

    def make(vocabulary: int, context: int = 64, family: str = "qwen3", seed: int = 0) -> Decoder:
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 4, "head_dim": 8, "n_ff": 48}
        model = Decoder(ModelConfig(**sizes, vocab_size=vocabulary, context=context, **FEATURES[family])).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                scale = 1.2 if "embed_positions" in name else 0.4  # else GPT-2 repeats one letter
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        return model

    return make
