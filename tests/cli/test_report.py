"""Reports are pure readings of run folders: real runs made by the engine, and logs written by hand for what is rare."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from siliconlm import events as ev
from siliconlm.cli.page import write_pages
from siliconlm.cli.report import Report, read_report
from siliconlm.config import Layer, resolve, write_run
from siliconlm.data.dataset import open_dataset
from siliconlm.data.prepare import prepare
from siliconlm.training.checkpoint import RunFolder, read_checkpoint, runs_folder

if TYPE_CHECKING:
    from .conftest import Silicon, Trained

EVIL = '<script>alert(1)</script> & "<img src=x onerror=alert(2)>" `a` | *b*'
LEGEND = "M2 4H22"
EMPTY_TAGS = {"meta", "input", "br"}
STARTED = ev.Started(
    "run", "/runs/run", "plays", "cpu float32", 1000, 2, 2, 64, 16, "100 steps", machine="Abacus, 2 cores"
)


class Page(HTMLParser):
    """A page as a browser would see it: its tags and attributes, and the text between them. Tags must be balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def styled(self, style: str) -> list[str]:
        """The paths of a style in all charts, without those in their legends."""
        found = (attrs for tag, attrs in self.tags if tag == "path" and attrs.get("class") == style)
        return [d for attrs in found if (d := str(attrs["d"])) != LEGEND]


def pages(name: str | None = None) -> tuple[Page, str]:
    html, markdown = write_pages([read_report(name)], None)
    return Page(html.read_text()), markdown.read_text()


Write = Callable[..., RunFolder]


@pytest.fixture
def write(home: Path) -> Write:
    """A run folder by hand: events are written as the engine does, ten seconds apart; text as it is."""

    def make(name: str, *lines: ev.Event | str, about: dict[str, Any] | None = None, **settings: Any) -> RunFolder:
        folder = runs_folder() / name
        (folder / "checkpoints").mkdir(parents=True)
        values = {key.replace("__", "."): value for key, value in settings.items()}
        config = resolve(Layer("by hand", {"train.steps": 100, "data.name": "plays"} | values))
        write_run(folder / "run.toml", config, about or {"dataset": "/nowhere", "data": "1"})
        records = [
            line if isinstance(line, str) else json.dumps({**line.as_json(), "at": 1_800_000_000 + 10 * number}) + "\n"
            for number, line in enumerate(lines)
        ]
        (folder / "log.jsonl").write_text("".join(records))
        return RunFolder(folder)

    return make


def steps(first: int, last: int, loss: float = 3.0) -> list[ev.Event]:
    """Steps of 64 tokens and a second each, told of at their end."""
    taken: list[ev.Event] = [ev.Step(step, 64 * step, loss - 0.01 * step, 1.0, 1.0) for step in range(first, last + 1)]
    return [*taken, ev.Progress(last, 64 * last, 2.0, 64.0, 5_000_000, last / 100, float(last), None)]


def evaluated(step: int, loss: float, complete: bool = False) -> ev.Evaluated:
    return ev.Evaluated(step, loss, loss / math.log(2), 1000, complete)


def finished(step: int, reason: str, seconds: float) -> ev.Finished:
    return ev.Finished("run", "/runs/run", step, 64 * step, seconds, reason, None, None, False, 64.0)


# --- a real run ------------------------------------------------------------------------------------------------------


def test_a_report_has_the_numbers_of_the_run(trained: Trained) -> None:
    report = read_report("whole")
    log = [json.loads(line) for line in (trained.home / "runs" / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if record["event"] == "step"]
    assert report.state == "done" and report.step == 8 and report.tokens == 8 * 64
    assert report.loss.values == losses and report.loss.tokens == [64 * step for step in range(1, 9)]
    assert report.seconds == log[-1]["seconds"] and report.loss.seconds[-1] <= report.seconds
    last = [record for record in log if record["event"] == "evaluated"][-1]
    assert report.last is not None and report.last.complete and report.last.tokens == 8 * 64
    assert (report.last.val_loss, report.last.val_bpb) == (last["val_loss"], last["val_bpb"])
    manifests = [read_checkpoint(path).manifest for path in trained.checkpoints("whole")]
    assert [kept.step for kept in report.checkpoints] == [manifest["step"] for manifest in manifests] == [8, 4]
    on_disk = sum(path.stat().st_size for path in trained.checkpoints("whole")[0].iterdir())
    assert 0 <= on_disk - report.checkpoints[0].bytes < 4096, "all but the manifest itself"
    assert sum(kept.best for kept in report.checkpoints) == 1
    with open_dataset("plays") as dataset:
        assert report.card == dataset.card
    values = {setting.name: (setting.value, setting.source) for setting in report.settings}
    assert values["train.seed"] == (3, "--seed") and values["model.n_ff"][0] == 64
    assert {setting.name for setting in report.settings if setting.changed} >= {"train.seed", "model.n_ff"}
    assert not {"optim.lr", "train.tokens"} & {setting.name for setting in report.settings if setting.changed}


def test_the_machine_stands_in_the_log(trained: Trained) -> None:
    words = read_report("whole").started["machine"]
    assert re.fullmatch(r".+, \d+ cores?.*, \d+ GiB, .+; Python 3\.\d+\.\d+, torch 2\.\S+", words)


def test_a_finished_run_has_written_two_texts(trained: Trained) -> None:
    log = [json.loads(line) for line in (trained.home / "runs" / "whole" / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in log[-3:]] == ["example", "example", "finished"]
    bare, prompted = read_report("whole").examples
    with open_dataset("plays") as dataset:
        text = dataset.tokenizer.decode(dataset.val.read(0, dataset.val.count).tolist())
    assert bare["prompt"] == "" and prompted["prompt"] in text.split("\n") and prompted["prompt"].strip()
    assert bare["step"] == prompted["step"] == 8 and bare["text"] != prompted["text"]


def test_examples_are_what_silicon_sample_says(silicon: Silicon, trained: Trained) -> None:
    """The same weights, the same seed: nothing of training is in them."""
    words = ["--run", "whole", "--max-tokens", "120", "--seed", "1", "--json"]
    for example in read_report("whole").examples:
        text = silicon("sample", example["prompt"], *words).json()["samples"][0]["text"]
        assert text == example["prompt"] + example["text"]


def test_a_stopped_run_has_written_none(trained: Trained) -> None:
    report = read_report("cut")
    assert report.state == "SIGINT" and report.examples == []
    assert [(session.first_step, session.last_step) for session in report.sessions] == [(0, 6)]


def test_no_text_is_written_past_a_deadline(silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept back here, so that the deadline has come when training ends."""
    monkeypatch.setattr("siliconlm.engine.training.EXAMPLE_SHARE", 0.0)
    words = ["--preset", own.preset, "--data", "plays", "--name", "late", "--profile", "none"]
    assert silicon("train", *words, "--time", "0.2s").code == 0
    report = read_report("late")
    assert report.state == "done" and report.examples == []


def test_the_page_of_a_run(silicon: Silicon, own: Trained) -> None:
    done = silicon("report", "whole")
    folder = own.home / "runs" / "whole"
    assert done.out == f"written: {folder / 'report.html'}\nwritten: {folder / 'report.md'}\n"
    page, markdown = Page((folder / "report.html").read_text()), (folder / "report.md").read_text()
    report = read_report("whole")
    assert report.last is not None
    loss = f"{report.last.val_loss:.4f}"
    for text in (page.text, markdown):
        assert loss in text and report.sentence in text and "train.seed" in text and "the whole split" in text
    assert len(page.styled("train")) == 3 + 3, "three views of the loss, and three small charts"
    assert len(page.styled("val dot")) == 3 * len(report.evaluations)
    assert markdown.count("\n```text\n") == 3, "the plot and two texts"
    assert not (folder / "checkpoints" / "report.html").exists()


def test_a_page_needs_nothing_from_outside(own: Trained) -> None:
    page, _ = pages("whole")
    source = (own.home / "runs" / "whole" / "report.html").read_text()
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert not re.search(r"url\(|@import|https?:", source)


def test_reports_change_nothing_but_themselves(silicon: Silicon, own: Trained) -> None:
    before = own.files()
    assert silicon("report", "whole").code == 0 and silicon("report", "whole").code == 0
    after = own.files()
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"runs/whole/report.html", "runs/whole/report.md"}


def test_a_report_as_json(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    told = silicon("report", "whole", "cut", "--output", tmp_path / "here", "--json").json()
    assert [Path(page).name for page in told["pages"]] == ["comparison.html", "comparison.md"]
    assert [(run["run"], run["state"], run["step"]) for run in told["runs"]] == [
        ("whole", "done", 8),
        ("cut", "SIGINT", 6),
    ]
    assert told["runs"][0]["evaluations"][-1]["complete"] is True


@pytest.mark.parametrize(
    ("output", "expected"),
    [("here.html", "here"), ("here.md", "here"), ("sub/here.html", "sub/here"), ("folder", "folder/report")],
)
def test_where_pages_go(silicon: Silicon, own: Trained, tmp_path: Path, output: str, expected: str) -> None:
    assert silicon("report", "whole", "--output", output).code == 0
    assert (tmp_path / f"{expected}.html").is_file() and (tmp_path / f"{expected}.md").is_file()


def test_a_page_does_not_replace_what_is_no_page(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = silicon("report", "whole", "--output", "notes.txt")
    assert done.code == 1 and "is a file, and no page" in done.err and (tmp_path / "notes.txt").read_text() == "mine"


def test_the_latest_run_and_an_unknown_one(silicon: Silicon, own: Trained, home: Path) -> None:
    assert silicon("report").out.startswith(f"written: {home / 'runs' / 'whole'}")
    done = silicon("report", "whoel")
    assert done.code == 1 and "no run named whoel" in done.err and "Did you mean whole?" in done.err


# --- odd logs --------------------------------------------------------------------------------------------------------


def test_a_run_that_has_only_a_folder(write: Write) -> None:
    write("young")
    page, markdown = pages("young")
    assert read_report("young").state == "not begun"
    for text in (page.text, markdown):
        assert "it was not evaluated yet" in text and "nan" not in text.lower() and "None" not in text
    assert not page.styled("train")


def test_a_run_that_was_not_evaluated_yet_and_whose_last_line_is_torn(write: Write) -> None:
    write("young", STARTED, *steps(1, 1), '{"event": "step", "st')
    report = read_report("young")
    assert report.state == "interrupted" and report.step == 1 and report.last is None
    page, markdown = pages("young")
    assert page.styled("train") and "nan" not in page.text.lower() and "nan" not in markdown
    assert all("nan" not in path and "inf" not in path for path in page.styled("train"))


def test_what_a_resume_took_back_is_not_counted(write: Write) -> None:
    write(
        "twice",
        STARTED,
        *steps(1, 20),
        evaluated(20, 2.5),
        *steps(21, 40, loss=9.0),
        ev.Notice("slower than <was> measured", "warning"),
        STARTED,
        ev.Resumed(20, "step-20"),
        *steps(21, 50),
        evaluated(50, 2.2),
        finished(50, "SIGTERM", 50.5),
        STARTED,
        ev.Resumed(50, "step-50"),
        *steps(51, 100),
        evaluated(100, 2.0, complete=True),
        finished(100, "done", 101.0),
    )
    report = read_report("twice")
    assert report.loss.values == pytest.approx([3.0 - 0.01 * step for step in range(1, 101)])
    assert report.loss.seconds == pytest.approx(range(1, 101))
    assert (report.seconds, report.tokens) == (101.0, 6400)
    ended = [(session.first_step, session.last_step, session.ended_by) for session in report.sessions]
    assert ended == [(0, 20, "interrupted"), (20, 50, "SIGTERM"), (50, 100, "done")]
    page, markdown = pages("twice")
    assert "slower than <was> measured" in page.text and "slower than \\<was\\> measured" in markdown
    assert "in 3 sessions" in page.text and "SIGTERM" in markdown
    assert [warning["at"] for warning in report.warnings] == [1_800_000_440]


def test_a_run_that_trains_now_says_so(write: Write) -> None:
    run = write("busy", STARTED, *steps(1, 5))
    with run.lock():
        assert read_report("busy").state == "running"
    assert read_report("busy").state == "interrupted"


def test_no_text_of_a_run_becomes_markup(write: Write) -> None:
    run = write(
        "evil",
        ev.Started(EVIL, "/", EVIL, EVIL, 1000, 2, 2, 64, 16, EVIL, machine=EVIL),
        *steps(1, 3),
        evaluated(3, 2.0),
        ev.Notice(EVIL, "warning"),
        ev.Scored(3, EVIL, 1, 2, 0.5),
        ev.Example(3, EVIL, EVIL + "\n```\n# heading"),
        about={"dataset": EVIL, "data": "1", "from": EVIL, "stage": EVIL, "versions": {"siliconlm": EVIL}},
        data__name=EVIL,
    )
    run = RunFolder(run.path.rename(run.path.with_name("<i>evil")))
    page, markdown = pages(str(run.path))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 10 and "<i>evil" in page.text
    outside = re.sub(r"(`{4,})text\n.*?\n\1", "", markdown, flags=re.DOTALL)
    assert "alert(1)" in outside and not re.search(r"(?<!\\)<(script|img|i)", outside)
    assert len(re.findall(r"^# ", outside, re.MULTILINE)) == 1
    comparison, _ = write_pages([read_report(str(run.path))] * 2, str(run.path))
    assert "script" not in {tag for tag, _ in Page(comparison.read_text()).tags}


def test_a_damaged_checkpoint_is_named(own: Trained) -> None:
    (own.checkpoints("whole")[0] / "MANIFEST.json").write_text("{}")
    report = read_report("whole")
    assert report.checkpoints[0].step == 8 and "damaged" in report.checkpoints[0].damage
    assert "damaged checkpoint" in pages("whole")[0].text


def test_what_was_found_out_after_training_counts(write: Write) -> None:
    run = write("tasks", STARTED, *steps(1, 6), evaluated(3, 2.5), evaluated(6, 2.0), finished(6, "done", 6.0))
    after = [ev.Scored(6, "sums", 7, 8, 1.0), evaluated(3, 2.4, True), ev.Measured(6, "hellaswag", "acc", 0.25, 100)]
    for event in after:
        run.record(event)
    report = read_report("tasks")
    assert [(point.step, point.val_loss) for point in report.evaluations] == [(3, 2.5), (3, 2.4), (6, 2.0)]
    assert report.state == "done" and report.sessions[-1].ended < 1_800_001_000 and report.stages[-1].after is not None
    assert report.stages[-1].after["val_loss"] == 2.0
    page, markdown = pages("tasks")
    assert "7 of 8" in page.text and "hellaswag" in page.text
    assert "| hellaswag | acc | 0.2500 | 100 | 6 |" in markdown


def test_a_loss_on_other_data_is_not_the_runs(silicon: Silicon, own: Trained) -> None:
    assert silicon("eval", "whole").code == 0 and len(read_report("whole").evaluations) == 3
    again = ["prepare", own.text, "--name", "other", "--tokenizer", own.home / "data" / "plays" / "tokenizer.json"]
    assert silicon(*again, "--val-fraction", "0.2").code == 0
    assert silicon("eval", "whole", "--data", "other").code == 0
    assert len(read_report("whole").evaluations) == 3


def test_a_model_that_was_taught_to_talk_answers_held_out_questions(
    silicon: Silicon, own: Trained, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 20)
    words = ["--steps", "1", "--profile", "none"]
    assert silicon("prepare", own.text, "--name", "inbytes").code == 0
    assert silicon("train", "--data", "inbytes", "--preset", own.preset, "--name", "base", *words).code == 0
    assert silicon("finetune", "base", "--data", "talks.jsonl", "--name", "untold", *words).code == 0
    data = read_report("untold").started["dataset"]
    assert read_report("untold").examples == [], "nothing says which questions are held out"
    held_out = {"greeting": [[["user", "Hi."], ["assistant", "Hello!"]]]}
    (own.home / "data" / data / "questions.json").write_text(json.dumps(held_out))
    assert silicon("finetune", "base", "--data", data, "--name", "told", *words).code == 0
    report = read_report("told")
    assert [stage.run for stage in report.stages] == ["base", "told"] and report.is_chat
    assert report.stages[-1].before is not None and report.stages[0].after is not None
    assert {example["prompt"] for example in report.examples} <= {"Hi."}
    page, markdown = pages("told")
    assert ("A held-out question" in page.text) == ("Asked: Hi." in markdown) == bool(report.examples)


def test_scores_and_the_last_texts(write: Write) -> None:
    told = [ev.Example(2, "", "old"), ev.Example(3, "", "new"), ev.Example(3, "", "new again"), ev.Example(3, "p", "q")]
    write("tasks", STARTED, *steps(1, 3), ev.Scored(2, "sums", 3, 12, 1.0), ev.Scored(3, "sums", 9, 12, 1.0), *told)
    report = read_report("tasks")
    assert [(example["prompt"], example["text"]) for example in report.examples] == [("", "new again"), ("p", "q")]
    page, markdown = pages("tasks")
    assert "9 of 12" in page.text and "75.0 %" in page.text and "| sums | 3 | 9 of 12 | 75.0 % | 1.0 |" in markdown


# --- the dataset's card ----------------------------------------------------------------------------------------------


def prepared(tmp_path: Path, entropy: bool = True) -> dict[str, Any]:
    """A dataset in bytes with letters of two bytes, and what a run's [about] says of it."""
    (tmp_path / "text.txt").write_text("Über den Fluß. " * 100)
    list(prepare([str(tmp_path / "text.txt")], "plays"))
    path = runs_folder().parent / "data" / "plays"
    card = json.loads((path / "dataset.json").read_text())
    if entropy:
        card["entropy_floor"] = {"grammar": 1.25, "val": 1.0}
        (path / "dataset.json").write_text(json.dumps(card))
    with open_dataset("plays") as dataset:
        return {"dataset": str(path), "data": dataset.fingerprint}


def test_the_distance_from_the_floor_is_per_character(write: Write, tmp_path: Path) -> None:
    about = prepared(tmp_path)
    write("near", STARTED, *steps(1, 3), ev.Evaluated(3, 1.0, 2.0, 150, True), about=about)
    floor = read_report("near").floor
    with open_dataset("plays") as dataset:
        val = dataset.card["splits"]["val"]
        text = dataset.tokenizer.decode(dataset.val.read(0, dataset.val.count).tolist())
    assert floor is not None and val["bytes"] == len(text.encode()) > len(text)
    assert floor.reached == pytest.approx(2.0 * math.log(2) * len(text.encode()) / len(text))
    assert (floor.text, floor.grammar) == (1.0, 1.25)
    assert floor.per_token == pytest.approx(len(text) / len(text.encode())), "a token is a byte"
    page, markdown = pages("near")
    distance = f"{floor.reached - 1:.4f}"
    assert distance in page.text and distance in markdown and len(page.styled("floor")) == 3


def test_a_card_of_other_data_is_not_believed(write: Write, tmp_path: Path) -> None:
    about = prepared(tmp_path) | {"data": "what it was before"}
    write("moved", STARTED, *steps(1, 3), evaluated(3, 2.0), about=about)
    report = read_report("moved")
    assert report.card is None and report.floor is None
    assert "plays (no longer there as it was)" in pages("moved")[0].text


# --- stages ----------------------------------------------------------------------------------------------------------


def test_the_stages_that_led_to_a_run(write: Write) -> None:
    base = write("base", STARTED, *steps(1, 5), evaluated(5, 2.5, True))
    told = [evaluated(0, 3.5), *steps(1, 7), evaluated(7, 2.0, True), ev.Scored(7, "sums", 3, 4, 1.0)]
    about = {"dataset": "/nowhere", "data": "2", "from": "base", "stage": "text"}
    write("middle", STARTED, *told, about=about | {"from_path": str(base.path / "checkpoints" / "step-000000005")})
    write("last", STARTED, *told, about=about | {"from": "middle", "stage": "chat"})
    stages = read_report("last").stages
    assert [(stage.run, stage.kind, stage.tokens) for stage in stages] == [
        ("base", "pretraining", 320),
        ("middle", "text", 448),
        ("last", "chat", 448),
    ]
    assert stages[0].before is None and stages[1].before is not None and stages[1].before["val_loss"] == 3.5
    page, markdown = pages("last")
    assert page.text.index("base") < page.text.index("middle") and "sums: 3 of 4" in page.text
    assert "| middle | text | plays | 448 | 3.5000 | 2.0000 | sums 3 of 4 |" in markdown
    assert "Stages" not in pages("base")[0].text


def test_a_stage_that_is_no_run_and_one_that_began_with_itself(write: Write, tmp_path: Path) -> None:
    about = {"dataset": "/nowhere", "data": "2", "from": "gone", "from_path": "/no/such/folder", "stage": "chat"}
    write("orphan", STARTED, *steps(1, 2), about=about)
    assert [(stage.run, stage.found) for stage in read_report("orphan").stages] == [("gone", False), ("orphan", True)]
    assert "no longer there" in pages("orphan")[0].text
    about["from_path"] = str(tmp_path)
    write("adopted", STARTED, *steps(1, 2), about=about)
    assert read_report("adopted").stages[0].kind == "a model folder"
    write("snake", STARTED, *steps(1, 2), about=about | {"from": "snake", "from_path": "/no"})
    assert [stage.found for stage in read_report("snake").stages] == [False, True]


# --- runs side by side -----------------------------------------------------------------------------------------------


def compared(tmp_path: Path, *names: str) -> tuple[Page, str]:
    html, markdown = write_pages([read_report(name) for name in names], str(tmp_path / "out"))
    return Page(html.read_text()), markdown.read_text()


def test_the_best_of_two_runs_is_bold_where_they_can_be_compared(write: Write, tmp_path: Path) -> None:
    write("a", STARTED, *steps(1, 5), evaluated(5, 2.5, True), ev.Scored(5, "sums", 3, 4, 1.0))
    write("b", STARTED, *steps(1, 9), evaluated(9, 2.25, True), ev.Scored(9, "sums", 1, 2, 1.0), train__seed=5)
    page, markdown = compared(tmp_path, "a", "b")
    assert "| validation loss (nats per token) | 2.5000 | **2.2500** |" in markdown
    assert "| sums | **3 of 4** | 1 of 2 |" in markdown and "| steps | 5 | 9 |" in markdown
    assert markdown.count("`train.") == 1 and "| `train.seed` | 1 (default) | 5 (by hand) |" in markdown
    assert len(page.styled("run-0 thin")) == len(page.styled("run-1 thin")) == 3
    assert len(page.styled("run-0 dot")) == len(page.styled("run-1 dot")) == 3


def test_losses_on_other_data_are_not_held_against_each_other(write: Write, tmp_path: Path) -> None:
    write("a", STARTED, *steps(1, 5), evaluated(5, 2.5))
    write("b", STARTED, *steps(1, 5), evaluated(5, 2.25, True), about={"dataset": "/elsewhere", "data": "2"})
    write("c", STARTED)
    _, markdown = compared(tmp_path, "a", "b", "c")
    assert "| validation loss (nats per token) | 2.5000 on a part | 2.2500 | - |" in markdown
    assert "**" not in markdown and "None." in markdown


def test_bits_per_byte_can_be_compared_between_tokenizers(own: Trained, silicon: Silicon, tmp_path: Path) -> None:
    assert silicon("prepare", own.text, "--name", "inbytes").code == 0
    words = ["--preset", own.preset, "--data", "inbytes", "--name", "bytes", "--set", "train.eval_tokens=512"]
    assert silicon("train", *words).code == 0
    _, markdown = compared(tmp_path, "whole", "bytes")
    rows = {line.split(" | ")[0].strip("| "): line for line in markdown.splitlines() if line.startswith("|")}
    assert "**" in rows["bits per byte"] and "**" not in rows["validation loss (nats per token)"]


# --- on the terminal -------------------------------------------------------------------------------------------------


def test_one_run_on_the_terminal(silicon: Silicon, trained: Trained) -> None:
    shown = silicon("runs", "whole").out
    report = read_report("whole")
    assert shown.startswith("whole: done\n") and report.sentence in shown and "checkpoint 8: " in shown
    assert "⠀" not in shown and "●" not in shown
    told = silicon("runs", "whole", "--json").json()
    assert told["run"] == "whole" and told["tokens"] == 512 and "loss" not in told


def test_a_plot_in_a_pipe_has_80_columns_and_no_colours(child: Silicon, trained: Trained) -> None:
    done = child("runs", "whole", "--plot")
    assert done.code == 0 and done.err == "" and "\x1b" not in done.out
    plot = [line for line in done.out.splitlines() if "│" in line or "└" in line]
    assert len(plot) == 17 and max(map(len, plot)) <= 80
    assert any("●" in line for line in plot) and any(0x2800 < ord(char) < 0x2900 for line in plot for char in line)


def test_plots_of_the_latest_run_and_of_one_without_steps(silicon: Silicon, own: Trained, write: Write) -> None:
    assert silicon("runs", "--plot").out.startswith("whole: done")
    write("young")
    done = silicon("runs", "young", "--plot")
    assert done.code == 0 and done.out.startswith("young: not begun") and "│" not in done.out


def test_what_a_report_is_made_of_is_plain(trained: Trained) -> None:
    report: Report = read_report("cut")
    assert json.loads(json.dumps(report.as_json()))["run"] == "cut"
