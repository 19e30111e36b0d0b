"""Records come out of a file as `json` and pyarrow read them whole; what cannot be read is named by its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from siliconlm.data import records
from siliconlm.data.records import looks_like_chat, read_records, read_texts
from siliconlm.errors import SiliconError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(name: str) -> list[Any]:
    return [value for _, value in read_records(Path(name))]


def refused(name: str, field: str | None = None) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        list(read_texts(Path(name), field))
    assert caught.value.fix and caught.value.where
    return caught.value


def table(name: str, rows: list[dict[str, Any]], **options: Any) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), name, **options)


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
@given(written=st.lists(VALUES), ascii=st.booleans(), indent=st.sampled_from([None, 0, 3]), mark=st.booleans())
def test_json_of_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory, piece: int, written: list[Any], ascii: bool, indent: int, mark: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps(value, ensure_ascii=ascii) for value in written]
    begin = "\ufeff" * mark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        for name, text in {
            "a.json": json.dumps(written, ensure_ascii=ascii, indent=indent),
            "a.jsonl": "\n".join(lines),
            "b.NDJSON": "".join(f" {line} \r\n\n" for line in lines),
        }.items():
            (folder / name).write_bytes((begin + text).encode())
            assert [value for _, value in read_records(folder / name)] == written


def test_values_one_after_the_other_need_no_array(folder: Path) -> None:
    Path("a.json").write_text('{"text": "one"}\n{"text":\n"two"} "three"')
    assert list(read_records(Path("a.json"))) == [
        ("a.json item 1", {"text": "one"}),
        ("a.json item 2", {"text": "two"}),
        ("a.json item 3", "three"),
    ]
    Path("b.json").write_text("17")
    assert values("b.json") == [17]


@pytest.mark.parametrize("number", ["1.5", "1e5", "1E+5", "-0.5e-3", "12345"])
def test_a_number_may_be_cut_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setattr(records, "PIECE", 1)
    Path("a.json").write_text(f"[{number},{number}]")
    assert values("a.json") == [float(number)] * 2


def test_places_count_lines_items_and_rows(folder: Path) -> None:
    Path("a.jsonl").write_text('\n"one"\n  \n"two"\n')
    table("a.parquet", [{"text": str(number)} for number in range(300)])
    assert list(read_records(Path("a.jsonl"))) == [("a.jsonl line 2", "one"), ("a.jsonl line 4", "two")]
    assert list(read_records(Path("a.parquet")))[299] == ("a.parquet row 300", {"text": "299"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_bytes_of_the_file_are_seen(folder: Path, name: str) -> None:
    Path("a.jsonl").write_text('\ufeff"one"\n"two"')
    Path("a.json").write_text('["one", "two"]')
    table("a.parquet", [{"text": "one"}])
    seen = bytearray()
    list(read_records(Path(name), seen.extend))
    assert seen == Path(name).read_bytes()


def test_a_text_is_a_string_or_stands_in_a_field(folder: Path) -> None:
    Path("a.jsonl").write_text(
        '{"text": "one", "body": "1"}\n"two"\n{"text": null}\n{"text": " \\n"}\n{"text": "\\u0000"}'
    )
    assert list(read_texts(Path("a.jsonl"))) == ["one", "two", "", "", "\0"]
    Path("b.json").write_text('[{"text": 1, "body": "one"}, {"body": "", "prompt": "", "completion": ""}]')
    assert list(read_texts(Path("b.json"), "body")) == ["one", ""]
    table("c.parquet", [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "é🙂", "n": 3}], row_group_size=2)
    assert list(read_texts(Path("c.parquet"))) == ["one", "", "é🙂"]


GOOD = '{"text": "one"}\n'
BAD_LINES = {
    "not JSON": ('{"text": "tw', "unterminated string starting at character 10"),
    "nothing after it": ('{"text": "two"} x', "extra data at character 16"),
    "NUL bytes": ('{"text": "t\0"}', "invalid control character at character 12"),
    "huge integer": (f'{{"text": {"1" * 5000}}}', "an integer of more than 4,300 digits"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "no field": ('{"txet": "two", "n": 2}', "no field `text`; there are: txet, n"),
    "no fields": ("{}", "no field `text`; there are: none"),
    "number": ('{"text": 2, "body": "two"}', "field `text` is a number, not text"),
    "list": ('{"text": ["two"]}', "field `text` is an array, not text"),
    "bare number": ("17", "a number, not a record with text"),
    "bare list": ("[]", "an array, not a record with text"),
    "half a pair": ('{"text": "\\ud83d"}', r"half a surrogate pair, \ud83d, stands in the text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(folder: Path, case: str) -> None:
    line, what = BAD_LINES[case]
    Path("notes.jsonl").write_text(GOOD * 16 + line + "\n" + GOOD)
    error = refused("notes.jsonl")
    assert error.where == "notes.jsonl line 17" and what in error.what and error.kind == "bad_data"


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_item_is_named(folder: Path, case: str) -> None:
    item, what = BAD_LINES[case]
    Path("notes.json").write_text("[" + GOOD + "," + item + "]")
    error = refused("notes.json")
    assert error.where == "notes.json item 2" and error.kind == "bad_data"
    assert what.partition(" at character")[0] in error.what or case == "nothing after it"


def test_what_to_type_is_said(folder: Path) -> None:
    Path("a.jsonl").write_text('{"txet": "one", "n": 2}')
    assert refused("a.jsonl").fix == "Type --field txet"
    Path("a.jsonl").write_text('{"n": 2}')
    assert "--field NAME" in refused("a.jsonl", "body").fix
    Path("a.jsonl").write_text('{"text": 2, "body": "two"}')
    assert refused("a.jsonl").fix == "Type --field body"


def test_bytes_that_are_no_utf8_are_placed(folder: Path) -> None:
    Path("a.jsonl").write_bytes(GOOD.encode() + b'{"text": "caf\xe9"}')
    error = refused("a.jsonl")
    assert error.where == "a.jsonl line 2" and "byte 0xe9 at offset 13 of the line" in error.what
    Path("a.json").write_bytes(b'["caf\xe9"]')
    assert "byte 0xe9 at offset 5" in refused("a.json").what


UNFINISHED = {
    "[": ("item 1", "expecting value"),
    '["one"': ("item 1", "the file ends in the middle of the array"),
    '["one",': ("item 2", "expecting value"),
    '["one" "two"]': ("item 1", "no comma after it"),
    '["one"] "two"': ("a.json", "more text after the end of the array"),
    '{"text": "one"': ("item 1", "expecting ',' delimiter"),
    '"one" , "two"': ("item 2", "expecting value"),
}


@pytest.mark.parametrize("text", UNFINISHED)
def test_an_array_that_is_none_is_told(folder: Path, text: str) -> None:
    where, what = UNFINISHED[text]
    Path("a.json").write_text(text)
    error = refused("a.json")
    assert what in error.what and error.where.endswith(where)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_too_long_for_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(records, "LONGEST", 1 << 20)
    Path(name).write_text('"one"\n"' + "x" * (5 << 20) + '"')
    error = refused(name)
    assert error.what == "a record of more than 1 MiB" and error.where in ("a.jsonl line 2", "a.json item 2")


def test_a_parquet_file_without_the_column_lists_its_columns(folder: Path) -> None:
    table("a.parquet", [{"body": "one", "n": 1}])
    error = refused("a.parquet")
    assert error.what == "no column `text`; there are: body, n" and error.where == "a.parquet"
    assert refused("a.parquet", "n").what == "field `n` is a number, not text"
    assert refused("a.parquet", "boddy").fix == "Type --field body"
    assert list(read_texts(Path("a.parquet"), "body")) == ["one"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "overwritten"])
def test_a_damaged_parquet_file_is_told(folder: Path, damage: str) -> None:
    table("a.parquet", [{"text": f"one {number}"} for number in range(3000)])
    whole = Path("a.parquet").read_bytes()
    data = {
        "empty": b"",
        "cut": whole[:-9],
        "text": b"text" * 99,
        "overwritten": bytes(len(whole) - 2000) + whole[-2000:],
    }
    Path("a.parquet").write_bytes(data[damage])
    error = refused("a.parquet")
    assert error.what.startswith("not a readable Parquet file: ") and error.where == "a.parquet"


def test_without_pyarrow_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table("a.parquet", [{"text": "one"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    error = refused("a.parquet")
    assert error.fix == "Type: pip install 'siliconlm[data]'" and error.kind == "bad_environment"


TURN = {"role": "user", "content": "Hi"}
CHATS: list[Any] = [
    {"messages": [TURN]},
    {"conversations": []},
    {"instruction": "Say", "input": "", "output": "So"},
    {"prompt": "Say", "completion": "So"},
    {"prompt": "Say", "replies": []},
    [TURN, TURN],
]


@pytest.mark.parametrize("chat", CHATS)
def test_conversations_are_not_taken_for_texts(folder: Path, chat: Any) -> None:
    assert looks_like_chat(chat)
    Path("a.jsonl").write_text(json.dumps(chat))
    assert "conversations" in refused("a.jsonl").what
    if isinstance(chat, dict):
        table("a.parquet", [chat])
        assert "conversations" in refused("a.parquet").what


@pytest.mark.parametrize("other", [{"text": "Hi"}, {"prompt": "Hi"}, "messages", [], [1], [{"role": "user"}], 3, None])
def test_a_text_is_not_taken_for_a_conversation(other: Any) -> None:
    assert not looks_like_chat(other)
