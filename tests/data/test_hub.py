"""What the hub has comes as local files; what it has not, or will not give, is one line. The hub is a server here."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from siliconlm.data.dataset import open_dataset
from siliconlm.data.hub import fetch_dataset, fetch_tokenizer
from siliconlm.data.prepare import prepare
from siliconlm.data.tokenizer import bpe_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Working

TEXTS = [f"{number}: To be, or not to be.\n" for number in range(60)]


class Hub:
    """The few answers of a hub that are needed. `status` of a repository other than 200 with its error code."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.status: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []

    def put(self, repo: str, *names: str, content: bytes = b'{"text": "To be"}') -> None:
        self.files |= {f"{repo}/{name}": content for name in names}

    def listing(self, repo: str) -> bytes | None:
        own = {name.removeprefix(f"{repo}/"): data for name, data in self.files.items() if name.startswith(f"{repo}/")}
        siblings = [{"rfilename": name, "size": len(data)} for name, data in own.items()]
        return json.dumps({"id": repo.removeprefix("datasets/"), "siblings": siblings}).encode() if own else None


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.hub.asked.append(f"{self.command} {path}")
        repo, resolve, name = path.partition("/resolve/main/")
        if resolve:
            self.answer(repo, self.hub.files.get(f"{repo}/{name}"))
        else:
            repo = path.removeprefix("api/").removeprefix("models/")
            self.answer(repo, self.hub.listing(repo))

    do_HEAD = do_GET

    def answer(self, repo: str, data: bytes | None) -> None:
        status, code = self.hub.status.get(repo, (200, "") if data is not None else (404, "RepoNotFound"))
        body = data if status == 200 and data is not None else b"{}"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    handler = type("Answers", (Handler,), {"hub": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{host.server_port}")
        yield state
        host.shutdown()


def fetched(word: str) -> tuple[list[str], list[Event]]:
    """The paths inside the repository, and what was told on the way."""
    events: list[Event] = []
    steps = fetch_dataset(word)
    while True:
        try:
            events.append(next(steps))
        except StopIteration as end:
            return [str(path).partition("c" * 40 + "/")[2] for path in end.value], events


def refused(word: str) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        fetched(word)
    assert caught.value.where == word and caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def test_a_split_is_fetched_once_and_prepared(hub: Hub) -> None:
    shards = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    for name, texts in zip(shards, (TEXTS[:30], TEXTS[30:]), strict=True):
        hub.put("datasets/o/n", name, content="\n".join(map(json.dumps, texts)).encode())
    hub.put("datasets/o/n", "README.md", "n.py", "data/validation-00000-of-00001.jsonl")
    for _ in range(2):
        events = list(prepare(["hf://datasets/o/n"], "mine", force=True))
        working = [event for event in events if isinstance(event, Working) and event.what == "downloading o/n"]
        assert working[0].done == 0 and working[-1].done == working[-1].total > 0
    gets = [asked for asked in hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert gets == [f"GET datasets/o/n/resolve/main/{name}" for name in shards], "data, no code, each once"
    with open_dataset("mine") as dataset:
        ids = [id for split in (dataset.train, dataset.val) for id in split.read(0, split.count).tolist()]
        assert dataset.tokenizer.decode(ids) == "".join(TEXTS)
        assert dataset.card["sources"][0]["given"] == "hf://datasets/o/n"


SPLITS = {
    "": ["data/train-00000-of-00001.parquet"],
    "/train": ["data/train-00000-of-00001.parquet"],
    "/test": ["data/test.jsonl"],
    "/data/test": ["data/test.jsonl"],
    "/data/test.jsonl": ["data/test.jsonl"],
    "/validation": ["validation/a.json", "validation/b.json"],
    "/sample/10BT": ["sample/10BT/000_00000.parquet", "sample/10BT/000_00001.parquet"],
    "/old/": ["old.txt"],
}
NAMES = [name for names in SPLITS.values() for name in names]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_a_word_in_the_paths(hub: Hub, split: str) -> None:
    hub.put("datasets/o/n", *reversed(NAMES), "README.md", "train.py", "old-train.txt", "trainer.json")
    assert fetched(f"hf://datasets/o/n{split}")[0] == SPLITS[split]


def test_a_split_that_is_not_there_lists_those_that_are(hub: Hub) -> None:
    hub.put("datasets/o/n", *NAMES, "train.py")
    error = refused("hf://datasets/o/n/trian")
    assert (
        error.what == "no split trian; there are: data/test, data/train, old, sample/10BT, validation/a, validation/b"
    )
    assert error.fix == "Type: silicon prepare hf://datasets/o/n/data/test"
    hub.put("datasets/o/code", "train.py", "train.csv")
    assert "no data files; looked for *.parquet" in refused("hf://datasets/o/code").what


def test_a_split_in_several_folders_must_be_chosen(hub: Hub) -> None:
    hub.put("datasets/o/n", "small/train-00000-of-00001.parquet", "large/train-00000-of-00001.parquet")
    error = refused("hf://datasets/o/n")
    assert error.what == "there are several train: large/train, small/train"
    assert error.fix == "Type: silicon prepare hf://datasets/o/n/large/train"
    assert fetched("hf://datasets/o/n/small/train")[0] == ["small/train-00000-of-00001.parquet"]


def test_the_same_split_in_several_kinds_is_read_once(hub: Hub) -> None:
    hub.put("datasets/o/n", "train/a.txt", "train/b.jsonl", "train/c.parquet")
    paths, events = fetched("hf://datasets/o/n")
    [notice] = [event for event in events if isinstance(event, Notice)]
    assert paths == ["train/c.parquet"]
    assert notice.message == "read only the .parquet files of the split, not train/a.txt, train/b.jsonl"


@pytest.mark.parametrize(
    ("status", "code", "what", "fix"),
    [
        (404, "RepoNotFound", "the hub has no o/n, or it is private", "Check the name."),
        (401, "RepoNotFound", "the hub has no o/n, or it is private", "hf auth login"),
        (403, "GatedRepo", "agree to its terms", "huggingface.co/datasets/o/n, then type: hf auth login"),
        (401, "", "the hub refuses this (401)", "hf auth login"),
        (500, "", "cannot reach the hub: it answered 500", "Check the network"),
    ],
)
def test_what_the_hub_will_not_give(hub: Hub, status: int, code: str, what: str, fix: str) -> None:
    hub.put("datasets/o/n", "train.txt")
    hub.status["datasets/o/n"] = (status, code)
    error = refused("hf://datasets/o/n")
    assert what in error.what and fix in error.fix and error.kind == "missing_input"


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "cannot reach the hub" in refused("hf://datasets/o/n").what
    with pytest.raises(SiliconError, match="cannot reach the hub"):
        fetch_tokenizer("hf://o/n")


@pytest.mark.parametrize("word", ["hf://datasets/o", "hf://datasets/", "hf://o/n", "hf://datasets/o n/x"])
def test_words_that_name_no_data_set(word: str) -> None:
    assert "hf://datasets/OWNER/NAME" in refused(word).fix


def test_a_tokenizer_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    made = bpe_tokenizer(TEXTS, 300)
    hub.put("o/n", "tokenizer.json", content=made.json().encode())
    hub.put("o/bare", "model.safetensors")
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    list(prepare(["a.txt"], "mine", "hf://o/n"))
    with open_dataset("mine") as dataset:
        assert dataset.tokenizer.sha256 == made.sha256 and dataset.card["tokenizer"]["kind"] == "hf://o/n"
    for word, what in {
        "hf://o/bare": "has no tokenizer.json",
        "hf://o": "names no model",
        "hf://x/y": "no x/y",
    }.items():
        with pytest.raises(SiliconError, match=what):
            list(prepare(["a.txt"], "other", word))
