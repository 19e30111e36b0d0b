"""Model folders on disk: safetensors written tensor by tensor and read only after checks; Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.data.chat import Template
from siliconlm.data.tokenizer import Tokenizer, open_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.files import PIECE, sync
from siliconlm.model import families
from siliconlm.model.decoder import Decoder

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
TEMPLATE_FILE = "chat_template.jinja"
TYPES = {name: dtype for dtype, name in NAMES.items()}
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")  # what `read_model` reads
LARGEST_HEADER = 16 << 20
TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+([./][A-Za-z0-9_]+)*")  # no path out of a folder
LONGEST_NAME = 200


def write_bytes(path: Path, *pieces: bytes | memoryview) -> dict[str, Any]:
    """A new file, synced to disk; returns its size and SHA-256 for the manifest."""
    return write_pieces(path, pieces)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """`write_bytes` of pieces that are made as they are asked for: of these only one is held at a time."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(piece: bytes | memoryview) -> int:
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE]
                file.write(part)
                digest.update(part)
            return len(piece)

        size = sum(map(put, pieces))  # a loop's variable would keep a piece until the next one is made
        file.flush()
        sync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, written one tensor at a time so that saving needs little memory beyond the model's own."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = [memoryview(struct.pack("<Q", len(text))), memoryview(text)]
    return write_pieces(path, chain(head, map(_raw, tensors.values())))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. The bytes that are checked are the bytes that are used.

    Raises SiliconError (bad_data) for a wrong hash, a header that does not fit the file, or an unknown dtype.
    """

    def bad(why: str) -> SiliconError:
        return SiliconError(f"damaged file: {why}", where=str(path), kind="bad_data")

    data = _content(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise bad("its SHA-256 is not the one recorded")
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= min(LARGEST_HEADER, len(data) - 8):
        raise bad("the header does not fit the file")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_each_once)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        body, tensors, expected = memoryview(data)[8 + size :], {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            dtype, shape = TYPES[entry["dtype"]], torch.Size(entry["shape"])
            if len(name) > LONGEST_NAME or not TENSOR_NAME.fullmatch(name):
                raise bad(f"{name[:60]!r} is no name of a tensor")
            if start != expected or end > len(body):
                raise bad(f"tensor {name} is out of place")
            if end - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise bad(f"tensor {name} has the wrong size")
            tensors[name] = _tensor(body[start:end], dtype, shape)
            expected = end
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: nested too deep
        why = " ".join(str(error).split())[:100]
        raise bad(f"the header cannot be read ({why})") from None
    if expected != len(body):
        raise bad("bytes are left over behind the last tensor")
    return {name: tensors[name] for name in entries}


def _content(path: Path) -> bytearray:
    """A whole file, read into its place: `bytearray(path.read_bytes())` would hold it twice."""
    with open(path, "rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        del data[file.readinto(data) :]  # in case it has become shorter since
    return data


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands there twice")
    return table


def _tensor(raw: memoryview, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def model_files(model: ModelConfig, tokenizer: Tokenizer, template: str | None = None) -> dict[str, bytes]:
    """The files that make a folder of weights loadable by transformers, mlx-lm and others, by name.

    With a chat `template`, which stands there twice: Ollama reads it in tokenizer_config.json alone, newer transformers
    in a file of its own.
    """
    eos = tokenizer.name_of(tokenizer.eos)
    ends = sorted(Template(template, tokenizer).ends, reverse=True) if template else [tokenizer.eos]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": eos,
    }
    files = {
        "config.json": families.to_hf_config(model, tokenizer.eos),
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": tokenizer.eos},
    }
    if template:
        tokenizer_config["chat_template"] = template
    texts = {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in files.items()}
    if template:
        texts[TEMPLATE_FILE] = template.encode()
    return {**texts, "tokenizer.json": tokenizer.json().encode()}


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder, where it has one."""
    for name, find in ((TEMPLATE_FILE, str), ("tokenizer_config.json", lambda text: json.loads(text)["chat_template"])):
        try:
            return str(find((folder / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, KeyError):
            continue
        except (ValueError, TypeError, RecursionError) as error:
            raise SiliconError(f"cannot be read: {error}", where=str(folder / name), kind="bad_data") from None
    return None


def read_model(folder: Path, sha256: str | None = None) -> tuple[Decoder, Tokenizer]:
    """Open a Hugging Face model folder: config.json, tokenizer.json, model.safetensors. Weights in float32, on the CPU.

    Raises SiliconError naming the file for anything missing, unknown or at odds.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise SiliconError("not a model folder: it has no config.json", where=str(folder), kind="missing_input")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SiliconError(f"not valid JSON: {error}", where=str(config_path), kind="bad_data") from None
    shape = families.from_hf_config(config, str(config_path))
    if not (folder / "model.safetensors").is_file():
        raise SiliconError("it has no model.safetensors", where=str(folder), kind="missing_input")
    where, tensors = str(folder / "model.safetensors"), read_tensors(folder / "model.safetensors", sha256)
    with torch.device("meta"):
        _renamed(Decoder(shape), tensors, where)  # before memory is taken for what config.json claims
    model = Decoder(shape)
    load_weights(model, tensors, where)
    return model.eval(), open_tokenizer(folder / "tokenizer.json")


def load_weights(model: Decoder, tensors: dict[str, Tensor], where: str) -> None:
    """Put a family's tensors into the decoder. Names and shapes must agree exactly; values must be finite."""
    weights = _renamed(model, tensors, where)
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise SiliconError("it holds numbers that are not finite", where=where, kind="bad_data")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})


def _renamed(model: Decoder, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A family's tensors under the decoder's names; SiliconError where names or shapes do not agree."""
    weights = families.from_hf_tensors(model.config, tensors)
    ours = dict(model.state_dict())
    missing, unknown = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
    wrong = [name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape than config.json says", wrong)):
        if names:
            raise SiliconError(f"{names[0]} is {what} ({len(names)} in all)", where=where, kind="bad_data")
    return weights
