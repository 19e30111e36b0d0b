"""From files of conversations to datasets, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siliconlm.data import tasks
from siliconlm.data.chat import Message, Template, open_template
from siliconlm.data.conversations import prepare_chat, read_questions
from siliconlm.data.dataset import open_dataset
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Prepared

Lines = list[Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def template() -> Template:
    return open_template(byte_tokenizer())


def written(folder: Path, lines: Lines) -> str:
    path = folder / "chat.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def talk(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number}!"}]}


def prepared(template: Template, *sources: str, **more: Any) -> tuple[list[Event], Prepared]:
    *events, last = prepare_chat(list(sources), "talks", template, **more)
    assert isinstance(last, Prepared)
    return events, last


def test_tokens_and_masks_are_those_of_the_template(tmp_path: Path, template: Template) -> None:
    prepared(template, written(tmp_path, [talk(number) for number in range(20)]), val_fraction=0.25)
    with open_dataset("talks") as dataset:
        dataset.verify()
        assert dataset.is_chat and dataset.card["template"] == template.source
        held_out = [number for number in range(20) if number % 4 == 3]
        for split, shard, numbers in (
            ("train", dataset.train, [n for n in range(20) if n not in held_out]),
            ("val", dataset.val, held_out),
        ):
            encoded = [template.encode(tuple(Message(**m) for m in talk(number)["messages"])) for number in numbers]
            tokens = [token for ids, _ in encoded for token in (template.tokenizer.eos, *ids)]
            learned = [bit for _, bits in encoded for bit in (False, *bits)]
            assert shard.read(0, shard.count).tolist() == tokens
            assert np.array_equal(dataset.masks[split].read(0, shard.count), learned)
            card = dataset.card["splits"][split]
            answers = "".join(talk(number)["messages"][1]["content"] for number in numbers)
            assert card["bytes"] == card["learned_text"] == len(answers) and card["documents"] == len(numbers)
            assert card["learned"] == len(answers) + len(numbers)


def test_the_same_conversations_are_used_again_and_others_are_refused(tmp_path: Path, template: Template) -> None:
    source = written(tmp_path, [talk(number) for number in range(20)])
    first = prepared(template, source)[1]
    assert not first.reused and prepared(template, source)[1].reused
    written(tmp_path, [talk(number) for number in range(21)])
    with pytest.raises(SiliconError, match="made from other text"):
        prepared(template, source)
    assert not prepared(template, source, force=True)[1].reused


def test_a_mask_of_another_dataset_is_refused(tmp_path: Path, template: Template) -> None:
    path = Path(prepared(template, written(tmp_path, [talk(number) for number in range(20)]))[1].path)
    (path / "train.mask.bin").write_bytes((path / "val.mask.bin").read_bytes())
    with pytest.raises(SiliconError, match="belongs to another dataset"):
        open_dataset("talks")


def test_a_conversation_with_nothing_to_learn_is_told(tmp_path: Path, template: Template) -> None:
    unanswered = [{"role": "user", "content": "Hello?"}]
    source = written(tmp_path, [talk(1), unanswered, *map(talk, range(2, 20))])
    events, made = prepared(template, source)
    notices = [event for event in events if isinstance(event, Notice)]
    assert ["left out 1 conversation" in notice.message for notice in notices] == [True]
    assert "chat.jsonl line 2" in notices[0].message and notices[0].level == "warning"
    assert sum(split["documents"] for split in made.card["splits"].values()) == 19


@pytest.mark.parametrize(
    ("lines", "words", "place"),
    [
        ([talk(1), "{oops\n"], "not JSON", "line 2"),
        ([talk(1), talk(2), {"text": "no chat"}], "no conversation in it", "line 3"),
        ([talk(1), []], "empty", "line 2"),
        ([talk(1), list(reversed(talk(2)["messages"]))], "roles out of order", "line 2"),
        ([[{"role": "user", "content": "Hello?"}]] * 3, "no conversation has an answer", "chat.jsonl"),
        ([talk(1)], "too few conversations", "chat.jsonl"),
        ([], "no conversation", "chat.jsonl"),
    ],
)
def test_what_is_bad_is_named_and_nothing_is_left(
    tmp_path: Path, template: Template, home: Path, lines: Lines, words: str, place: str
) -> None:
    with pytest.raises(SiliconError) as caught:
        prepared(template, written(tmp_path, lines))
    assert words in caught.value.what and place in caught.value.where
    assert not list((home / "data").glob("*")) or not (home / "data" / "talks").exists()
    assert not list((home / "data").glob(".*"))


# --- the built-in set ------------------------------------------------------------------------------------------------


def test_the_built_in_set_has_right_answers_and_asks_nothing_twice() -> None:
    asked = list(tasks.conversations(3000))
    questions = [question.content for _, (question, _) in asked]
    assert len(set(questions)) == 3000
    assert {task for task, _ in asked} == {"arithmetic", "spelling", "counting", "facts"}
    facts = dict.fromkeys(answer for _, answer in tasks.read_facts())
    for task, (question, answer) in asked:
        words = question.content.rstrip("?.").split()
        if task == "arithmetic":
            sign = {"+": 1, "-": -1}[words[3]]
            assert int(answer.content) == int(words[2]) + sign * int(words[4])
        elif task == "spelling":
            assert answer.content.replace("-", "") == words[-1]
        elif task == "counting":
            assert int(answer.content) == words[-1].count(words[4])
        else:
            assert answer.content in facts


def test_the_built_in_set_is_the_same_for_a_seed() -> None:
    assert list(tasks.conversations(200)) == list(tasks.conversations(200))
    assert list(tasks.conversations(200)) != list(tasks.conversations(200, seed=2))


def test_questions_are_held_out(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "QUESTIONS", 400)
    list(prepare_chat(["chat"], "talks", template))
    with open_dataset("talks") as dataset:
        held_out = read_questions(dataset)
        text = dataset.tokenizer.decode(dataset.train.read(0, dataset.train.count).tolist())
        assert sum(map(len, held_out.values())) == dataset.card["splits"]["val"]["documents"] == 40
        assert not any(asked[0].content in text for questions in held_out.values() for asked in questions)


def test_facts_can_be_edited(home: Path) -> None:
    assert tasks.read_facts() and tasks.facts_path() == home / "facts.toml"
    tasks.facts_path().write_text('[[fact]]\nquestions = ["Who?"]\nanswer = "Me."\n')
    assert tasks.read_facts() == [(["Who?"], "Me.")]


@pytest.mark.parametrize("text", ["[[fact]]\n", "x", '[[fact]]\nquestions = []\nanswer = "x"', "fact = 3"])
def test_bad_facts_are_named(home: Path, text: str) -> None:
    home.mkdir()
    tasks.facts_path().write_text(text)
    with pytest.raises(SiliconError) as caught:
        tasks.read_facts()
    assert caught.value.where == str(tasks.facts_path())
