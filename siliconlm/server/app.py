"""A model behind OpenAI's API, and the page to talk with it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from siliconlm.data.chat import Template
from siliconlm.engine import Opened, open_batch
from siliconlm.errors import SiliconError
from siliconlm.events import Event, Serving
from siliconlm.server.completions import Completions, Limits, Service
from siliconlm.server.guard import Access, Guard, refusal
from siliconlm.server.protocol import ApiError
from siliconlm.server.worker import Worker

CONNECTIONS = 256
GRACE = 1.0  # seconds for clients to take what is left, when the server ends


def serve(
    name: str | None, host: str, port: int, token: str | None, device: str | None, template: str | None
) -> Iterator[Event]:
    """Serve a model until a signal ends it; a Serving says where."""
    access = Access(host, token)
    with _listening(host, port) as listener:
        opened, batch = yield from open_batch(name, device)
        talks = _template(opened, template)
        service = Service(opened.name, Worker(batch, opened.tokenizer), talks, Limits())
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        place, chat = batch.reader.device, isinstance(talks, Template)
        yield Serving(url, opened.name, f"{place.kind} {place.dtype_name}", service.context, batch.size, chat)
        Server(service, access).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; SiliconError where it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        what = f"cannot listen at {host}, port {port}: {error.strerror}"
        raise SiliconError(what, fix="Choose another --port (0 takes a free one) or --host.") from None


def _template(opened: Opened, word: str | None) -> Template | SiliconError:
    """How a model was taught to talk, or why it cannot."""
    try:
        template = opened.template(word)
    except SiliconError as error:
        if word is not None:
            raise
        return error
    assert template.ends  # an unsound one shows before the first question
    return template


class Server(uvicorn.Server):
    """Ends quickly: texts in the making are cut off, and so are clients that do not take the end."""

    def __init__(self, service: Service, access: Access) -> None:
        config = uvicorn.Config(
            application(service, access),
            loop="asyncio",
            http=H11Protocol,
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
        )
        super().__init__(config)
        self.worker, service.hang_up = service.worker, self.hang_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.close()
        asyncio.get_running_loop().call_later(GRACE, self.hang_up)
        await super().shutdown(sockets)

    def hang_up(self, client: Any = None) -> None:
        """Drop the connection of a client, or all."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol) and client in (None, connection.client):
                connection.transport.abort()


def application(service: Service, access: Access) -> Starlette:
    """The routes, behind the guard."""
    page, policy = _page()
    headers = {"content-security-policy": policy, "cache-control": "no-cache"}
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "siliconlm"}
    card |= {"context_length": service.context, "chat": isinstance(service.template, Template)}

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"} | service.counts())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(card)

    routes = [
        Route("/", show),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route("/v1/chat/completions", Completions(service, service.chat), methods=["POST"]),
        Route("/v1/completions", Completions(service, service.text), methods=["POST"]),
    ]
    faults: dict[Any, Callable[[Request, Any], Response]] = {ApiError: _api, HTTPException: _http, Exception: _bug}
    guard = Middleware(Guard, access=access)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=faults, lifespan=_working(service.worker))


def _working(worker: Worker) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.close()
            await asyncio.to_thread(worker.thread.join, GRACE)

    return lifespan


def _api(_: Request, error: ApiError) -> Response:
    return refusal(error)


def _http(request: Request, error: HTTPException) -> Response:
    words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not what this is for"}
    response = refusal(ApiError(error.status_code, words.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


def _bug(_: Request, error: Exception) -> Response:
    return refusal(ApiError(500, "something went wrong here; the terminal of the server says what"))


def _page() -> tuple[str, str]:
    """The page, and a policy by which it can run its own script and style, and ask nobody else."""
    page = resources.files("siliconlm.server").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    rules = f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
    rules += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    return page, rules


def _hash(page: str, tag: str) -> str:
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
