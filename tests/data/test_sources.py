"""Text is read whole and unchanged, whatever the pieces; what is not text is refused with a place and a way out."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from siliconlm.data import sources
from siliconlm.data.sources import Source, open_sources
from siliconlm.data.utf8 import decoded
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Working

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def opened(*words: str) -> tuple[list[Source], list[Event]]:
    return run(open_sources(list(words)))


def run(steps: Generator[Event, None, list[Source]]) -> tuple[list[Source], list[Event]]:
    events: list[Event] = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as end:
            return end.value, events


def texts(found: list[Source]) -> list[str]:
    return ["".join(document.pieces()) for source in found for document in source.documents]


def refused(*words: str) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        opened(*words)
    assert caught.value.fix
    return caught.value


@given(st.text(), st.integers(1, 70))
def test_text_is_the_same_in_pieces_of_any_size(text: str, size: int) -> None:
    data = text.encode()
    raw = (data[at : at + size] for at in range(0, len(data), size))
    assert "".join(decoded(raw)) == text.removeprefix("\ufeff")


@given(st.binary(min_size=1), st.integers(1, 70))
def test_bad_bytes_are_placed_as_a_whole_decode_places_them(data: bytes, size: int) -> None:
    raw = (data[at : at + size] for at in range(0, len(data), size))
    try:
        whole = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(SiliconError, match=f"0x{data[error.start]:02x} at offset {error.start:,}"):
            list(decoded(raw))
    else:
        assert "".join(decoded(raw)) == whole.removeprefix("\ufeff")


def test_a_document_reads_twice_and_in_small_pieces(tmp_path: Path) -> None:
    text = "Grüße, 世界! 🙂\r\n" * 1000
    (tmp_path / "a.txt").write_bytes(text.encode())
    [source], events = opened("a.txt")
    [document] = source.documents
    assert events == []
    assert "".join(document.pieces()) == "".join(document.pieces(7)) == text
    assert all(len(piece) <= 100 for piece in document.pieces(100))
    digest = hashlib.sha256()
    list(document.parts(watch=digest.update))
    assert digest.hexdigest() == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_is_read_by_name_and_says_what_it_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.TXT", ".hidden.txt", ".git/d.txt", "e.py"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "texts" / "empty.txt").write_text("")
    (tmp_path / "texts" / "blank.txt").write_text(" \n\u3000\n")
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    found, events = opened("texts")
    assert texts(found) == ["a.md", "b.txt", "sub/c.TXT"]
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert "2 files without text" in messages[0]
    assert "2 files of other kinds" in messages[1] and ".py" in messages[1]


def test_several_words_and_patterns_go_together_and_no_file_is_read_twice(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "three.log"):
        (tmp_path / name).write_text(name)
    found, events = opened("two.txt", "*.txt", "./*.log")
    assert texts(found) == ["two.txt", "one.txt", "three.log"]
    assert any(isinstance(event, Notice) and "more than once" in event.message for event in events)


def test_a_file_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "act[1].txt").write_text("one")
    assert texts(opened("act[1].txt")[0]) == ["one"]


def test_the_byte_order_mark_is_left_out_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfa\r\nb")
    found, events = opened("a.txt")
    assert texts(found) == ["\ufeffa\r\nb"]
    assert any(isinstance(event, Notice) and "byte order mark" in event.message for event in events)


NOT_TEXT = {
    "empty": (b"", "empty"),
    "blank": (b" \n\t\r\n", "white space"),
    "mark only": (b"\xef\xbb\xbf", "white space"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL byte"),
    "elf": (b"\x7fELF\x02\x01\x01\0\0\0", "NUL byte"),
    "gzip": (gzip.compress(b"to be or not to be" * 100), "not "),
    "control": (b"\x01\x02\x1b[0m text" * 20, "control characters"),
    "utf-16": ("\ufeffTo be".encode("utf-16-le"), "UTF-16"),
    "utf-16-be": ("\ufeffTo be".encode("utf-16-be"), "UTF-16"),
    "utf-32": ("\ufeffTo be".encode("utf-32-le"), "UTF-32"),
    "utf-32-be": ("\ufeffTo be".encode("utf-32-be"), "UTF-32"),
    "latin-1": ("Größe".encode("latin-1"), "0xf6 at offset 2"),
    "overlong": (b"abc\xc0\xaf", "0xc0 at offset 3"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_what_is_not_text_is_refused(tmp_path: Path, case: str) -> None:
    data, why = NOT_TEXT[case]
    path = tmp_path / "input.txt"
    path.write_bytes(data)
    error = refused(str(path))
    assert why in error.what and error.where == str(path) and error.kind == "bad_data"


def test_bad_bytes_far_into_a_file_are_placed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_001 + b"\xff" + b"y" * 9)
    [source], _ = opened("a.txt")
    with pytest.raises(SiliconError, match="0xff at offset 3,000,001"):
        list(source.documents[0].pieces())


def test_a_character_cut_off_by_the_end_is_placed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grö".encode()[:-1])
    [source], _ = opened("a.txt")
    with pytest.raises(SiliconError, match="0xc3 at offset 2"):
        list(source.documents[0].pieces())


def test_missing_things_are_named_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "hamlet.txt").write_text("x")
    assert refused("hamlett.txt").fix == "Did you mean hamlet.txt?"
    assert refused(str(tmp_path / "hamlett.txt")).fix == "Did you mean hamlet.txt?"
    assert refused("shakespear").fix == "Did you mean shakespeare?"
    assert refused("zzz").kind == "missing_input"
    assert refused("no/such/place.txt").what == "no such folder"
    assert refused("hamlet.txt/x").what == "no such folder"
    assert "no file matches" in refused("*.csv").what
    assert refused().what == refused("").what == "no text was given"


def test_folders_without_text(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    assert "no text files" in refused("code").what
    (tmp_path / "code" / "a.py").write_text("x")
    assert "'code/**/*.py'" in refused("code").fix
    assert texts(opened("code/**/*.py")[0]) == ["x"]
    for name in ("a.txt", "b.txt"):
        (tmp_path / "code" / name).write_text("\n")
    assert "all 2 files are empty" in refused("code").what


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused("pipe").what == "not a regular file"
    assert refused("/dev/zero").what == "not a regular file"
    (tmp_path / "link").symlink_to("nowhere")
    assert refused("link").what == "no such file or folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert "cannot read" in refused("a.txt").what


def test_an_unreadable_file_as_the_system_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("builtins.open", forbidden)
    error = refused("a.txt")
    assert error.what == "cannot read it: Permission denied" and error.where == "a.txt"


def test_the_built_in_corpus_is_one_document() -> None:
    [source], events = opened("builtin")
    assert source.builtin and len(source.documents) == 1 and events == []
    assert len(texts([source])[0]) >= sources.BUILTIN_SIZE * 0.9


# --- files of records -------------------------------------------------------------------------------------------------


def test_a_folder_of_mixed_kinds_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}')
    (tmp_path / "texts" / "c.json").write_text('["four"]')
    parquet.write_table(pyarrow.table({"text": ["five", "six"]}), tmp_path / "texts" / "d.PARQUET")
    (tmp_path / "texts" / "e.ndjson").write_text('\ufeff""')
    [source], events = opened("texts")
    parts = [list(document.parts()) for document in source.documents]
    assert parts == [
        [(True, "one")],
        [(True, "two"), (True, "three")],
        [(True, "four")],
        [(True, "five"), (True, "six")],
    ]
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert "1 file without text" in messages[0] and "byte order mark" in messages[1] and len(messages) == 2


def test_a_field_that_nothing_has_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}')
    assert texts(field_opened("a.txt", "b.jsonl")[0]) == ["one", "two"]
    [notice] = field_opened("a.txt")[1]
    assert isinstance(notice, Notice) and notice.level == "warning" and "--field body was not used" in notice.message


def field_opened(*words: str) -> tuple[list[Source], list[Event]]:
    return run(open_sources(list(words), "body"))


@pytest.mark.parametrize("data", [b"", b" \n", b"[]", b'{"text": null}', b'[{"text": " "}]'])
def test_records_without_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert refused("a.json").what == ("the file holds no text in its records" if data else "the file is empty")


def test_bytes_that_are_no_text_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\0')
    assert "a NUL byte at offset 14" in refused("a.jsonl").what
    (tmp_path / "a.json").write_bytes('["one"]'.encode("utf-16"))
    assert "UTF-16" in refused("a.json").what


# --- tiny Shakespeare, from a server of our own ----------------------------------------------------------------------


class Server:
    def __init__(self) -> None:
        self.body, self.status, self.length, self.asked = b"To be, or not to be\n" * 9000, 200, 0, 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.length or len(state.body)))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{host.server_port}/input.txt")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(state.body).hexdigest())
        yield state
        host.shutdown()


def test_shakespeare_is_downloaded_once_and_checked(server: Server, home: Path) -> None:
    found, events = opened("shakespeare")
    assert texts(found) == [server.body.decode()]
    assert events and isinstance(events[-1], Working)
    assert events[-1].done == events[-1].total == len(server.body)
    assert opened("shakespeare")[1] == [] and server.asked == 1
    cached = home / "downloads" / "tinyshakespeare.txt"
    cached.write_text("damaged")
    assert texts(opened("shakespeare")[0]) == [server.body.decode()] and server.asked == 2
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_a_wrong_download_is_refused_and_not_kept(server: Server, home: Path) -> None:
    server.body += b"!"
    error = refused("shakespeare")
    assert error.kind == "bad_data" and "SHA-256" in error.what
    assert not (home / "downloads").exists()


def test_a_download_that_breaks_off_or_is_not_there(server: Server) -> None:
    server.length = len(server.body) + 1
    assert "ended after" in refused("shakespeare").what
    server.length, server.status = 0, 404
    assert "the server answered 404" in refused("shakespeare").what


def test_offline_says_what_to_type_instead(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", "http://127.0.0.1:1/input.txt")
    error = refused("shakespeare")
    assert error.kind == "missing_input" and "refused" in error.what.lower()
    assert "silicon prepare path/to/input.txt" in error.fix and "silicon prepare builtin" in error.fix


@pytest.mark.skipif(not REAL.exists(), reason="needs tiny Shakespeare beside the repository")
def test_the_real_one_has_the_recorded_hash() -> None:
    assert hashlib.sha256(REAL.read_bytes()).hexdigest() == sources.SHAKESPEARE_SHA256
