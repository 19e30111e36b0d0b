"""Weight files: written so that the safetensors library reads them, read so that no damage gets through."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siliconlm.config import ModelConfig
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.model import weights
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import to_hf_tensors
from siliconlm.model.weights import NAMES, load_weights, model_files, read_model, read_tensors, write_tensors

Random = Callable[..., Decoder]
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def every_kind() -> dict[str, torch.Tensor]:
    """All dtypes, a number without dimensions, empty tensors, and one that does not lie row by row."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"kind.{name}": torch.randint(0, 100, (3, 5), generator=generator).to(dtype) for dtype, name in NAMES.items()
    }
    tensors["number"] = torch.tensor(3.25)
    tensors["counter"] = torch.tensor(2**60, dtype=torch.int64)
    tensors["empty"] = torch.empty(0)
    tensors["empty.rows"] = torch.empty(4, 0, 2, dtype=torch.bfloat16)
    tensors["turned"] = torch.randn(4, 6, generator=generator).t()
    tensors["part"] = torch.randn(8, 8, generator=generator)[2:4, ::2]
    tensors["odd/length"] = torch.ones(3, dtype=torch.uint8)
    return tensors


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name


def file_of(path: Path, header: Any, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def refused(path: Path, sha256: str | None = None) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        read_tensors(path, sha256)
    assert caught.value.kind == "bad_data"
    assert "\n" not in str(caught.value) and len(caught.value.what) < 300 and str(path) in str(caught.value)
    return caught.value


# --- with the safetensors library ------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_kind()
    facts = write_tensors(tmp_path / "a.safetensors", tensors)
    same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0, "the numbers begin at a multiple of 8"


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in every_kind().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "any"})
    same(read_tensors(tmp_path / "a.safetensors"), tensors)


def test_what_we_write_we_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", every_kind())
    back = read_tensors(tmp_path / "a.safetensors")
    same(back, every_kind())
    assert list(back) == list(every_kind()), "in the same order"
    back["kind.F32"].add_(1)  # and they can be written to


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {})
    assert read_tensors(tmp_path / "a.safetensors") == {} == safetensors.torch.load_file(tmp_path / "a.safetensors")


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(2))


def test_one_tensor_at_a_time_is_copied_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[memoryview]] = []
    honest = weights._raw

    def watched(tensor: torch.Tensor) -> memoryview:
        assert all(copy() is None for copy in copies), "an earlier copy is still held"
        raw = honest(tensor)
        copies.append(weakref.ref(raw))
        return raw

    monkeypatch.setattr(weights, "_raw", watched)
    write_tensors(tmp_path / "a.safetensors", {name: torch.ones(3, 5).t() for name in "abc"})
    assert len(copies) == 3


def test_reading_holds_the_file_once(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2_000_000)}
    digest = write_tensors(tmp_path / "a.safetensors", tensors)["sha256"]
    tracemalloc.start()
    try:
        read_tensors(tmp_path / "a.safetensors", digest)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8_000_000 < most < 12_000_000


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    write_tensors(whole, {"a": torch.arange(6.0), "b.c": torch.ones(2, 3, dtype=torch.int64)})
    data, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        refused(cut)
    cut.write_bytes(data + b"\0")
    assert "left over" in refused(cut).what


def test_a_flipped_bit_anywhere_breaks_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_tensors(path, {"a": torch.arange(6.0)})["sha256"]
    data = path.read_bytes()
    assert torch.equal(read_tensors(path, digest)["a"], torch.arange(6.0))
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert "SHA-256" in refused(path, digest).what


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        (b"null", b""),
        (b"\xff\xfe{}", b""),
        (b"[" * 200_000, b""),
        (b'{"a":' * 50_000, b""),
        ({"a": None}, b""),
        ({"a": []}, b""),
        ({"a": {}}, b""),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"0000"),
        ({"a": {**ONE, "dtype": "F64"}}, b"0000"),
        ({"a": {**ONE, "dtype": "A" * 100_000}}, b"0000"),
        ({"a": {**ONE, "dtype": ["F32"]}}, b"0000"),
        ({"a": {**ONE, "shape": [2]}}, b"0000"),
        ({"a": {**ONE, "shape": [-1]}}, b"0000"),
        ({"a": {**ONE, "shape": [-1, -1]}}, b"0000"),
        ({"a": {**ONE, "shape": "1"}}, b"0000"),
        ({"a": {**ONE, "shape": [1.0]}}, b"0000"),
        ({"a": {**ONE, "shape": [2**62, 4]}}, b"0000"),
        ({"a": {**ONE, "shape": [2**62 + 1, 4]}}, b"0000"),
        ({"a": {**ONE, "shape": [2**70]}}, b"0000"),
        ({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, b""),
        ({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"0000"),
        ({"a": {**ONE, "data_offsets": [0]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [0, 4, 8]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [4, 0]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [-4, 0]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [0.0, 4.0]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": ["0", "4"]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [0, 2**63]}}, b"0000"),
        ({"a": {**ONE, "data_offsets": [4, 8]}}, b"00000000"),  # a gap before
        ({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"0" * 12),  # a gap between
        ({"a": ONE, "b": ONE}, b"0000"),  # the same bytes twice
        ({"a": {**ONE, "shape": [2], "data_offsets": [0, 8]}, "b": {**ONE, "data_offsets": [4, 8]}}, b"0" * 8),
        ({"a": ONE}, b"00000000"),  # bytes that belong to nothing
        ({"a": ONE}, b"000"),
        (b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", b"0000"),
        ({"../../etc/passwd": ONE}, b"0000"),
        ({"/etc/passwd": ONE}, b"0000"),
        ({"a..b": ONE}, b"0000"),
        ({"": ONE}, b"0000"),
        ({"a\nb": ONE}, b"0000"),
        ({"a\x1b[31m": ONE}, b"0000"),
        ({"a" * 100_000: ONE}, b"0000"),
    ],
    ids=lambda value: (value if isinstance(value, bytes) else json.dumps(value).encode())[:60].decode("latin1"),
)
def test_a_header_that_does_not_fit_is_refused(header: Any, body: bytes, tmp_path: Path) -> None:
    refused(file_of(tmp_path / "a.safetensors", header, body))


@pytest.mark.parametrize("size", [0, 1, 9, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    refused(path)


def test_a_header_beyond_the_limit_is_refused_though_it_is_there(tmp_path: Path) -> None:
    refused(file_of(tmp_path / "a.safetensors", b"{}" + b" " * (16 << 20)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder, small enough to be damaged hundreds of times."""
    folder = tmp_path_factory.mktemp("model")
    shape = ModelConfig(n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_ff=8, vocab_size=259, context=8)
    model = Decoder(shape)
    model.initialise(1)
    for name, content in model_files(shape, byte_tokenizer()).items():
        (folder / name).write_bytes(content)
    write_tensors(folder / "model.safetensors", to_hf_tensors(shape, dict(model.named_parameters())))
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_model_file_is_read_whole_or_refused_in_one_line(tiny: Path, tmp_path: Path, data: Any) -> None:
    """Without a recorded hash a changed number cannot be seen; everything else must be."""
    good = (tiny / "model.safetensors").read_bytes()
    raw = bytearray(good)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)))
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from(TOKENS)))
        removed = data.draw(st.sampled_from([0, 1, len(piece), 40]))
        raw[place : place + removed] = piece
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_tensors(path)
        load_weights(read_model(tiny)[0], tensors, str(path))
    except SiliconError as error:
        assert error.kind == "bad_data" and "\n" not in str(error) and len(error.what) < 300
    else:
        shapes = {name: tensor.shape for name, tensor in read_tensors(tiny / "model.safetensors").items()}
        assert {name: tensor.shape for name, tensor in tensors.items() if name in shapes} == shapes


TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"0", b"null", b"1e999", b"NaN", b"F32", b"BF16", b"\\u0000"]


# --- what is in them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused(shape: ModelConfig, random_model: Random, value: float) -> None:
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in to_hf_tensors(shape, dict(random_model(shape).named_parameters())).items()
    }
    load_weights(Decoder(shape), tensors, "here")
    for name in tensors:
        broken = {**tensors, name: tensors[name].clone()}
        broken[name].view(-1)[-1] = value
        with pytest.raises(SiliconError, match="not finite") as error:
            load_weights(Decoder(shape), broken, "here")
        assert error.value.kind == "bad_data"


def test_missing_unknown_and_misshapen_tensors_are_named(shape: ModelConfig, random_model: Random) -> None:
    tensors = to_hf_tensors(shape, dict(random_model(shape).named_parameters()))
    model = Decoder(shape)
    for name, tensor in tensors.items():
        for wrong in (tensor[:-1], tensor.unsqueeze(0), tensor.flatten()[0], tensor.flatten()[:2], tensor.repeat(2, 1)):
            with pytest.raises(SiliconError, match="is of another shape") as error:
                load_weights(model, {**tensors, name: wrong.detach()}, "here")
            assert error.value.kind == "bad_data"
        with pytest.raises(SiliconError, match="is missing"):
            load_weights(model, {other: value for other, value in tensors.items() if other != name}, "here")
        with pytest.raises(SiliconError, match="extra is unknown"):
            load_weights(model, {**tensors, f"{name}.extra": tensor}, "here")


def test_a_refused_file_leaves_the_model_as_it_was(shape: ModelConfig, random_model: Random) -> None:
    model = random_model(shape)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tensors = to_hf_tensors(shape, dict(random_model(shape, seed=9).named_parameters()))
    name = next(iter(tensors))
    with pytest.raises(SiliconError):
        load_weights(model, {**tensors, name: torch.full_like(tensors[name], torch.nan)}, "here")
    same(dict(model.state_dict()), before)


def test_half_precision_weights_are_read_into_float32(shape: ModelConfig, random_model: Random, tmp_path: Path) -> None:
    tensors = to_hf_tensors(shape, dict(random_model(shape).named_parameters()))
    write_tensors(tmp_path / "a.safetensors", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    model = Decoder(shape)
    load_weights(model, read_tensors(tmp_path / "a.safetensors"), "here")
    for name, tensor in to_hf_tensors(shape, dict(model.named_parameters())).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].bfloat16().float()), name


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_a_file_says_which(tiny: Path, tmp_path: Path, name: str) -> None:
    for path in tiny.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SiliconError, match=name) as error:
        read_model(tmp_path)
    assert error.value.kind == "missing_input"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model_type": "qwen3"}'])
def test_a_damaged_config_is_one_line(tiny: Path, tmp_path: Path, text: str) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SiliconError) as error:
        read_model(tmp_path)
    assert error.value.kind == "bad_data" and "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_config_that_claims_a_giant_takes_no_memory(tiny: Path, tmp_path: Path, entry: str) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: 10**12}))
    with pytest.raises(SiliconError, match="another shape") as error:
        read_model(tmp_path)
    assert error.value.kind == "bad_data"
