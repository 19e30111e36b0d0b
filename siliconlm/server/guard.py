"""Who may ask: checked of every request before anything else reads it.

A server on one's own computer can be reached by every page that its browser shows. Such a page can send requests under
a name of its own that leads here (DNS rebinding): so the Host header counts. It can send requests without reading the
answers: so the Origin header and the content type count.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from siliconlm.errors import SiliconError
from siliconlm.server.protocol import ApiError

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Access:
    """The host a server listens at, and the token it asks for, if any.

    SiliconError where others could reach it without a token.
    """

    host: str
    token: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]{8,}", self.token):
            raise SiliconError("--token must be 8 or more letters, digits and signs, without spaces", kind="usage")
        if self.token is None and not self.is_local:
            what = f"--host {self.host} lets other computers in, and there is no --token"
            raise SiliconError(what, fix="Type --token WORD too, or leave --host out.", kind="usage")

    @property
    def is_local(self) -> bool:
        """Whether this computer alone can reach it."""
        return self.host == "localhost" or (_is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)

    def admits(self, host: str) -> bool:
        """Whether a Host header names this server, with a port or without.

        Where it listens at every address, any address will do: rebinding needs a name.
        """
        name = re.sub(r":\d+$", "", host).lower()
        if name in LOCAL | {self.host.lower(), f"[{self.host}]".lower()}:
            return True
        anywhere = _is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified
        return anywhere and (_is_address(name.strip("[]")) or name == socket.gethostname().lower())

    def knows(self, authorization: str) -> bool:
        """Whether an Authorization header holds the token; compared in constant time."""
        scheme, _, word = authorization.partition(" ")
        if self.token is None:
            return True
        return scheme.lower() == "bearer" and hmac.compare_digest(word.strip().encode(), self.token.encode())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Guard:
    """Turns away what is not allowed, and sends the headers that keep answers from other sites."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await refusal(error)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """ApiError for a request that may not be made."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.access.admits(host):
            raise ApiError(403, f"this server is not called {host or 'nothing'}", code="host_not_allowed")
        ours = (None, f"http://{host}", f"https://{host}")
        if method not in ("GET", "HEAD") and origin not in ours:
            raise ApiError(403, f"requests of other sites ({origin}) are not taken", code="origin_not_allowed")
        if path.startswith("/v1/") and not self.access.knows(headers.get("authorization", "")):
            raise ApiError(401, "the token is missing or wrong: Authorization: Bearer TOKEN", code="invalid_api_key")
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "requests are JSON: Content-Type: application/json", code="unsupported_media_type")


def refusal(error: ApiError) -> JSONResponse:
    """An error as a response."""
    headers: dict[str, Any] = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    return JSONResponse(error.as_json(), error.status, headers)
