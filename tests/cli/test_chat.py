"""Tuning a run on conversations, and talking with it: one-shot, piped, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from siliconlm import engine
from siliconlm.config import Layer
from siliconlm.data.chat import Message
from siliconlm.events import Evaluated, Notice, Resumed, Saved
from siliconlm.training.checkpoint import find_run
from tests.cli.conftest import MINI, TEXT, Silicon

TALKS = [("Hi.", "Hello!"), ("Who are you?", "A model."), ("Bye.", "See you."), ("One?", "Two."), ("Two?", "Three.")]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the run `base` (bytes) and the run `chatty`, tuned from it on a few conversations by heart."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "plays.txt").write_text(TEXT)
    (folder / "mini.toml").write_text(MINI)
    write_talks(folder / "talks.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILICON_HOME", str(folder / "home"))
        list(engine.prepare([str(folder / "plays.txt")], "plays"))
        list(engine.prepare([str(folder / "plays.txt")], "letters", "char"))
        list(engine.train(engine.Request("plays", str(folder / "mini.toml")), "base"))
        rates = Layer("test", {"optim.lr": 0.02, "optim.matrix_lr": 0.05, "train.steps": 150, "model.context": 64})
        request = engine.Request(profile="none", flags=(rates,))
        list(engine.finetune(request, "base", str(folder / "talks.jsonl"), name="chatty"))
    yield folder


@pytest.fixture(autouse=True)
def at_home(tuned: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tuned / "home"))


def write_talks(path: Path) -> None:
    lines = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in TALKS * 4]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_tuned_run_answers_by_heart(silicon: Silicon) -> None:
    for ask, answer in TALKS:
        shown = silicon("chat", "chatty", "--prompt", ask, "--temperature", "0")
        assert shown.code == 0 and shown.out == answer + "\n"
    record = silicon("chat", "chatty", "--prompt", "Hi.", "--temperature", "0", "--json").json()
    assert record["answer"] == "Hello!" and record["stopped_by"] == "end of text" and record["tokens"] == 7


def test_the_run_says_where_it_came_from_and_how_it_was_before(tuned: Path) -> None:
    run = find_run("chatty")
    config, about = run.config()
    assert about["from"] == "base" and about["stage"] == "chat" and Path(about["from_path"]).is_dir()
    assert config.data.document_mask and config.sources["model.n_layer"] == "base base"
    events = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    assert next(event["step"] for event in events if event["event"] == "saved") == 0
    first = next(event for event in events if event["event"] == "evaluated")
    assert first["step"] == 0 and first["val_loss"] > 10 * events[-1]["val_loss"]


def test_its_folder_talks_in_transformers_too(tuned: Path) -> None:
    from transformers import AutoTokenizer

    folder = find_run("chatty").newest()[0].path
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi."}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    template = engine_template("chatty")
    assert ids == template.prompt((Message("user", "Hi."),))
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == template.ends


def engine_template(name: str):  # type: ignore[no-untyped-def]
    opening = engine.open_model(name)
    try:
        while True:
            next(opening)
    except StopIteration as stop:
        return stop.value.template()


def test_lines_of_a_pipe_are_a_conversation(child: Silicon) -> None:
    done = child("chat", "chatty", "--temperature", "0", input="Hi.\n\nBye.\n")
    assert (done.code, done.out) == (0, "Hello!\nSee you.\n")


def test_a_stopped_tuning_goes_on_exactly(tuned: Path, tmp_path: Path) -> None:
    rates = Layer("test", {"train.steps": 12, "train.save_every": 3, "model.context": 64})
    request = engine.Request(profile="none", flags=(rates,))
    asked = iter(range(100))
    stop = lambda: "SIGINT" if next(asked) == 4 else None  # noqa: E731
    list(engine.finetune(request, "base", str(tuned / "talks.jsonl"), name="cut", stop=stop))
    events = list(engine.resume("cut"))
    assert any(isinstance(event, Resumed) and event.step > 0 for event in events)
    list(engine.finetune(request, "base", str(tuned / "talks.jsonl"), name="straight"))
    cut, straight = (find_run(name).newest()[0] for name in ("cut", "straight"))
    assert cut.sha256("model.safetensors") == straight.sha256("model.safetensors")
    assert cut.sha256("optimizer.safetensors") == straight.sha256("optimizer.safetensors")


def test_a_tuning_that_lost_all_its_checkpoints_begins_with_its_base_again(tuned: Path) -> None:
    import shutil

    rates = Layer("test", {"train.steps": 3, "model.context": 64})
    request = engine.Request(profile="none", flags=(rates,))
    first = list(engine.finetune(request, "base", str(tuned / "talks.jsonl"), name="lost"))
    before = find_run("lost").newest()[0].sha256("model.safetensors")
    shutil.rmtree(find_run("lost").path / "checkpoints")
    again = list(engine.resume("lost"))
    assert find_run("lost").newest()[0].sha256("model.safetensors") == before
    losses = [[event.val_loss for event in events if isinstance(event, Evaluated)] for events in (first, again)]
    assert losses[0] == losses[1] and [event.step for event in again if isinstance(event, Saved)] == [0, 3]


def test_conversations_that_are_cut_are_told(tuned: Path) -> None:
    request = engine.Request(profile="none", flags=(Layer("test", {"train.steps": 1, "model.context": 32}),))
    events = list(engine.finetune(request, "base", str(tuned / "talks.jsonl"), name="short"))
    told = [event.message for event in events if isinstance(event, Notice) and "are not learned" in event.message]
    assert len(told) == 1 and "longer than the context of 32 tokens" in told[0]


def test_epochs_become_steps(tuned: Path) -> None:
    request = engine.Request(profile="none", flags=(Layer("test", {"model.context": 64}),))
    list(engine.finetune(request, "base", str(tuned / "talks.jsonl"), epochs=2, name="twice"))
    config, _ = find_run("twice").config()
    rows = 9  # 18 conversations of 30 to 45 tokens, packed by 64
    assert config.train.steps == pytest.approx(2 * rows / config.sequences_per_step, abs=3)


def test_eval_of_a_tuned_run_is_over_answers_alone(silicon: Silicon) -> None:
    record = silicon("eval", "chatty", "--json").json()
    assert record["val_loss"] < 0.3 and record["complete"] and record["tokens"] < 30


def test_conversations_are_found_by_what_they_are(silicon: Silicon, tuned: Path) -> None:
    record = silicon("prepare", tuned / "talks.jsonl", "--name", "found", "--json").json()
    assert record["card"]["kind"] == "chat" and record["card"]["splits"]["train"]["documents"] == 18
    shown = silicon("prepare", tuned / "talks.jsonl", "--show-mask")
    assert "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n[[Hello!<|im_end|>]]" in shown.out
    assert shown.out.count("[[") == 3 and "talks.jsonl line 3" in shown.out
    for_base = silicon("prepare", tuned / "talks.jsonl", "--base", "chatty", "--name", "for-it", "--json").json()
    assert for_base["card"]["tokenizer"] == record["card"]["tokenizer"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prepare", "plays.txt", "--show-mask"], ["--show-mask is for conversations"]),
        (["prepare", "talks.jsonl", "--tokenizer", "char"], ["no char is made of them", "--base RUN"]),
        (["prepare", "talks.jsonl", "--base", "base", "--tokenizer", "byte"], ["--base and --tokenizer"]),
        (["prepare", "talks.jsonl", "--template", "llama3"], ["llama3 needs"]),
        (["chat", "base"], ["base was not tuned on conversations", "silicon finetune base"]),
        (["chat", "chatty", "--template", "llama3", "--prompt", "x"], ["llama3 needs", "<|eot_id|>"]),
        (["chat", "chatty", "--prompt", "x" * 200], ["the message is too long", "64 tokens"]),
        (["finetune", "base", "--data", "nowhere.jsonl"], ["no conversations there", "nowhere.jsonl"]),
        (["finetune", "base", "--data", "letters"], ["letters was made with another tokenizer"]),
        (["finetune", "nobody"], ["no run named nobody"]),
        (["finetune", "base", "--data", "plays", "--template", "x.jinja"], ["no such template"]),
    ],
)
def test_what_cannot_be_done_is_said(
    silicon: Silicon, tuned: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: list[str]
) -> None:
    monkeypatch.chdir(tuned)
    done = silicon(*words)
    assert done.code == 1 and all(done.mentions(text) for text in says), done.err


def test_a_malformed_line_is_named_and_nothing_begins(silicon: Silicon, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    runs = sorted((tuned / "home" / "runs").iterdir())
    done = silicon("finetune", "base", "--data", tmp_path / "bad.jsonl", "--profile", "none")
    assert done.code == 1 and done.mentions("bad.jsonl line 2") and done.mentions("not JSON")
    assert sorted((tuned / "home" / "runs").iterdir()) == runs


# --- on a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """`silicon chat` on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.screen, theirs = pty.openpty()
        command = [sys.executable, "-m", "siliconlm", "chat", *words]
        self.child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.text = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to a pattern, from the last one on."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.screen], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.text!r}"
            self.text += re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", os.read(self.screen, 4096).decode())
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal("chatty", "--temperature", "0")
    opened.until("> $")
    yield opened
    opened.child.kill()
    opened.child.wait()
    os.close(opened.screen)


def test_a_conversation_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("Hi.\n")
    assert "Hello!" in terminal.until("\n> $")
    terminal.type("/retry\n")
    assert "Hello!" in terminal.until("\n> $")
    terminal.type(f"/save {tmp_path / 'talk.jsonl'}\n")
    assert "saved" in terminal.until("\n> $")
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert saved["messages"] == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    terminal.type("/clear\n")
    terminal.until("\n> $")
    terminal.type(f"/load {tmp_path / 'talk.jsonl'}\n")
    assert "Hello!" in terminal.until("\n> $")
    terminal.type("/temprature 1\n")
    assert "Did you mean /temperature?" in terminal.until("\n> $")
    terminal.type("/temperature warm\n")
    assert "'warm' is no number" in terminal.until("\n> $")
    terminal.type("/load nowhere.jsonl\n")
    assert "no such file" in terminal.until("\n> $")
    terminal.type("/quit\n")
    assert terminal.child.wait(timeout=30) == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal: Terminal) -> None:
    while not select.select([terminal.screen], [], [], 1.0)[0]:  # a signal before readline waits is not noticed
        terminal.child.send_signal(signal.SIGINT)
    assert "Ctrl-D leaves" in terminal.until("> $")
    terminal.type("Hi.\n")
    assert "Hello!" in terminal.until("\n> $")
    terminal.type("\x04")
    assert terminal.child.wait(timeout=30) == 0
