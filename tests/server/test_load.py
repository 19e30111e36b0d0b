"""Many clients, slow ones, and such as leave: each gets its own answer, and nothing is left behind."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import openai
import pytest

from siliconlm.server.completions import Limits

WORDS = ["To", "be", "or", "not", "to", "be", "that", "is", "the", "question", "whether", "it", "is", "nobler", "in"]


def question(number: int) -> str:
    """Of 1 to 15 words."""
    return f"{number}: " + " ".join(WORDS[: 1 + number % 15])


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


class Line:
    """A connection whose other end is read as the test likes."""

    def __init__(self, port: int, body: dict[str, Any], path: str = "/v1/chat/completions", buffer: int = 0) -> None:
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def until(self, text: bytes) -> bytes:
        """What comes, up to a text."""
        got = b""
        while text not in got:
            new = self.socket.recv(1 << 16)
            assert new, got[-300:]
            got += new
        return got

    def rest(self) -> bytes:
        """What comes until the other side hangs up."""
        got = b""
        with suppress(ConnectionResetError):
            while new := self.socket.recv(1 << 16):
                got += new
        return got

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def long(serve: Any, make_model: Any) -> Any:
    """A model that talks for seconds."""
    return serve(model=make_model(context=8192, endless=True), rows=2)


def endless(**values: Any) -> dict[str, Any]:
    """A request whose text goes on to the end of the context."""
    return {"model": "m", "messages": messages("Go on"), "temperature": 0, "stream": True, **values}


# --- many ------------------------------------------------------------------------------------------------------------


def many(served: Any, count: int) -> None:
    """So many clients at once; half of them stream."""

    def ask(number: int) -> str:
        asked = {"model": "m", "messages": messages(question(number)), "temperature": 0}
        if number % 2:
            return str(served.client.chat.completions.create(**asked).choices[0].message.content)
        chunks = served.client.chat.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(count) as pool:
        got = list(pool.map(ask, range(count)))
    alone = [served.alone(question(number)) for number in range(count)]
    assert got == alone and len(set(alone)) > count // 5


def test_ten_clients_get_what_each_would_get_alone(served: Any, until: Any) -> None:
    many(served, 10)
    until(served.quiet)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_hundred_clients(serve: Any, make_model: Any, until: Any, family: str) -> None:
    served = serve(model=make_model(family=family, seed=2))
    many(served, 100)
    until(served.quiet)


def test_one_who_asks_little_does_not_wait_for_one_who_asks_much(long: Any, until: Any) -> None:
    """Of 40 texts of one program and one of another, the other's is not the last."""
    done: list[str] = []
    asked = {"model": "m", "prompt": "a", "max_tokens": 30, "temperature": 0}

    def ask(program: str) -> None:
        long.client.completions.create(**asked, extra_headers={"user-agent": program})
        done.append(program)

    threads = [threading.Thread(target=ask, args=("busy",)) for _ in range(40)]
    for thread in threads:
        thread.start()
    until(lambda: long.counts()["queued"] >= 20)
    ask("calm")
    assert len(done) <= 30, f"{len(done)} came before"
    for thread in threads:
        thread.join()
    until(long.quiet)


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_ends_when_its_client_leaves(long: Any, until: Any, stream: bool) -> None:
    with Line(long.port, endless(stream=stream)) as line:
        until(lambda: long.counts()["running"] == 1)
        if stream:
            line.until(b'"content":"')
    until(long.quiet)


def test_waiting_work_goes_when_its_client_leaves(long: Any, until: Any) -> None:
    running = [Line(long.port, endless()) for _ in range(2)]
    until(lambda: long.counts()["running"] == 2)
    waiting = [Line(long.port, endless(n=3)) for _ in range(3)]
    until(lambda: long.counts()["queued"] == 9)
    waiting[0].close()
    until(lambda: long.counts() == {"running": 2, "queued": 6, "requests": 4})
    for line in (*waiting, *running):
        line.close()
    until(long.quiet)


def test_the_client_of_openai_leaves_too(long: Any, until: Any) -> None:
    stream = long.client.chat.completions.create(**endless())
    next(iter(stream))
    stream.close()
    until(long.quiet)
    with pytest.raises(openai.APITimeoutError):
        long.client.with_options(timeout=0.3).chat.completions.create(**endless(stream=False))
    until(long.quiet)


@pytest.mark.slow
def test_sixty_clients_that_leave_at_any_moment(long: Any, until: Any) -> None:
    def visit(number: int) -> None:
        with Line(long.port, endless(n=1 + number % 3, stream=number % 4 > 0)) as line:
            end = time.monotonic() + 0.02 * (number % 10)
            line.socket.settimeout(0.05)
            with suppress(TimeoutError):
                while time.monotonic() < end:
                    line.socket.recv(1 << 16)

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(visit, range(60)))
    until(long.quiet)
    assert long.client.completions.create(model="m", prompt="a", max_tokens=5).usage.completion_tokens <= 5


# --- reading slowly --------------------------------------------------------------------------------------------------

SMALL = 4096


@pytest.fixture(scope="module")
def strict(serve: Any, make_model: Any) -> Iterator[Any]:
    """The system holds little back for a client, and the server not much."""
    served = serve(
        model=make_model(context=8192, endless=True), limits=Limits(unread=2000, stall=1.0), send_buffer=SMALL
    )
    yield served


def test_a_client_that_reads_nothing_is_dropped_and_stalls_nobody(strict: Any, until: Any) -> None:
    with Line(strict.port, endless(), buffer=SMALL) as line:
        line.until(b'"content":"')
        for number in range(3):
            answer = strict.client.completions.create(model="m", prompt="a", max_tokens=50, temperature=0)
            assert answer.usage.completion_tokens > 1, number
        until(strict.quiet)
        said = line.rest()  # what was on its way
        assert b"[DONE]" not in said
    assert not strict.server.server_state.connections or until(lambda: not strict.server.server_state.connections)


def test_what_waits_for_a_slow_client_is_bounded_and_it_is_told(serve: Any, make_model: Any, until: Any) -> None:
    """It reads nothing until its text is given up; then it hears why."""
    strict = serve(model=make_model(context=8192, endless=True), limits=Limits(unread=500, stall=60), send_buffer=SMALL)
    with Line(strict.port, endless(), buffer=SMALL) as line:
        line.until(b'"content":"')
        until(lambda: strict.counts() == {"running": 0, "queued": 0, "requests": 1})
        said = line.until(b"slow_reader")
    record = json.loads(said[said.index(b'{"error"') :].splitlines()[0])
    assert record["error"]["code"] == "slow_reader" and "slowly" in record["error"]["message"]
    assert b"[DONE]" not in said
    until(strict.quiet)


def test_a_client_that_reads_in_sips_gets_all(serve: Any, make_model: Any, until: Any) -> None:
    """As long as it reads at all: what it has not read yet comes in larger pieces."""
    patient = serve(model=make_model(context=2048, endless=True), send_buffer=SMALL)
    body = endless(max_tokens=600)
    with Line(patient.port, body, buffer=SMALL) as line:
        first = line.until(b'"role":"assistant"')
        until(lambda: patient.counts()["running"] == 0)
        said = line.until(b"data: [DONE]\n\n")
    pieces = [json.loads(part) for part in re.findall(rb"data: ({.*?})\n\n", first + said)]
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == patient.alone("Go on", max_tokens=600)
    until(patient.quiet)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_when_the_server_ends_those_who_wait_are_told(serve: Any, make_model: Any, until: Any) -> None:
    ending = serve(model=make_model(context=8192, endless=True), rows=1)
    with Line(ending.port, endless()) as talking, Line(ending.port, endless(stream=False)) as waiting:
        talking.until(b'"content":"')
        until(lambda: ending.counts()["queued"] == 1)
        ending.server.should_exit = True
        assert b'"code":"stopping"' in talking.rest()
        told = waiting.rest()
        assert told.startswith(b"HTTP/1.1 503") and b'"code":"stopping"' in told
    until(lambda: not ending.service.worker.thread.is_alive())
