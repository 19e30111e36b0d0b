"""What a causal decoder must keep, whatever its features: causality, the cache, the loss, the seed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from siliconlm.config import Layer, MachineConfig, ModelConfig, read_profile, resolve
from siliconlm.hardware.device import open_device
from siliconlm.model.decoder import Cache, Decoder, fresh_loss
from siliconlm.model.families import FEATURES

Random = Callable[..., Decoder]


def ids(shape: ModelConfig, rows: int = 2, length: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(shape.vocab_size, (rows, length or shape.context), generator=generator)


def cache_for(shape: ModelConfig, rows: int, size: int = 0) -> Cache:
    return Cache(shape, rows, torch.device("cpu"), torch.float32, size)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(shape: ModelConfig, random_model: Random) -> None:
    model, tokens = random_model(shape), ids(shape)
    before = model(tokens)
    for place in (1, 7, shape.context - 1):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 1) % shape.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.isclose(after[:, place], before[:, place]).all(), "and it does change what follows"


@torch.no_grad()
def test_every_earlier_token_is_attended_to(shape: ModelConfig, random_model: Random) -> None:
    model, tokens = random_model(shape), ids(shape, 1, 8)
    last = model(tokens)[0, -1]
    for place in range(8):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % shape.vocab_size
        assert (model(changed)[0, -1] - last).abs().max() > 1e-4, place


@pytest.mark.parametrize(
    "chunks", [[1] * 32, [32], [20] + [1] * 12, [8, 8, 8, 8], [1, 2, 3, 5, 8, 13], [31, 1], [1, 31]], ids=str
)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_forward(shape: ModelConfig, random_model: Random, chunks: list[int]) -> None:
    model, tokens = random_model(shape), ids(shape)
    cache, parts, start = cache_for(shape, 2), [], 0
    for size in chunks:
        parts.append(model(tokens[:, start : start + size], cache))
        start += size
        assert cache.length == start
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_small_cache_serves_a_short_text(shape: ModelConfig, random_model: Random) -> None:
    model, tokens = random_model(shape), ids(shape, 1, 6)
    cache = cache_for(shape, 1, size=6)
    parts = [model(tokens[:, :4], cache), model(tokens[:, 4:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_can_be_used_again(shape: ModelConfig, random_model: Random) -> None:
    model, tokens = random_model(shape), ids(shape)
    cache = cache_for(shape, 2)
    model((tokens + 5) % shape.vocab_size, cache)
    cache.length = 0
    torch.testing.assert_close(model(tokens[:, :9], cache), model(tokens[:, :9]), atol=1e-5, rtol=1e-5)


def test_losses_are_the_cross_entropy_of_the_logits(shape: ModelConfig, random_model: Random) -> None:
    model, tokens = random_model(shape), ids(shape)
    targets = tokens.roll(-1, 1)
    targets[0, 3:7] = -100
    losses = model.losses(tokens, targets)
    logits = model(tokens)
    for row in range(2):
        expected = F.cross_entropy(logits[row], targets[row], ignore_index=-100, reduction="none")
        torch.testing.assert_close(losses[row], expected)
    assert losses.dtype == torch.float32 and losses.shape == tokens.shape
    assert (losses[0, 3:7] == 0).all() and (losses[1] > 0).all()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.sum() / (targets != -100).sum(), expected)


def test_initial_weights_are_a_function_of_the_seed(shape: ModelConfig) -> None:
    def fresh(seed: int, around: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(around)  # the global generator has no say
        model = Decoder(shape)
        model.initialise(seed)
        return model.state_dict()

    first, again, other = fresh(7, 0), fresh(7, 1), fresh(8, 0)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
    drawn = [name for name, weight in first.items() if weight.std() > 0]
    assert "model.embed_tokens.weight" in drawn
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_initialising_leaves_the_global_generator_alone(shape: ModelConfig) -> None:
    model = Decoder(shape)
    before = torch.get_rng_state()
    model.initialise(1)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_a_fresh_model_knows_nothing(shape: ModelConfig) -> None:
    """Each block begins as the identity, and the first loss is that of guessing: log(vocabulary)."""
    model = Decoder(shape).eval()
    model.initialise(1)
    x = torch.randn(1, 5, shape.n_embd)
    angles = model.model.rotary(0, 5) if model.model.rotary is not None else None
    assert torch.equal(model.model.layers[0](x, angles, None), x)
    losses = model.losses(ids(shape), ids(shape).roll(-1, 1))
    assert losses.mean().item() == pytest.approx(torch.tensor(float(shape.vocab_size)).log().item(), rel=0.05)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [("tiny", 320, 1), ("small", 320, 10), ("medium", 8192, 40), ("large", 32000, 124)],
)
def test_presets_have_the_size_they_say(preset: str, vocabulary: int, millions: int) -> None:
    shape = resolve(read_profile(preset, kind="preset"), Layer("data", {"model.vocab_size": vocabulary})).model
    with torch.device("meta"):
        model = Decoder(shape)
    assert model.count_parameters() == pytest.approx(millions * 1e6, rel=0.15)
    assert model.count_parameters() == sum(weight.numel() for weight in set(model.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_changes_nothing(shape: ModelConfig, random_model: Random, dropout: float) -> None:
    device = open_device(MachineConfig(device="cpu", threads=1))
    tokens = ids(shape)

    def run(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = random_model(shape.model_copy(update={"dropout": dropout})).train()
        model.model.checkpoint = device.checkpointed if checkpointing else None
        device.seed(11)
        losses = model.losses(tokens, tokens.roll(-1, 1))
        losses.mean().backward()
        return losses.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    (plain, gradients), (recomputed, again) = run(False), run(True)
    assert torch.equal(plain, recomputed)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, again[name]), name


def test_checkpointing_really_recomputes(shape: ModelConfig, random_model: Random) -> None:
    model, calls = random_model(shape).train(), []
    model.model.checkpoint = open_device(MachineConfig(device="cpu", threads=1)).checkpointed
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.losses(ids(shape), ids(shape)).mean().backward()
    assert len(calls) == 2


def test_dropout_drops_in_training_only(shape: ModelConfig, random_model: Random) -> None:
    model = random_model(shape.model_copy(update={"dropout": 0.3}))
    plain, tokens = random_model(shape), ids(shape)
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(1)
    first = model(tokens)
    assert not torch.allclose(first, plain(tokens), atol=1e-2)
    torch.manual_seed(1)
    assert torch.equal(first, model(tokens))


@pytest.mark.parametrize("features", [{}, {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}])
def test_a_shape_is_counted_without_torchs_compiler(features: dict[str, object]) -> None:
    """Which takes more than a second to import, at every start that only asks how large a model is."""
    code = (
        "import sys; from siliconlm.model.decoder import count_parameters; from siliconlm.config import ModelConfig\n"
    )
    code += f"print(count_parameters(ModelConfig(vocab_size=64, **{features!r})), 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = Decoder(ModelConfig(vocab_size=64, **features)).count_parameters()  # type: ignore[arg-type]
    assert done.stdout.split() == [str(expected), "False"]


@pytest.mark.parametrize("family", FEATURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 384, 768])
def test_what_fresh_weights_lose_is_known(family: str, tied: bool, width: int) -> None:
    """A probe holds a device's first loss against it; of wide tied models it is far from chance."""
    shape = {"n_layer": 1, "n_embd": width, "n_head": width // 64, "n_kv_head": width // 64, "head_dim": 64}
    config = ModelConfig(**shape, **FEATURES[family], n_ff=64, vocab_size=320, context=128, tied=tied)
    model = Decoder(config)
    model.initialise(1)
    ids = torch.randint(320, (2, 129), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = float(model.loss(ids[:, :-1], ids[:, 1:])) / 256
    assert loss == pytest.approx(fresh_loss(config), rel=0.1)
