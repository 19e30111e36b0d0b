"""The decoder's short form for one token: the same numbers, over the same cache."""

from __future__ import annotations

import pytest
import threadpoolctl
import torch

from siliconlm.config import ModelConfig
from siliconlm.inference.decode import LARGEST, OneToken, OnHost, can_fold, one_token
from siliconlm.model.decoder import Cache, Decoder
from siliconlm.model.families import FEATURES

SIZES = {"n_layer": 2, "n_embd": 48, "n_ff": 80, "vocab_size": 96, "context": 24}
HEADS = {
    "one key head": {"n_head": 3, "n_kv_head": 1, "head_dim": 16},
    "two": {"n_head": 4, "n_kv_head": 2, "head_dim": 8},
    "as many as queries": {"n_head": 3, "n_kv_head": 3, "head_dim": 32},
}


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return made(**HEADS[request.param])


def made(family: str = "qwen3", scale: float = 0.3, **sizes: int) -> Decoder:
    model = Decoder(ModelConfig(**SIZES, **{**HEADS["two"], **sizes}, **FEATURES[family])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


STEPS = pytest.mark.parametrize("step_of", [OneToken, OnHost])
Step = type[OneToken]


def both_ways(
    model: Decoder, step_of: Step, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, Cache]:
    """Logits of the decoder and of its short form, which reads 5 tokens' cache and writes the rest: [2, 24, V]."""
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(2))
    cache = Cache(model.config, 2, torch.device("cpu"), dtype)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        whole, parts = model(ids), [model(ids[:, :5], cache)]
        step = step_of(model, cache)
        parts += [step(ids[:, place])[:, None] for place in range(5, 24)]
    return whole.float(), torch.cat([part.float() for part in parts], dim=1), cache


@STEPS
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_numbers_are_the_decoders(model: Decoder, family: str, step_of: Step) -> None:
    config = model.config
    heads = {"n_head": config.n_head, "n_kv_head": config.n_kv_head, "head_dim": config.head_dim}
    whole, stepped, cache = both_ways(made(family, **heads), step_of)
    torch.testing.assert_close(stepped, whole, atol=1e-5, rtol=1e-5)
    assert cache.length == 24


@STEPS
def test_what_it_writes_the_decoder_reads(model: Decoder, step_of: Step) -> None:
    ids = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(3))
    cache = Cache(model.config, 1, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        step = step_of(model, cache)
        for place in range(10):
            step(ids[:, place])
        torch.testing.assert_close(model(ids[:, 10:], cache), model(ids)[:, 10:], atol=1e-5, rtol=1e-5)


@STEPS
def test_epsilon_counts_where_activations_are_tiny(step_of: Step) -> None:
    """An embedding of a thousandth: there the norms' epsilon is a fifth of what is under the root."""
    model = made()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2e-3 / 0.3)
    whole, stepped, _ = both_ways(model, step_of)
    torch.testing.assert_close(stepped, whole, atol=1e-7, rtol=1e-5)


def test_half_precision_is_as_near_as_the_decoders() -> None:
    model = made()
    exact, _, _ = both_ways(model, OneToken)
    whole, stepped, _ = both_ways(model, OneToken, torch.bfloat16)
    assert (stepped - exact).norm() < 1.5 * (whole - exact).norm()
    assert (whole - exact).norm() < 0.1 * exact.norm()


def test_large_activations_overflow_nothing() -> None:
    """Warnings are errors, NumPy's too."""
    whole, stepped, _ = both_ways(made(scale=30.0), OnHost)
    assert stepped.isfinite().all()
    torch.testing.assert_close(stepped, whole, atol=1e-2 * float(whole.abs().max()), rtol=0)


def test_numpy_is_for_small_models_in_float32_on_a_cpu() -> None:
    model = made()
    for dtype, few, expected in (
        (torch.float32, True, OnHost),
        (torch.float32, False, OneToken),
        (torch.bfloat16, True, OneToken),
    ):
        assert type(one_token(model, Cache(model.config, 1, torch.device("cpu"), dtype), few)) is expected
    blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    assert set(blas) <= {1}


def test_which_models_have_it() -> None:
    assert can_fold(made().config, 1000) and can_fold(made("llama").config, 1000)
    assert not can_fold(
        ModelConfig(**SIZES, **{**HEADS["as many as queries"], "head_dim": 16}, **FEATURES["gpt2"]), 1000
    )
    assert not can_fold(made().config, LARGEST + 1)
