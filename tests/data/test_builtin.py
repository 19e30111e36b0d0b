"""The entropy of the built-in corpus is only a floor if different choices never give the same text."""

from __future__ import annotations

import hashlib
import math
import re
from itertools import pairwise
from random import Random

import pytest

from siliconlm.data import builtin
from siliconlm.data.builtin import CAST, WORDS, Person, Slot, Symbol, entropy_rate, grammar, pieces

TOKEN = re.compile(r"[a-z'-]+|[^a-z'-]")


def corpus(size: int = 1_000_000, seed: int = 1) -> str:
    return "".join(piece.text for piece in pieces(size, seed))


# --- one text, one derivation -------------------------------------------------------------------------------------


def edges(side: int) -> dict[str, set[str]]:
    """For each rule, the words and marks it can begin with (side 0) or end with (side -1)."""
    found: dict[str, set[str]] = {name: set() for name in grammar()}
    size = -1
    while size != (size := sum(map(len, found.values()))):
        for name, rule in grammar().items():
            found[name].update(*(edge(body[side], side, found) for body in rule.bodies))
    return found


def edge(part: Symbol, side: int, found: dict[str, set[str]]) -> set[str]:
    if isinstance(part, Slot):
        return found[part.rule]
    written = [part] if isinstance(part, str) else [part.written(name) for name in CAST]
    return {TOKEN.findall(text.lower())[side] for text in written}


def test_alternatives_differ_in_their_first_word() -> None:
    """With the next test the proof: a text falls into words in one way, and the next word names the alternative."""
    first = edges(0)
    for name, rule in grammar().items():
        starts = [edge(body[0], 0, first) for body in rule.bodies]
        assert sum(map(len, starts)) == len(set().union(*starts)), f"two alternatives of {name} begin alike"


def test_words_never_run_together() -> None:
    first, last = edges(0), edges(-1)
    for name, rule in grammar().items():
        for body in rule.bodies:
            for left, right in pairwise(body):
                ends, starts = edge(left, -1, last), edge(right, 0, first)
                glued = any(end[0].isalpha() for end in ends) and any(start[0].isalpha() for start in starts)
                assert not glued, f"{left} and {right} in {name}"


class Inside:
    """ln p of a text summed over *all* its derivations, letter by letter and without relying on first words."""

    def __init__(self, text: str) -> None:
        self.text = text.lower()
        self.known: dict[tuple[str, int], dict[int, float]] = {}

    def log_p(self) -> float:
        return self.rule("scene", 0).get(len(self.text), -math.inf)

    def rule(self, name: str, at: int) -> dict[int, float]:
        """ln p of every stretch that starts `at`, by its end."""
        if (name, at) not in self.known:
            ends: dict[int, float] = {}
            rule = grammar()[name]
            for body, nats in zip(rule.bodies, rule.nats, strict=True):
                reached = {at: -nats}
                for part in body:
                    reached = self.after(part, reached)
                for end, log_p in reached.items():
                    add(ends, end, log_p)
            self.known[name, at] = ends
        return self.known[name, at]

    def after(self, part: Symbol, starts: dict[int, float]) -> dict[int, float]:
        ends: dict[int, float] = {}
        for start, log_p in starts.items():
            for end, more in self.part(part, start).items():
                add(ends, end, log_p + more)
        return ends

    def part(self, part: Symbol, at: int) -> dict[int, float]:
        if isinstance(part, Slot):
            return self.rule(part.rule, at)
        if isinstance(part, Person):
            written = {part.written(name).lower() for name in CAST}
            return {at + len(name): -math.log(part.among) for name in written if self.text.startswith(name, at)}
        return {at + len(part): 0.0} if self.text.startswith(part.lower(), at) else {}


def add(ends: dict[int, float], end: int, log_p: float) -> None:
    old = ends.get(end, -math.inf)
    high = max(old, log_p)
    ends[end] = high + math.log(math.exp(old - high) + math.exp(log_p - high))


def test_the_text_alone_has_the_probability_of_the_choices() -> None:
    scenes = list(pieces(60_000, seed=3))
    for piece in scenes:
        assert -Inside(piece.text).log_p() == pytest.approx(piece.nats, rel=1e-12)
    assert len(scenes) > 15


def test_the_witness_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(pieces()).text
    assert Inside(text.replace(" the ", " teh ", 1)).log_p() == -math.inf
    monkeypatch.setitem(builtin.WORDS, "det", f"{WORDS['det']} this")  # "this king" now has two derivations
    grammar.cache_clear()
    try:
        scenes = list(pieces(20_000))
        assert any(-Inside(piece.text).log_p() < piece.nats - 0.1 for piece in scenes)
        with pytest.raises(AssertionError, match="begin alike"):
            test_alternatives_differ_in_their_first_word()
    finally:
        grammar.cache_clear()


# --- the rate -----------------------------------------------------------------------------------------------------


def test_rate_of_a_megabyte() -> None:
    scenes = list(pieces())
    measured = sum(piece.nats for piece in scenes) / sum(len(piece.text) for piece in scenes)
    assert measured == pytest.approx(entropy_rate(), rel=0.02)
    assert 0.6 < entropy_rate() < 1.0


def test_rate_within_its_statistical_error() -> None:
    """Scenes are independent, so the excess of their nats over rate * chars sums to zero within its own spread."""
    rate = entropy_rate()
    excess = [piece.nats - rate * len(piece.text) for piece in pieces(3_000_000, seed=7)]
    spread = math.sqrt(sum(x * x for x in excess))
    chars = 3_000_000
    assert abs(sum(excess)) < 3 * spread
    assert spread / chars < 0.001 * rate  # the bound above is a narrow one


def test_rate_of_a_grammar_small_enough_to_do_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """a with 3/4, then again; b with 1/4 ends it: 4 characters and 4 choices to a scene in the mean."""
    loop = {"scene": {"a<scene>": 3, "b": 1}}
    monkeypatch.setattr(builtin, "scene_tables", lambda: loop)
    grammar.cache_clear()
    try:
        assert entropy_rate() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), rel=1e-12)
    finally:
        grammar.cache_clear()


# --- the text -----------------------------------------------------------------------------------------------------


def test_same_text_for_a_seed_on_every_machine() -> None:
    digest = hashlib.sha256(corpus().encode("ascii")).hexdigest()
    assert digest == "2a02166a6c16089b0f9d5918c5dc5e97c400dc1178023a2d631e27b0938dcf25"
    assert corpus(10_000, seed=1) != corpus(10_000, seed=2)
    assert corpus().startswith(corpus(10_000))


def test_whole_scenes_until_the_size_is_reached() -> None:
    scenes = list(pieces(50_000, seed=4))
    assert sum(len(piece.text) for piece in scenes) >= 50_000 > sum(len(piece.text) for piece in scenes[:-1])
    for piece in scenes:
        assert piece.text.startswith("SCENE. A ") and piece.text.endswith("\n[Exeunt]\n\n")
        assert piece.text.count("SCENE.") == 1
    assert list(pieces(0)) == []


def test_only_who_is_on_stage_speaks_and_who_is_addressed_answers() -> None:
    """Read off the text with regular expressions, knowing nothing of the grammar."""
    present: set[str] = set()
    speaker = addressed = ""
    for line in corpus(200_000, seed=5).splitlines():
        if entering := re.fullmatch(r"\[Enter (.*)\]", line):
            names = set(re.split(r", | and ", entering[1]))
            assert not names & present
            present |= names
        elif leaving := re.fullmatch(r"\[Exit (.*)\]", line):
            assert leaving[1] == speaker
            present.remove(speaker)
            speaker = ""
        elif line == "[Exeunt]":
            present, speaker, addressed = set(), "", ""
        elif speaking := re.fullmatch(r"([A-Z]+):", line):
            name = speaking[1].capitalize()
            assert name in present and name != speaker and addressed in ("", name)
            speaker, addressed = name, ""
        elif (hailing := re.match(r"\[To (\w+)\]$|(\w+), ", line)) and (name := hailing[1] or hailing[2]) in CAST:
            assert name in present - {speaker}
            addressed = name


def test_shape_of_the_text() -> None:
    text = corpus()
    vocabulary = set(re.findall(r"[a-z'-]+", text.lower()))
    assert 400 <= len(vocabulary) <= 700
    assert "\nTo be or not to be, " in text
    speeches = re.findall(r"^[A-Z]+:\n(?:\[.*\]\n)?((?:[A-Z].*\n)+)\n", text, flags=re.MULTILINE)
    lengths = [speech.count("\n") for speech in speeches]
    assert len(speeches) == len(re.findall(r"^[A-Z]+:$", text, flags=re.MULTILINE))
    assert min(lengths) == 1 and max(lengths) == 6
    assert not re.search(r"^[a-z ]|  | \n|\n\n\n", text, flags=re.MULTILINE)


def test_tables_are_clean() -> None:
    for name, text in WORDS.items():
        words = text.split()
        assert len(words) == len(set(words)), f"a word stands twice in {name}"
    used = {"scene"} | {
        part.rule for rule in grammar().values() for body in rule.bodies for part in body if isinstance(part, Slot)
    }
    assert used == set(grammar())


def test_scene_draws_from_the_random_it_is_given() -> None:
    assert builtin.scene(Random(9)) == next(pieces(seed=9))
