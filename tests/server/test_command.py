"""`silicon serve` as a process: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx2 as httpx
import pytest


@pytest.fixture(scope="module")
def folder(write_model: Any, make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "talker", make_model(context=8192, endless=True))


class Command:
    """A child process that serves."""

    def __init__(self, *words: str | Path, **environment: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "siliconlm", "serve", *map(str, words)]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=settings, **streams)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def serving(self) -> dict[str, Any]:
        """Its first line."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def server(folder: Path) -> Iterator[Command]:
    with Command(folder, "--port", "0", "--device", "cpu", "--json") as command:
        yield command


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_serves_until_a_signal(server: Command, number: signal.Signals, code: int) -> None:
    """With a text in the making, whose reader is told."""
    told = server.serving()
    assert (told["event"], told["model"], told["chat"], told["context"]) == ("serving", "talker", True, 8192)
    assert told["url"].startswith("http://127.0.0.1:") and told["rows"] == 16
    body = {"model": "talker", "messages": [{"role": "user", "content": "Go on"}], "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{told['url']}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        server.process.send_signal(number)
        rest = list(lines)
    assert '"code":"stopping"' in rest[-2] and "[DONE]" not in "".join(rest)
    done = server.ended()
    assert done[0] == code and "Traceback" not in done[2]
    assert done[2] == ("stopped\n" if number == signal.SIGINT else "")


def test_it_ends_though_a_client_reads_nothing(server: Command) -> None:
    port = int(server.serving()["url"].rsplit(":", 1)[1])
    body = json.dumps({"model": "talker", "prompt": "a", "n": 8, "stream": True, "temperature": 0})
    with socket.create_connection(("127.0.0.1", port)) as line:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        line.recv(1)
        code, _, err = server.end(signal.SIGTERM)
    assert (code, err) == (143, "")


def test_people_read_where_it_is(folder: Path) -> None:
    with Command(folder, "--port", "0", "--device", "cpu") as command:
        assert command.process.stdout and command.process.stderr
        first = command.process.stdout.readline()
        assert first.startswith("talker on cpu float32: http://127.0.0.1:")
        assert "Ctrl-C ends it" in command.process.stderr.readline()
        with urlopen(first.split()[-1]) as page:
            assert b"<title>SiliconLM</title>" in page.read()
        assert command.end(signal.SIGINT)[:2] == (130, "")


def refused(*words: str | Path, **environment: str) -> list[str]:
    """The lines of a command that does not begin to serve."""
    with Command(*words, **environment) as command:
        code, out, err = command.ended()
    assert (code, out) == (1, ""), err
    return err.splitlines()


def test_letting_others_in_without_a_token(folder: Path) -> None:
    told = refused(folder, "--host", "0.0.0.0", "--port", "0")
    assert told == [
        "error: --host 0.0.0.0 lets other computers in, and there is no --token",
        "  Type --token WORD too, or leave --host out.",
    ]


def test_a_token_from_the_environment(folder: Path) -> None:
    with Command(folder, "--host", "0.0.0.0", "--port", "0", "--json", SILICON_TOKEN="correct-horse") as command:
        url = command.serving()["url"].replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        shown = {"authorization": "Bearer correct-horse"}
        assert httpx.get(f"{url}/v1/models", headers=shown).status_code == 200


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        first, second = refused(folder, "--port", port)
    assert first.startswith(f"error: cannot listen at 127.0.0.1, port {port}: ") and "--port" in second


def test_an_address_that_is_not_ours(folder: Path) -> None:
    first, _ = refused(folder, "--host", "192.0.2.1", "--token", "correct-horse")
    assert first.startswith("error: cannot listen at 192.0.2.1, port 8000: ")


def test_a_template_that_does_not_fit_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    first, _ = refused(folder, "--template", "nanochat", "--port", "0")
    assert first.startswith("error: template nanochat needs <|")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    assert len(refused(folder, "--template", str(tmp_path / "bad.jinja"), "--port", "0")) <= 2


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_one_line_says_what_to_type(folder: Path, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['silicon', 'serve']\n"
    code += "from siliconlm.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"error: serving needs {missing}, which is not installed",
        "  Type: pip install 'siliconlm[serve]'",
    ]
