"""A token file is whole or it is an error that names it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from siliconlm.data import shards
from siliconlm.data.shards import HEADER, MAGIC, Shard, ShardWriter, dtype_for
from siliconlm.errors import SiliconError


def written(path: Path, tokens: np.ndarray, dtype: str = "uint16", parts: int = 3) -> Path:
    with ShardWriter(path, dtype, "hash-of-tokenizer") as shard:
        for part in np.array_split(tokens, parts):
            shard.write(part)
    return path


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 65535), ("uint32", 2**31)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, largest: int) -> None:
    tokens = np.random.default_rng(1).integers(0, largest, 10_000, endpoint=True)
    tokens[17] = largest
    path = written(tmp_path / "a.bin", tokens, dtype)
    with Shard.open(path) as shard:
        assert (shard.count, shard.dtype, shard.tokenizer) == (10_000, dtype, "hash-of-tokenizer")
        assert shard.read(0, 10_000).dtype == np.int64
        assert np.array_equal(shard.read(0, 10_000), tokens)
        assert np.array_equal(shard.read(9_990, 10), tokens[-10:])
        assert shard.read(10_000, 0).size == 0
        assert shard.vocab_fits(largest + 1) and not shard.vocab_fits(largest)
        shard.verify()


def test_the_layout_is_what_the_format_says(tmp_path: Path) -> None:
    data = written(tmp_path / "a.bin", np.arange(1000)).read_bytes()
    assert data.startswith(b"SILICON1\n{") and data[HEADER - 1 : HEADER] == b"\n"
    facts = json.loads(data[len(MAGIC) : HEADER])
    payload = np.arange(1000, dtype="<u2").tobytes()
    assert data[HEADER:] == payload
    assert facts["sha256"] == hashlib.sha256(payload).hexdigest() and facts["count"] == 1000


def test_the_dtype_follows_the_vocabulary() -> None:
    assert [dtype_for(size) for size in (259, 65535, 65536, 151_669)] == ["uint16", "uint16", "uint32", "uint32"]


def test_tokens_that_do_not_fit_are_our_own_mistake(tmp_path: Path) -> None:
    for wrong in (65536, -1):
        with pytest.raises(AssertionError), ShardWriter(tmp_path / "a.bin", "uint16", "") as shard:
            shard.write(np.array([wrong]))


def test_an_empty_shard(tmp_path: Path) -> None:
    with Shard.open(written(tmp_path / "a.bin", np.array([], dtype=np.int64))) as shard:
        assert shard.count == 0
        shard.verify()


def test_the_file_is_whole_when_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(shards, "sync", lambda fd: seen.append((tmp_path / "a.bin").read_bytes()))
    assert [written(tmp_path / "a.bin", np.arange(1000)).read_bytes()] == seen


def test_an_interrupted_write_is_not_a_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.bin", "uint16", "") as shard:
        shard.write(np.arange(5000))
        raise KeyboardInterrupt
    with pytest.raises(SiliconError, match="not finished"):
        Shard.open(tmp_path / "a.bin")


def with_facts(**changes: object) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        facts = json.loads(data[len(MAGIC) : HEADER]) | changes
        return (MAGIC + json.dumps(facts).encode()).ljust(HEADER) + data[HEADER:]

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "header only in part": lambda data: data[:100],
    "no magic": lambda data: b"X" + data[1:],
    "nanoGPT's": lambda data: data[HEADER:],
    "header not json": lambda data: data[:20] + b"\xff}" + data[22:],
    "short by a token": lambda data: data[:-2],
    "short by a byte": lambda data: data[:-1],
    "long by a token": lambda data: data + b"\0\0",
    "no payload": lambda data: data[:HEADER],
    "dtype": with_facts(dtype="float64"),
    "count text": with_facts(count="1000"),
    "count negative": with_facts(count=-1),
    "count true": with_facts(count=True),
    "count": with_facts(count=999),
    "no hash": with_facts(sha256=None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_on_opening(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "train.bin", np.arange(1000))
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(SiliconError) as caught:
        Shard.open(path)
    error = caught.value
    assert error.kind == "bad_data" and error.where == str(path) and "--force" in error.fix
    assert len(os.listdir("/dev/fd")) == before


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SiliconError, match="missing") as caught:
        Shard.open(tmp_path / "train.bin")
    assert caught.value.kind == "missing_input"


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    path = written(tmp_path / "train.bin", np.arange(1000))
    data = bytearray(path.read_bytes())
    data[HEADER + 500] ^= 1
    path.write_bytes(data)
    with Shard.open(path) as shard, pytest.raises(SiliconError, match="SHA-256 differs") as caught:
        shard.verify()
    assert caught.value.where == str(path)


def test_a_token_past_the_vocabulary_is_an_error_when_read(tmp_path: Path) -> None:
    path = written(tmp_path / "train.bin", np.arange(100))
    data = bytearray(path.read_bytes())
    data[HEADER + 61] = 0x80  # the high byte of token 30
    path.write_bytes(data)
    with Shard.open(path) as shard:
        assert np.array_equal(shard.read(0, 30), np.arange(30))
        with pytest.raises(SiliconError, match=f"token 30 is {0x8000 + 30}, above the largest"):
            shard.read(10, 50)


def test_a_file_cut_short_in_use_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "train.bin", np.arange(1000))
    with Shard.open(path) as shard:
        os.truncate(path, HEADER + 100)
        assert shard.read(0, 50).size == 50
        with pytest.raises(SiliconError, match=f"ends early, at offset {HEADER + 100:,}"):
            shard.read(40, 20)
        with pytest.raises(SiliconError, match="belong there"):
            shard.verify()
