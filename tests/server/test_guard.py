"""Who may ask, and how much: Host, Origin, token, content type, size, number."""

from __future__ import annotations

import http.client
import socket
from typing import Any

import httpx2 as httpx
import openai
import pytest

from siliconlm.errors import SiliconError
from siliconlm.server.completions import Limits
from siliconlm.server.guard import Access

TOKEN = "correct-horse"


def status_of(served: Any, head: str, body: bytes = b"") -> int:
    """Of a raw request; line ends are written as they are needed."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return int(line.recv(4096).split()[1])


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
@pytest.mark.parametrize("port", ["", ":8000", ":1"])
def test_names_of_this_computer_are_known(served: Any, host: str, port: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert httpx.get(served.url + path, headers={"host": host + port}).status_code == 200


STRANGE = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8000", "127.0.0.2"]
STRANGE += ["localhost.", "localhost:x", "localhost:80:80", "[::1", "::1", "0.0.0.0", "user@localhost", ""]


@pytest.mark.parametrize("host", STRANGE)
def test_a_name_that_was_led_here_is_not(served: Any, host: str) -> None:
    """DNS rebinding: the page of evil.example, whose name now stands for this computer. Nothing is answered to it."""
    for path in ("/", "/health", "/v1/models", "/nothing"):
        response = httpx.get(served.url + path, headers={"host": host})
        assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")
    assert served.post(headers={"host": host}).status_code == 403


def test_one_host_and_no_other(served: Any) -> None:
    assert status_of(served, "GET /health HTTP/1.1\nHost: localhost") == 200
    assert status_of(served, "GET /health HTTP/1.1\nHost: localhost\nHost: evil.example") == 400
    assert status_of(served, "GET /health HTTP/1.1") == 400
    assert status_of(served, "GET /health HTTP/1.0") == 403
    assert status_of(served, "GET http://evil.example/health HTTP/1.1\nHost: evil.example") == 403


@pytest.mark.parametrize(
    ("host", "header", "known"),
    [
        ("192.168.1.5", "192.168.1.5:8000", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("mac.local", "Mac.local:8000", True),
        ("mac.local", "evil.example", False),
        ("fd00::1", "[fd00::1]:8000", True),
        ("0.0.0.0", "192.168.1.5:8000", True),
        ("::", "[fd00::1]:8000", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", socket.gethostname(), True),
    ],
)
def test_the_host_that_was_given_is_known(host: str, header: str, known: bool) -> None:
    assert Access(host, TOKEN).admits(header) is known


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.local", "8.8.8.8"])
def test_letting_others_in_takes_a_token(host: str) -> None:
    with pytest.raises(SiliconError, match="there is no --token") as caught:
        Access(host)
    assert "\n" not in str(caught.value)
    assert not Access(host, TOKEN).is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_staying_at_home_takes_none(host: str) -> None:
    assert Access(host).is_local


# --- origins, content types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://localhost", "", "x"])
def test_requests_of_other_sites_are_refused(served: Any, origin: str) -> None:
    response = served.post(headers={"origin": origin, "host": f"localhost:{served.port}"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert served.quiet()


def test_requests_of_the_page_are_taken(served: Any) -> None:
    for name in ("localhost", "127.0.0.1"):
        origin = f"{name}:{served.port}"
        assert served.post(headers={"origin": f"http://{origin}", "host": origin}).status_code == 200


def test_no_other_site_may_read_or_ask_beforehand(served: Any) -> None:
    site = {"origin": "https://evil.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for response in (
        httpx.get(f"{served.url}/v1/models", headers=site),
        httpx.options(f"{served.url}/v1/chat/completions", headers=site | asked),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(served: Any, kind: str) -> None:
    """These kinds a page of another site can send without asking."""
    response = served.post(content=b'{"model": "m"}', headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_json_may_name_its_character_set(served: Any) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert served.post(content=b"{}", headers={"content-type": kind}).status_code == 400


# --- the page's headers ----------------------------------------------------------------------------------------------


def test_the_page_may_run_its_own_script_and_ask_nobody_else(served: Any) -> None:
    response = httpx.get(served.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert "server" not in response.headers
    outside = [word for word in response.text.split() if "http://" in word or "https://" in word]
    assert [word for word in outside if "www.w3.org" not in word] == [], "no request leaves this computer"


def test_answers_are_not_kept_and_not_framed(served: Any) -> None:
    for response in (httpx.get(f"{served.url}/v1/models"), served.post(content=b""), httpx.get(f"{served.url}/x")):
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(serve: Any) -> Any:
    return serve(token=TOKEN)


def test_the_token_opens(locked: Any) -> None:
    assert locked.client.models.list().data[0].id == "m"
    for word in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
        assert locked.post(headers={"authorization": word}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}, {"authorization": "Bearer"}]
    + [{"authorization": f"Bearer {word}"} for word in (TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é")]
    + [{"cookie": f"token={TOKEN}"}, {"x-api-key": TOKEN}],
    ids=str,
)
def test_without_it_nothing_is_said_of_the_model(locked: Any, headers: dict[str, str]) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    for response in (
        httpx.get(f"{locked.url}/v1/models", headers=raw),
        httpx.get(f"{locked.url}/v1/nothing", headers=raw),
        httpx.get(f"{locked.url}/v1/models?token={TOKEN}", headers=raw),
        locked.post(headers=raw),
        locked.post(f"/v1/completions?token={TOKEN}", content=b"x", headers=raw),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer" and TOKEN not in response.text
    with pytest.raises(openai.AuthenticationError):
        locked.client.with_options(api_key="wrong-token").models.list()


def test_the_page_and_the_health_need_none(locked: Any) -> None:
    assert httpx.get(locked.url).status_code == 200
    assert httpx.get(f"{locked.url}/health").json().keys() == {"status", "running", "queued", "requests"}


@pytest.mark.parametrize("token", ["", "short", "two words", "päßwörter", "line\nend12"])
def test_a_token_that_no_header_could_hold_or_anyone_guess(token: str) -> None:
    with pytest.raises(SiliconError, match="--token must be"):
        Access("127.0.0.1", token)


# --- sizes and numbers -----------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large(served: Any) -> None:
    limit = served.service.limits.body
    right, wrong = (
        {"content": b" " * size, "headers": {"content-type": "application/json"}} for size in (limit, limit + 1)
    )
    assert served.post(**right).json()["error"]["code"] == "invalid_json"
    response = served.post(**wrong)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_say_how_large_it_is(served: Any) -> None:
    line = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    line.request(
        "POST", "/v1/chat/completions", (b" " * 4096 for _ in range(400)), {"content-type": "application/json"}
    )
    assert line.getresponse().status == 413
    line.close()


def test_a_body_that_does_not_come(serve: Any) -> None:
    slow = serve(limits=Limits(stall=0.2))
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 100"
    assert status_of(slow, head, b"{") == 408
    assert slow.quiet()


def test_more_requests_than_there_is_room_for(serve: Any, until: Any) -> None:
    full = serve(limits=Limits(requests=2))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    lines = [socket.create_connection(("127.0.0.1", full.port), timeout=20) for _ in range(2)]
    for line in lines:
        line.sendall(f"{head}Content-Length: 10\r\n\r\n".encode())  # and then nothing
    until(lambda: full.counts()["requests"] == 2)
    response = full.post()
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "1"
    for line in lines:
        line.close()
    assert full.client.with_options(max_retries=5).models.list().data
    until(full.quiet)
    assert full.post().status_code == 200
