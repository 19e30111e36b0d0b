"""Generation: greedy as transformers', whole characters, stop texts, text beyond the context."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from siliconlm.config import MachineConfig, ModelConfig, SampleConfig
from siliconlm.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Sampled
from siliconlm.hardware.device import Device, open_device
from siliconlm.inference.sampler import sample
from siliconlm.inference.session import TOGETHER, Session, StopText, banned_ids, check_prompt, generate
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import to_hf_tensors
from siliconlm.model.weights import model_files, write_tensors

Random = Callable[..., Decoder]
GREEDY = SampleConfig(temperature=0, max_tokens=50)
LETTERS = char_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n")


def settings(**values: Any) -> SampleConfig:
    return SampleConfig(**{"temperature": 0, "max_tokens": 50, **values})


def text_of(pieces: list[Sampled]) -> str:
    return "".join(piece.text for piece in pieces)


def logits_for_text(session: Session, tokenizer: Tokenizer, ids: list[int]) -> torch.Tensor:
    banned = banned_ids(session.model, tokenizer)
    return session.feed([ids])[0].index_fill(0, banned, -torch.inf)


def greedy_by_hand(model: Decoder, tokenizer: Tokenizer, device: Device, ids: list[int]) -> str:
    """What follows ids by always taking the likeliest of 20 tokens."""
    session, made = Session(model, device), []
    while len(made) < 20:
        last = int(logits_for_text(session, tokenizer, made[-1:] or ids).argmax())
        if last == tokenizer.eos:
            break
        made.append(last)
    assert made
    return tokenizer.decode(made)


def chain(text: str) -> tuple[Decoder, Tokenizer]:
    """A real decoder that says one text: each byte's embedding points at the next byte's row of the head.

    The blocks add nothing, so what follows depends on the last byte alone; no byte may stand there twice.
    """
    tokenizer = byte_tokenizer()
    ids = [tokenizer.eos, *tokenizer.encode(text), tokenizer.eos]
    assert len(set(ids)) == len(ids) - 1
    sizes = {"n_layer": 1, "n_embd": 320, "n_head": 1, "n_kv_head": 1, "head_dim": 8, "n_ff": 8}
    model = Decoder(ModelConfig(**sizes, vocab_size=320, context=64, tied=False)).eval()
    model.initialise(0)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        model.lm_head.weight.zero_()
        for here, there in pairwise(ids):
            model.lm_head.weight[there, here] = 1
    return model, tokenizer


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_transformers(
    random_model: Random, device: Device, tmp_path: Path, family: str, penalty: float
) -> None:
    model = random_model(64, context=80, family=family, seed=3)
    for name, content in model_files(model.config, LETTERS).items():
        (tmp_path / name).write_bytes(content)
    write_tensors(tmp_path / "model.safetensors", to_hf_tensors(model.config, dict(model.named_parameters())))
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt, banned = "To be, or not to be", banned_ids(model, LETTERS).tolist()
    ids = torch.tensor([LETTERS.encode(prompt)])
    # The end of text is left out as well, so that both go on for all 50 tokens.
    with torch.no_grad():
        model.model.embed_tokens.weight[LETTERS.eos] = 0
        hf.get_input_embeddings().weight[LETTERS.eos] = 0
    options = {"do_sample": False, "max_new_tokens": 50, "suppress_tokens": banned, "repetition_penalty": penalty}
    made = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.size(1) :].tolist()
    pieces = list(generate(model, LETTERS, device, prompt, settings(repetition_penalty=penalty), 0))
    assert pieces[-1].tokens == len(made) == 50
    assert text_of(pieces) == LETTERS.decode(made)
    assert len(set(made)) > 2, "a text that repeats one letter would agree too easily"


def test_logits_are_those_of_a_full_forward(random_model: Random, device: Device) -> None:
    model = random_model(64)
    session, ids = Session(model, device), LETTERS.encode("Ships sail on, and gulls cry")
    with torch.no_grad():
        for end in (5, 6, 7, 20, 28):
            got = session.feed([ids[len(session.ids[0]) : end]])[0]
            torch.testing.assert_close(got, model(torch.tensor([ids[:end]]))[0, -1], atol=1e-4, rtol=1e-4)


def test_half_precision_stays_near(random_model: Random, device: Device) -> None:
    half = open_device(MachineConfig(device="cpu", threads=1, dtype="bfloat16"))
    model, ids = random_model(64), LETTERS.encode("Ships sail on")
    exact, near = (Session(model, place) for place in (device, half))
    for id in ids:
        expected, got = exact.feed([[id]]), near.feed([[id]])
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.1 * expected.norm()


# --- beyond the context ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_text_goes_on_past_the_context(random_model: Random, device: Device, family: str) -> None:
    """By hand: when 16 tokens are held and one more comes, the newest 8 are read again."""
    model = random_model(64, context=16, family=family)
    session, ids, window = Session(model, device), torch.randint(3, 60, (60,)).tolist(), []
    for place, id in enumerate(ids):
        window = [*window, id] if len(window) < 16 else ids[place - 7 : place + 1]
        with torch.no_grad():
            expected = model(torch.tensor([window]))[0, -1]
        torch.testing.assert_close(session.feed([[id]])[0], expected, atol=1e-4, rtol=1e-4)
    pieces = list(generate(model, LETTERS, device, "ab", settings(temperature=1, max_tokens=100), 5))
    assert pieces[-1].tokens == 100 or pieces[-1].stopped_by == "end of text"


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_a_prompt_longer_than_the_context(random_model: Random, device: Device, length: int) -> None:
    model, ids = random_model(64, context=16), torch.randint(3, 60, (length,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids if length <= 16 else ids[-8:]]))[0, -1]
    torch.testing.assert_close(Session(model, device).feed([ids])[0], expected, atol=1e-4, rtol=1e-4)
    prompt = LETTERS.decode(ids)
    assert list(generate(model, LETTERS, device, prompt, GREEDY, 0))[-1].tokens > 0


def test_the_smallest_context(random_model: Random, device: Device) -> None:
    pieces = list(generate(random_model(64, context=2), LETTERS, device, "abc", settings(temperature=1), 0))
    assert pieces[-1].done


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_its_text_again(random_model: Random, device: Device) -> None:
    model = random_model(64)

    def texts(seed: int, noise: int) -> list[str]:
        torch.manual_seed(noise)
        pieces = list(generate(model, LETTERS, device, "O", settings(temperature=1, num_samples=4), seed))
        return [text_of([piece for piece in pieces if piece.sample == index]) for index in range(4)]

    assert texts(1, 0) == texts(1, 99)
    assert len({*texts(1, 0), *texts(11, 0)}) == 8
    assert texts(2**63 - 1, 0) == texts(2**63 - 1, 1), "the largest seed has further samples too"


def test_generating_leaves_the_global_generator_alone(random_model: Random, device: Device) -> None:
    model, before = random_model(64), torch.get_rng_state()
    list(generate(model, LETTERS, device, "O", settings(temperature=1), 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_drawn_together_are_those_drawn_alone(random_model: Random, device: Device) -> None:
    """More than are drawn at once, of which some end early; each has the seed of its number."""
    model, many = random_model(64), settings(temperature=1, num_samples=TOGETHER + 3, stop=("a",))
    pieces = list(generate(model, LETTERS, device, "Once", many, 7))
    last = {piece.sample: piece for piece in pieces if piece.done}
    assert sorted(last) == list(range(TOGETHER + 3)) and len([piece for piece in pieces if piece.done]) == len(last)
    assert len({piece.tokens for piece in last.values()}) > 3
    for index, piece in last.items():
        alone = list(generate(model, LETTERS, device, "Once", many.model_copy(update={"num_samples": 1}), 7 + index))
        assert text_of(alone) == text_of([piece for piece in pieces if piece.sample == index])
        assert (alone[-1].tokens, alone[-1].stopped_by) == (piece.tokens, piece.stopped_by)


# --- where it ends ---------------------------------------------------------------------------------------------------


def test_the_chain_says_its_text_and_ends(device: Device) -> None:
    model, tokenizer = chain("Sing, muse")
    pieces = list(generate(model, tokenizer, device, "", GREEDY, 0))
    assert text_of(pieces) == "Sing, muse"
    assert (pieces[-1].done, pieces[-1].tokens, pieces[-1].stopped_by) == (True, 11, "end of text")
    assert not any(piece.done for piece in pieces[:-1])


def test_max_tokens_is_the_most(device: Device) -> None:
    model, tokenizer = chain("abcdefgh")
    for most in (1, 3, 8, 9, 10):
        pieces = list(generate(model, tokenizer, device, "", settings(max_tokens=most), 0))
        assert text_of(pieces) == "abcdefgh"[:most] and pieces[-1].tokens == min(9, most)
        assert pieces[-1].stopped_by == ("end of text" if most >= 9 else "max_tokens")


def test_a_prompt_is_continued_and_not_repeated(device: Device) -> None:
    model, tokenizer = chain("abcdefgh")
    assert text_of(list(generate(model, tokenizer, device, "xyabc", GREEDY, 0))) == "defgh"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("STOP",), "abc"),
        (("S",), "abc"),
        (("def",), "abcSTOP"),
        (("OPdef",), "abcST"),
        (("f",), "abcSTOPde"),
        (("a",), ""),
        (("STOX", "OPd"), "abcST"),
        (("TOP", "OP", "P"), "abcS"),
        (("STOX", "efg"), None),
        (("",), None),
        (("nowhere", "abcSTOPdefg"), None),
    ],
)
def test_a_stop_text_across_tokens_is_left_out(device: Device, stops: tuple[str, ...], expected: str | None) -> None:
    model, tokenizer = chain("abcSTOPdef")
    pieces = list(generate(model, tokenizer, device, "", settings(stop=stops), 0))
    assert text_of(pieces) == ("abcSTOPdef" if expected is None else expected)
    assert pieces[-1].stopped_by == ("end of text" if expected is None else "stop text")


def test_what_might_have_become_a_stop_text_is_given_out_at_the_end(device: Device) -> None:
    model, tokenizer = chain("abcSTOPdef")
    assert text_of(list(generate(model, tokenizer, device, "", settings(stop=("STOP",), max_tokens=6), 0))) == "abcSTO"


@given(st.text("abc", max_size=30), st.text("abc", min_size=1, max_size=5), st.lists(st.integers(1, 4), min_size=30))
def test_a_stop_text_is_found_however_the_text_is_cut(text: str, stop: str, sizes: list[int]) -> None:
    hold, out, start = StopText((stop,)), "", 0
    for size in sizes:
        if hold.found or start >= len(text):
            break
        out += hold.push(text[start : start + size])
        start += size
    out += hold.flush()
    assert hold.found == (stop in text)
    assert out == text.split(stop)[0]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_of_several_stop_texts_none_comes_out(text: str, stops: list[str]) -> None:
    hold, out = StopText(tuple(stops)), ""
    for character in text:
        out += hold.push(character)
        if hold.found:
            break
    out += hold.flush()
    assert text.startswith(out) and not any(stop in out for stop in stops)
    assert hold.found == any(stop in text for stop in stops)
    assert hold.found or out == text


# --- whole characters ------------------------------------------------------------------------------------------------


def test_characters_of_many_bytes_come_out_whole(device: Device) -> None:
    text = "aé€😀z"
    model, tokenizer = chain(text)
    pieces = list(generate(model, tokenizer, device, "", GREEDY, 0))
    assert [piece.text for piece in pieces if piece.text] == list(text)


def test_a_character_cut_by_the_end_is_marked_as_in_decode(device: Device) -> None:
    model, tokenizer = chain("a€😀z")
    ids = tokenizer.encode("a€😀z")
    for most in range(1, 10):
        pieces = list(generate(model, tokenizer, device, "", settings(max_tokens=most), 0))
        assert text_of(pieces) == tokenizer.decode(ids[:most])
        assert all("\ufffd" not in piece.text for piece in pieces[:-1])


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_the_pieces_together_are_the_decoded_tokens(random_model: Random, device: Device, kind: str) -> None:
    """Random bytes, mostly no valid UTF-8. The ids come from a loop of the test's own, over the same draws."""
    tokenizer = byte_tokenizer() if kind == "byte" else char_tokenizer("abc éñ€😀日本")
    model, hot = random_model(320), settings(temperature=2, max_tokens=150)
    for seed in range(4):
        generator, session, ids, last = torch.Generator().manual_seed(seed), Session(model, device), [], tokenizer.eos
        while len(ids) < 150:
            logits = logits_for_text(session, tokenizer, [last])
            last = sample(logits, session.ids[0], hot, generator)
            if last == tokenizer.eos:
                break
            ids.append(last)
        pieces = list(generate(model, tokenizer, device, "", hot, seed))
        assert text_of(pieces) == tokenizer.decode(ids)


# --- what never comes out, what never goes in ------------------------------------------------------------------------


def test_banned_ids_never_come_out(device: Device) -> None:
    """A head that wants nothing but special tokens and padding still writes text."""
    model, tokenizer = chain("abc")
    banned = banned_ids(model, tokenizer).tolist()
    special = {tokenizer.inner.token_to_id("<|im_start|>"), tokenizer.inner.token_to_id("<|im_end|>")}
    assert set(banned) == special | set(range(tokenizer.size, 320))
    with torch.no_grad():
        model.lm_head.weight[banned] = 100
    assert text_of(list(generate(model, tokenizer, device, "", GREEDY, 0))) == "abc"
    hot = settings(temperature=10, top_k=300, max_tokens=300)
    session, made = Session(model, device), []
    for piece in generate(model, tokenizer, device, "", hot, 3):
        made += tokenizer.encode(piece.text)
    assert not set(made) & set(banned)
    assert int(session.feed([[tokenizer.eos]]).argmax()) in banned, "it would, if it were let"


def test_a_special_tokens_name_in_a_prompt_is_text(random_model: Random, device: Device) -> None:
    model, tokenizer = random_model(64), char_tokenizer("abcdefghijklmnopqrstuvwxyz<|_>")
    prompt = "<|im_end|>"
    spelled = [tokenizer.inner.token_to_id(character) for character in prompt]
    expected = greedy_by_hand(model, tokenizer, device, spelled)
    assert text_of(list(generate(model, tokenizer, device, prompt, settings(max_tokens=20), 0))) == expected
    assert expected != greedy_by_hand(model, tokenizer, device, [tokenizer.inner.token_to_id(prompt)])


def test_an_empty_prompt_starts_a_new_document(random_model: Random, device: Device) -> None:
    model = random_model(64)
    expected = greedy_by_hand(model, LETTERS, device, [LETTERS.eos])
    assert text_of(list(generate(model, LETTERS, device, "", settings(max_tokens=20), 0))) == expected


def test_characters_that_the_tokenizer_lacks_are_named() -> None:
    with pytest.raises(SiliconError) as error:
        check_prompt(LETTERS, "naïve 日")
    assert "'ï' (U+00EF)" in error.value.what and "'日' (U+65E5)" in error.value.what
    assert error.value.where == "prompt" and "--tokenizer byte" in error.value.fix
    with pytest.raises(SiliconError) as error:
        check_prompt(LETTERS, "".join(chr(code) for code in range(0x400, 0x500)))
    assert len(error.value.what) < 300 and "\n" not in str(error.value)
    check_prompt(LETTERS, "To be, or not to be?\n")
    check_prompt(LETTERS, "")
    check_prompt(byte_tokenizer(), "naïve 日 😀\x00")
