"""Rows of a batch are the texts that each would be alone, whenever they join and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from siliconlm.config import MachineConfig, SampleConfig
from siliconlm.data.tokenizer import byte_tokenizer, char_tokenizer
from siliconlm.events import Sampled
from siliconlm.hardware.device import Device, open_device
from siliconlm.inference.batch import BatchGenerator, Row, row_bytes
from siliconlm.inference.decode import OneToken
from siliconlm.inference.session import generate
from siliconlm.model.decoder import Decoder

Random = Callable[..., Decoder]
LETTERS = char_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n")
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
STOPS = tuple("abcdefghijklm")
PROMPTS = ["To be, or not to be", "O", "Ships sail on, and gulls cry", "Once", "Now", "a b c d e f g"]


def settings(**values: Any) -> SampleConfig:
    return SampleConfig(**{"temperature": 1.0, "max_tokens": 20, **values})


def row_of(model: Decoder, prompt: str, seed: int = 0, **values: Any) -> Row:
    return Row(model, LETTERS, LETTERS.encode(prompt), settings(**values), seed)


def run(batch: BatchGenerator, arrivals: Iterable[tuple[int, Row]]) -> dict[Row, list[Sampled]]:
    """What each row says, when it joins after so many tokens of the others, or as soon as there is room."""
    said: dict[Row, list[Sampled]] = {}
    waiting, steps = sorted(arrivals, key=lambda arrival: arrival[0]), 0
    while waiting or batch.rows:
        while waiting and waiting[0][0] <= steps and len(batch.rows) < batch.size:
            row = waiting.pop(0)[1]
            ready = batch.join(row)
            said[row] = [ready] if ready else []
        for row, ready in batch.step() if batch.rows else ():
            said[row].append(ready)
        steps += 1
    return said


def text_of(pieces: list[Sampled]) -> str:
    return "".join(piece.text for piece in pieces)


@FAMILIES
def test_each_row_says_what_it_would_say_alone(random_model: Random, device: Device, family: str) -> None:
    """More rows than there is room for, each with settings and a seed of its own."""
    model = random_model(64, family=family)
    kinds = [{}, {"temperature": 0}, {"top_p": 0.8}, {"stop": STOPS}, {"max_tokens": 3}, {"repetition_penalty": 1.5}]
    rows = [row_of(model, prompt, seed, **kind) for seed, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))]
    said = run(
        BatchGenerator(model, device, 4), [(0, rows[0]), (3, rows[1]), (3, rows[2]), *((5, row) for row in rows[3:])]
    )
    for seed, (row, prompt, kind) in enumerate(zip(rows, PROMPTS, kinds, strict=True)):
        alone = list(generate(model, LETTERS, device, prompt, settings(**kind), seed))
        assert text_of(said[row]) == text_of(alone)
        assert (said[row][-1].tokens, said[row][-1].stopped_by) == (alone[-1].tokens, alone[-1].stopped_by)
    assert len({pieces[-1].tokens for pieces in said.values()}) >= 3, "they end at different times"


@FAMILIES
@pytest.mark.parametrize("gpu", [False, True])
def test_logits_are_those_of_a_full_forward(random_model: Random, device: Device, family: str, gpu: bool) -> None:
    """Rows of 3 to 30 tokens, while one joins and another leaves; `gpu` takes the short form that is not NumPy's."""
    model = random_model(64, family=family)
    batch = BatchGenerator(model, device, 4)
    if gpu and batch.reader.one_token:
        batch.reader.one_token = OneToken(model, batch.cache)
    rows = [row_of(model, prompt, temperature=0) for prompt in PROMPTS]
    for row in rows[:4]:
        batch.join(row)
    for step in range(12):
        if step in (4, 8):
            batch.leave(rows[step // 4])
            batch.join(rows[3 + step // 4])
        logits = batch.reader.read([row.ids[-1:] for row in batch.rows])
        for row, got in zip(batch.rows, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got, model(torch.tensor([row.ids]))[0, -1], atol=1e-5, rtol=1e-5)
            row.ids.append(3 + step)
    assert len(set(batch.cache.lengths)) == 4


def test_half_precision_stays_near(random_model: Random, device: Device) -> None:
    half = open_device(MachineConfig(device="cpu", threads=1, dtype="bfloat16"))
    model = random_model(64)
    exact, near = (BatchGenerator(model, place, 2) for place in (device, half))
    for batch in (exact, near):
        for prompt in PROMPTS[:2]:
            batch.join(row_of(model, prompt))
    for expected, got in zip(*(batch.reader.read([[5], [6]]) for batch in (exact, near)), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.1 * expected.norm()


@FAMILIES
def test_a_row_ends_with_the_context_and_the_others_go_on(random_model: Random, device: Device, family: str) -> None:
    model = random_model(64, context=32, family=family)
    with torch.no_grad():
        model.model.embed_tokens.weight[LETTERS.eos] = 0  # neither ends before
    long, short = (row_of(model, prompt, temperature=0, max_tokens=1000) for prompt in ("x" * 30, "x"))
    said = run(BatchGenerator(model, device, 2), [(0, long), (1, short)])
    assert [(said[row][-1].tokens, said[row][-1].stopped_by) for row in (long, short)] == [
        (2, "max_tokens"),
        (31, "max_tokens"),
    ]
    assert len(long.ids) == len(short.ids) == 32


def test_a_row_may_end_with_its_first_token(random_model: Random, device: Device) -> None:
    model = random_model(64)
    batch, row = BatchGenerator(model, device, 1), row_of(model, "O", max_tokens=1)
    ready = batch.join(row)
    assert ready and ready.done and row.ended and not batch.rows and not batch.cache.lengths


def test_a_token_that_ends_an_answer_ends_it_and_is_no_text(random_model: Random, device: Device) -> None:
    tokenizer, model = byte_tokenizer(), random_model(320)
    end = tokenizer.special_names["<|im_end|>"]
    with torch.no_grad():  # so that it is the likeliest token, where it is allowed
        model.model.embed_tokens.weight[end] = 10 * model.model(torch.tensor([[7, 8]]))[0, -1]
    for ends, expected in ((frozenset({end}), 1), (frozenset(), 5)):
        row = Row(model, tokenizer, [7, 8], settings(temperature=0, max_tokens=5), 0, ends=ends)
        said = run(BatchGenerator(model, device, 2), [(0, row)])[row]
        assert said[-1].tokens == expected and (end in row.ids) == bool(ends)
        assert not ends or (text_of(said), said[-1].stopped_by) == ("", "end of text")


def test_after_a_clearance_there_is_room_and_nothing_is_left(random_model: Random, device: Device) -> None:
    model = random_model(64)
    batch = BatchGenerator(model, device, 2)
    for prompt in PROMPTS[:2]:
        batch.join(row_of(model, prompt))
    batch.step()
    batch.clear()
    row = row_of(model, "Now", 7)
    assert text_of(run(batch, [(0, row)])[row]) == text_of(list(generate(model, LETTERS, device, "Now", settings(), 7)))


def test_memory_is_taken_once_and_is_what_is_said(random_model: Random, device: Device) -> None:
    model = random_model(64)
    batch = BatchGenerator(model, device, 3)
    held = [*batch.cache.keys, *batch.cache.values]
    places = [part.data_ptr() for part in held]
    assert sum(part.nbytes for part in held) == 3 * row_bytes(model.config, torch.float32)
    run(batch, [(0, row_of(model, prompt)) for prompt in PROMPTS])
    assert [part.data_ptr() for part in (*batch.cache.keys, *batch.cache.values)] == places
