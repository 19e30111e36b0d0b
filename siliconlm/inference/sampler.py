"""Logits -> token, on the CPU: V numbers are few, and a seed then gives the same text on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from siliconlm.config import SampleConfig


def sample(logits_V: Tensor, seen: list[int], settings: SampleConfig, generator: torch.Generator) -> int:
    """Draw one token id from float32 logits [V] on the CPU. `seen` holds the ids so far, for the repetition penalty.

    Order as in transformers: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al.
    2020), min-p (Nguyen et al. 2024).
    """
    if settings.repetition_penalty != 1.0 and seen:
        logits_V = penalise(logits_V, torch.tensor(seen), settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits_V.argmax())
    probabilities = filtered(torch.softmax(logits_V / settings.temperature, -1), settings)
    # The inverse of the distribution at one uniform number in (0, 1]: never at a token of probability 0.
    sums_V = np.cumsum(probabilities.numpy(), dtype=np.float64)
    share = 1 - float(torch.rand(1, generator=generator, dtype=torch.float64))
    return int(np.searchsorted(sums_V, share * sums_V[-1]))


def penalise(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens already seen."""
    ids = seen.unique()
    chosen = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered(probabilities_V: Tensor, settings: SampleConfig) -> Tensor:
    """Probabilities with the unlikely tail set to 0; the likeliest token always stays. They need not sum to 1."""
    if 0 < settings.top_k < len(probabilities_V):
        smallest = probabilities_V.topk(settings.top_k).values[-1]
        probabilities_V = probabilities_V.where(probabilities_V >= smallest, 0.0)
    if settings.top_p < 1:
        ordered, order = (probabilities_V / probabilities_V.sum()).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        probabilities_V = probabilities_V.index_fill(0, order[before >= settings.top_p], 0.0)
    if settings.min_p > 0:
        probabilities_V = probabilities_V.where(probabilities_V >= settings.min_p * probabilities_V.max(), 0.0)
    return probabilities_V
