"""The built-in chat set: sums, spelling, counting letters, and facts about the model itself, generated from a seed.

So the road from text to a model that talks can be gone with no network, and its answers can be marked. Each question
stands there once, so those that are held out were not seen in training.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from siliconlm.data import builtin
from siliconlm.data.chat import Conversation, Message
from siliconlm.errors import SiliconError
from siliconlm.files import home, write_file

QUESTIONS = 12_000
SEED = 1
SHARES = {"arithmetic": 0.3, "spelling": 0.3, "counting": 0.2, "facts": 0.2}
LARGEST_TERM = 50
ONSETS = (*"bcdfghjklmnprstvwz", "bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "pl", "pr", "sh", "st", "th")
VOWELS = tuple("aeiou")
CODAS = ("", "", *"nrsltmd", "ck", "nd", "st")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
GREETINGS = ("", "Hello! ", "Hi. ", "Hello there. ", "Good day. ", "Please tell me: ", "I wonder. ", "Well then. ")
THANKS = ("", " Thank you.", " Thanks!", " Please.", " I want to know.", " Just say it.")


def facts_path() -> Path:
    """The file of facts that the user can edit."""
    return home() / "facts.toml"


def read_facts() -> list[tuple[list[str], str]]:
    """Questions and answer of each fact; the file is put into the home where there is none."""
    path = facts_path()
    if not path.exists():
        write_file(path, resources.files("siliconlm.data").joinpath("facts.toml").read_text(encoding="utf-8"))
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["fact"]
        facts = [(entry["questions"], entry["answer"]) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(path, f"cannot be read: {error}") from None
    for number, (questions, answer) in enumerate(facts, 1):
        words = [*questions, answer] if isinstance(questions, list) else []
        if len(words) < 2 or not all(isinstance(word, str) and word.strip() for word in words):
            raise _bad(path, f"fact {number} needs a list of `questions` and an `answer`, none of them empty")
    return facts


def _bad(path: Path, why: str) -> SiliconError:
    fix = 'Write [[fact]], questions = ["..."] and answer = "...", or remove the file to get the first one back.'
    return SiliconError(why, where=str(path), fix=fix, kind="bad_data")


def conversations(count: int = QUESTIONS, seed: int = SEED) -> Iterator[tuple[str, Conversation]]:
    """`count` questions, each once, with its task: (task, (question, answer)). The same for a seed everywhere."""
    random = Random(seed)
    asked: set[str] = set()
    makers = {"arithmetic": _sum, "spelling": _spelling, "counting": _counting, "facts": _fact_maker(read_facts())}
    bounds = list(itertools.accumulate(SHARES.values()))
    while len(asked) < count:
        at = random.random() * bounds[-1]
        task = next(name for name, bound in zip(SHARES, bounds, strict=True) if at < bound)
        question, answer = makers[task](random)
        if question not in asked:
            asked.add(question)
            yield task, (Message("user", question), Message("assistant", answer))


def _pick(random: Random, items: Sequence[Any]) -> Any:
    """`Random.random` alone gives the same values in every Python."""
    return items[int(random.random() * len(items))]


def _sum(random: Random) -> tuple[str, str]:
    one, other = (int(random.random() * (LARGEST_TERM + 1)) for _ in range(2))
    if random.random() < 0.5:
        return f"What is {one} + {other}?", str(one + other)
    return f"What is {one + other} - {other}?", str(one)


def _word(random: Random) -> str:
    """Half of the words are the plays', half are made up, so that the letters must be read."""
    if random.random() < 0.5:
        return str(_pick(random, sorted({word for words in builtin.WORDS.values() for word in words.split()})))
    syllables = 1 + int(random.random() * 2)
    return "".join(_pick(random, ONSETS) + _pick(random, VOWELS) + _pick(random, CODAS) for _ in range(syllables))


def _spelling(random: Random) -> tuple[str, str]:
    word = _word(random)
    asking = _pick(random, ["Spell {}.", "How do you spell {}?", "Spell the word {}."])
    return asking.format(word), "-".join(word)


def _counting(random: Random) -> tuple[str, str]:
    word = _word(random)
    letter = _pick(random, sorted(set(word)) if random.random() < 0.8 else LETTERS)
    return f"How many times is {letter} in {word}?", str(word.count(letter))


def _fact_maker(facts: list[tuple[list[str], str]]) -> Callable[[Random], tuple[str, str]]:
    def make(random: Random) -> tuple[str, str]:
        questions, answer = _pick(random, facts)
        return _pick(random, GREETINGS) + _pick(random, questions) + _pick(random, THANKS), answer

    return make
