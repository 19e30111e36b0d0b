"""Documents that share a row do not see each other: each gets what it gets alone."""

from __future__ import annotations

import pytest
import torch

from siliconlm.config import ModelConfig
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 4, "head_dim": 8, "n_ff": 48, "vocab_size": 64}
TOKENS = [5, 3, 4]  # in each document


@pytest.fixture(params=FEATURES)
def model(request: pytest.FixtureRequest) -> Decoder:
    shape = SMALL | ({"n_kv_head": 2} if request.param != "gpt2" else {})
    model = Decoder(ModelConfig(**shape, **FEATURES[request.param], context=16))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def documents() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(TOKENS)), torch.tensor(TOKENS)).expand(2, -1).contiguous()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(64, (2, sum(TOKENS)), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("query_block", [0, 5])
def test_a_packed_document_gets_what_it_gets_alone(
    model: Decoder, ids: torch.Tensor, documents: torch.Tensor, query_block: int
) -> None:
    model.model.suit(query_block, own_norm=False, remake=False)
    with torch.no_grad():
        packed = model.lm_head(model.model(ids, documents_BT=documents))
        alone = torch.cat([model(part) for part in ids.split(TOKENS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("query_block", [0, 5])
def test_no_gradient_flows_between_packed_documents(
    model: Decoder, ids: torch.Tensor, documents: torch.Tensor, query_block: int
) -> None:
    model.model.suit(query_block, own_norm=False, remake=False)
    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[2].requires_grad_()))
    x_BTC = model.model(ids, documents_BT=documents)
    (gradient,) = torch.autograd.grad(x_BTC[:, 5:8].square().sum(), seen[:1])
    assert float(gradient[:, 5:8].abs().sum()) > 0
    assert float(gradient[:, :5].abs().sum()) == 0 and float(gradient[:, 8:].abs().sum()) == 0


def test_without_documents_all_that_came_before_is_seen(model: Decoder, ids: torch.Tensor) -> None:
    one = torch.zeros_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids, documents_BT=one), model.model(ids), atol=1e-5, rtol=1e-5)


def test_both_losses_keep_documents_apart(model: Decoder, ids: torch.Tensor, documents: torch.Tensor) -> None:
    targets = ids.roll(-1, 1)
    plain = model.loss(ids, targets, documents_BT=documents)
    chunked = model.loss(ids, targets, chunked=True, documents_BT=documents)
    torch.testing.assert_close(chunked, plain)
    assert not torch.isclose(plain, model.loss(ids, targets), rtol=1e-4)
