"""A real server on a free port, with a small random model that was "taught" to talk: its letters are its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx2 as httpx
import openai
import pytest
import torch

from siliconlm.config import MachineConfig, ModelConfig, SampleConfig
from siliconlm.data.chat import TEMPLATES, Template
from siliconlm.data.tokenizer import Tokenizer, char_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.hardware.device import Device, open_device
from siliconlm.inference.batch import BatchGenerator
from siliconlm.inference.conversation import Talk
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES, to_hf_tensors
from siliconlm.model.weights import model_files, write_tensors
from siliconlm.server.app import Server, _listening
from siliconlm.server.completions import Limits, Service
from siliconlm.server.guard import Access
from siliconlm.server.worker import Worker

LETTERS = char_tokenizer("\n" + "".join(map(chr, range(32, 127))))
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 4, "head_dim": 8, "n_ff": 48}
SILENT = SiliconError("it was not tuned on conversations", fix="Type silicon finetune first.")


def waited(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something to be so; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
    return value


def random_model(context: int = 256, family: str = "qwen3", seed: int = 2, endless: bool = False) -> Decoder:
    """A small decoder in which every parameter matters, with logits far apart. An `endless` one ends no text itself."""
    shape = ModelConfig(**SIZES, vocab_size=LETTERS.size, context=context, **FEATURES[family])
    model = Decoder(shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.2 if "embed_positions" in name else 0.4
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        if endless:
            model.model.embed_tokens.weight[sorted(LETTERS.special_ids)] = 0
    return model


def written(folder: Path, model: Decoder, template: str | None = TEMPLATES["chatml"]) -> Path:
    """A Hugging Face folder."""
    folder.mkdir()
    for name, content in model_files(model.config, LETTERS, template).items():
        (folder / name).write_bytes(content)
    write_tensors(folder / "model.safetensors", to_hf_tensors(model.config, dict(model.named_parameters())))
    return folder


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    server: Server
    device: Device
    client: openai.OpenAI

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def tokenizer(self) -> Tokenizer:
        return self.service.tokenizer

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        if "json" not in options and "content" not in options:
            options["json"] = asked()
        return httpx.post(self.url + path, timeout=60, **options)

    def counts(self) -> dict[str, int]:
        with urlopen(f"{self.url}/health") as answer:
            health = json.load(answer)
        return {name: health[name] for name in ("running", "queued", "requests")}

    def quiet(self) -> bool:
        """Whether nothing is going on, and nothing is left of what went on."""
        batch = self.service.worker.batch
        return not any(self.counts().values()) and not batch.rows and not batch.cache.lengths

    def alone(self, *said: str, **settings: Any) -> str:
        """What the model answers by the way that makes one text at a time."""
        assert isinstance(self.service.template, Template)
        drawn = SampleConfig(**{"temperature": 0, "max_tokens": self.service.context, **settings})
        talk = Talk(self.service.worker.batch.model, self.service.template, self.device, drawn, drawn.seed or 0)
        list(talk.ask(*said))
        return talk.messages[-1].content if talk.messages else ""


def asked(text: str = "Who are you?", **values: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, **values}


Serve = Callable[..., Served]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return waited


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    return random_model


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    return written


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Starts servers, which end with the module's tests."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(_running(**options))


class _running:
    def __init__(
        self,
        model: Decoder | None = None,
        talks: bool = True,
        rows: int = 8,
        limits: Limits | None = None,
        token: str | None = None,
        host: str = "127.0.0.1",
        send_buffer: int = 0,
    ) -> None:
        self.device = open_device(MachineConfig(device="cpu", threads=1))
        worker = Worker(BatchGenerator(model or random_model(), self.device, rows), LETTERS)
        template = Template(TEMPLATES["chatml"], LETTERS) if talks else SILENT
        self.service = Service("m", worker, template, limits or Limits())
        self.server = Server(self.service, Access(host, token))
        self.listener, self.token = _listening(host, 0), token
        if send_buffer:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self) -> Served:
        url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=self.token or "none", max_retries=0, timeout=60)
        self.thread.start()
        waited(lambda: self.server.started)
        return Served(url, self.service, self.server, self.device, self.client)

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive() and not self.service.worker.thread.is_alive()


@pytest.fixture(scope="module")
def served(serve: Serve) -> Served:
    """A server of its own for every module, that tests leave as they found it."""
    return serve()
