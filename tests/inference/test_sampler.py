"""Sampling held against the logits processors of transformers, in the order its `generate` applies them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from siliconlm.config import SampleConfig, sampling
from siliconlm.errors import SiliconError
from siliconlm.inference.sampler import filtered, penalise, sample

SIZE = 200
PLAIN = SampleConfig(temperature=1.0)


def logits_of(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def theirs(logits: torch.Tensor, seen: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    """Probabilities as transformers draws from them."""
    steps = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1:
        steps.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        steps.append(MinPLogitsWarper(settings.min_p))
    return steps(seen[None], logits[None].clone())[0].softmax(-1)


def ours(logits: torch.Tensor, seen: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    logits = penalise(logits, seen, settings.repetition_penalty)
    probabilities = filtered(torch.softmax(logits / settings.temperature, -1), settings)
    return probabilities / probabilities.sum()


SINGLE = [{"top_k": k} for k in (1, 2, 50, 199, 200, 500)]
SINGLE += [{"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)]
SINGLE += [{"min_p": p} for p in (1e-4, 0.05, 0.3, 0.99)]
SINGLE += [{"repetition_penalty": p} for p in (0.5, 1.3, 10.0)]
SINGLE += [{"temperature": t} for t in (0.1, 0.7, 2.0, 10.0)]
MIXED = [
    {"top_k": k, "top_p": p, "min_p": m, "temperature": t, "repetition_penalty": r}
    for k, p, m, t, r in product((0, 5, 60), (0.6, 0.95), (0.0, 0.1), (0.5, 1.5), (1.0, 1.4))
]


@pytest.mark.parametrize("changes", [{}, *SINGLE, *MIXED], ids=str)
def test_the_same_tokens_stay_with_the_same_chances(changes: dict[str, float]) -> None:
    settings = SampleConfig(**{"temperature": 1.0, **changes})
    for seed in range(5):
        logits, seen = logits_of(seed), torch.tensor([3, 7, 7, 150, 3])
        expected, got = theirs(logits, seen, settings), ours(logits, seen, settings)
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_tokens_as_likely_as_the_last_one_kept_stay_as_in_transformers() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    seen = torch.tensor([0])
    for settings in (SampleConfig(temperature=1.0, top_k=2), SampleConfig(temperature=1.0, min_p=0.3)):
        torch.testing.assert_close(ours(logits, seen, settings), theirs(logits, seen, settings))


def test_one_token_always_stays() -> None:
    settings = SampleConfig(temperature=1.0, top_k=1, top_p=1e-9, min_p=0.999)
    assert filtered(logits_of(1).softmax(-1), settings).nonzero().flatten().tolist() == [int(logits_of(1).argmax())]
    even = filtered(torch.full((10,), 0.1), SampleConfig(temperature=1.0, top_p=1e-9))
    assert int((even > 0).sum()) == 1


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"repetition_penalty": 2.0}])
def test_draws_are_as_frequent_as_they_are_likely(changes: dict[str, float]) -> None:
    settings = SampleConfig(**{"temperature": 1.2, **changes})
    logits, seen, draws = logits_of(2, 12), torch.tensor([1, 4]), 8_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[sample(logits, seen.tolist(), settings, generator)] += 1
    chances = theirs(logits, seen, settings)
    assert (counts[chances == 0] == 0).all()
    spread = (draws * chances * (1 - chances)).sqrt()
    assert ((counts - draws * chances).abs() <= 5 * spread + 1e-3).all()


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for seed in range(20):
        logits = logits_of(seed)
        assert sample(logits, [], SampleConfig(temperature=0), generator) == int(logits.argmax())
    assert torch.equal(generator.get_state(), before)


def test_the_coldest_temperature_is_still_finite_and_colder_ones_are_refused() -> None:
    for seed in range(20):
        logits = logits_of(seed) * 1e6
        assert sample(logits, [], SampleConfig(temperature=1e-3), torch.Generator()) == int(logits.argmax())
    for cold in (1e-39, 5e-324, 9e-4):
        with pytest.raises(SiliconError, match=r"must be 0 .* or at least 0\.001") as caught:
            sampling(temperature=cold)
        assert caught.value.what.startswith(f"--temperature {cold}: must be 0")


def test_the_penalty_reaches_the_greedy_choice_as_well() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    settings = SampleConfig(temperature=0, repetition_penalty=1.2)
    assert sample(logits, [1], settings, torch.Generator()) == 2
    assert sample(logits, [], settings, torch.Generator()) == 1
    assert torch.equal(logits, torch.tensor([1.0, 3.0, 2.9, -1.0])), "the logits themselves are left alone"


def test_the_same_generator_state_draws_the_same_and_the_global_one_is_left_alone() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(logits_of(step), [1], PLAIN, generator) for step in range(30)]

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_token_without_a_chance_is_never_drawn() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[[3, 9]] = torch.tensor([-1e4, 1e-3])
    generator = torch.Generator().manual_seed(0)
    settings = SampleConfig(temperature=10, top_k=40, top_p=0.999, min_p=0.0)
    assert {sample(logits, [5], settings, generator) for _ in range(200)} == {9}
