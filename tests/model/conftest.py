from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from siliconlm.config import ModelConfig
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 48, "vocab_size": 320}
# Llama's heads are wider than n_embd / n_head; GPT-2's cannot be.
SHAPES: dict[str, ModelConfig] = {
    "qwen3": ModelConfig(**SIZES, context=32, **FEATURES["qwen3"]),
    "qwen3-untied": ModelConfig(**SIZES, context=32, tied=False, rope_theta=1e6, **FEATURES["qwen3"]),
    "llama": ModelConfig(**SIZES, context=32, norm_eps=1e-5, **FEATURES["llama"]),
    "llama-untied": ModelConfig(**{**SIZES, "n_kv_head": 1}, context=32, tied=False, **FEATURES["llama"]),
    "gpt2": ModelConfig(**{**SIZES, "n_kv_head": 4, "head_dim": 8}, context=32, norm_eps=1e-5, **FEATURES["gpt2"]),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    return SHAPES[request.param]


@pytest.fixture
def random_model() -> Callable[..., Decoder]:
    """A decoder in which every parameter matters: no zeros, no ones, as a fresh one has."""

    def make(shape: ModelConfig, seed: int = 0) -> Decoder:
        model = Decoder(shape).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
                if weight.dim() == 1:
                    weight += 1
        return model

    return make
