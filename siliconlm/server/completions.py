"""The two endpoints that make text: from a request to a stream of pieces, for as long as the client stays."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from siliconlm.config import SampleConfig
from siliconlm.data.chat import Template
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Sampled
from siliconlm.hardware.device import is_out_of_memory
from siliconlm.inference.conversation import ROOM, fitted
from siliconlm.inference.session import check_prompt
from siliconlm.server.protocol import DONE, MOST_TEXTS, ApiError, Asked, ChatAsked, Form, TextAsked, event, parse, told
from siliconlm.server.worker import News, Stopped, Work, Worker

Piece = tuple[int, str, Sampled | None]  # number of the text, what is new of it, its counts if it has ended


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes upon itself: bytes, requests, characters, seconds."""

    body: int = 1 << 20
    requests: int = 128  # at once, those that wait included
    unread: int = 1 << 18  # of a text, beyond what the network holds; then its client is too slow
    stall: float = 30.0  # for a client that sends or takes nothing


@dataclass(frozen=True, slots=True)
class Order:
    """A request, ready to be made: prompts, how their texts are drawn, and how written."""

    form: Form
    prompts: list[tuple[list[int], SampleConfig]]
    ends: frozenset[int]
    seed: int
    asked: Asked
    dropped: int = 0  # messages of a conversation that did not fit

    @property
    def headers(self) -> dict[str, str]:
        return {"x-dropped-messages": str(self.dropped)} if self.dropped else {}

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt, _ in self.prompts)

    def works(self, client: Hashable, tell: Callable[[int, News], None]) -> Iterator[Work]:
        """The texts to be made: `n` of each prompt."""
        for index in range(len(self.prompts) * self.asked.n):
            prompt, settings = self.prompts[index // self.asked.n]
            yield Work(client, prompt, settings, self.seed, index, self.ends, partial(tell, index))


class Job:
    """The texts of one request in the making. Text that comes while the client is busy reading is joined."""

    def __init__(self, worker: Worker, order: Order, client: Hashable, unread: int) -> None:
        self.worker, self.unread = worker, unread
        self.works = list(order.works(client, self._take))
        self.texts = [""] * len(self.works)
        self.ends: list[Sampled | None] = [None] * len(self.works)
        self.fault: Exception | None = None
        self.changed = asyncio.Event()

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What is new, until all texts have ended. Left early, it ends them."""
        try:
            for work in self.works:
                self.worker.submit(work)
            open_texts = set(range(len(self.works)))
            while open_texts:
                await self.changed.wait()
                self.changed.clear()
                if self.fault:
                    raise _fault(self.fault)
                new = [(at, self.texts[at], self.ends[at]) for at in sorted(open_texts) if self._is_new(at)]
                self.texts = [""] * len(self.works)
                open_texts -= {at for at, _, end in new if end}
                yield new
        finally:
            self._cancel()

    def _is_new(self, at: int) -> bool:
        return bool(self.texts[at] or self.ends[at])

    def _take(self, at: int, news: News) -> None:
        if isinstance(news, Sampled):
            self.texts[at] += news.text
            self.ends[at] = news if news.done else None
        else:
            self.fault = news
        if len(self.texts[at]) > self.unread:
            self.fault = ApiError(408, "the client reads more slowly than the model writes", code="slow_reader")
            self._cancel()
        self.changed.set()

    def _cancel(self) -> None:
        for work in self.works:
            self.worker.cancel(work)


class Service:
    """A model, and what it can be asked. `template` is an error that says why, where it was not taught to talk.

    `hang_up` drops the connection of a client, by its address.
    """

    def __init__(self, name: str, worker: Worker, template: Template | SiliconError, limits: Limits) -> None:
        self.name, self.worker, self.template, self.limits = name, worker, template, limits
        self.context = worker.batch.model.config.context
        self.hang_up: Callable[[Any], None] = lambda client: None
        self.requests = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.worker.tokenizer

    def counts(self) -> dict[str, int]:
        return self.worker.counts() | {"requests": self.requests}

    @contextmanager
    def seat(self) -> Iterator[None]:
        """A place for a request; ApiError where all are taken."""
        if self.requests >= self.limits.requests:
            raise ApiError(429, "too many requests wait already; try again soon", code="queue_full")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def chat(self, body: bytes) -> Order:
        """A conversation to be answered. Its oldest turns are left out where it is longer than the context."""
        asked = parse(ChatAsked, body)
        self.check_model(asked.model)
        if isinstance(self.template, SiliconError):
            raise told(self.template, "messages", "no_chat_template")
        messages = asked.conversation()
        with _as_api_error("messages"):
            check_prompt(self.tokenizer, "".join(message.content for message in messages))
        room = max(1, min(asked.limit or self.context, self.context // ROOM))
        with _as_api_error("messages", "context_length_exceeded"):
            kept, dropped = fitted(self.template, messages, self.context, room)
        return self._order(Form("chat", self.name), asked, [self.template.prompt(kept)], self.template.ends, dropped)

    def text(self, body: bytes) -> Order:
        """Texts to be continued; an empty one starts a new document."""
        asked = parse(TextAsked, body)
        self.check_model(asked.model)
        if not 0 < len(asked.prompts) * asked.n <= MOST_TEXTS:
            raise ApiError(400, f"prompt: 1 to {MOST_TEXTS} texts are made at once", param="prompt")
        with _as_api_error("prompt"):
            check_prompt(self.tokenizer, "".join(asked.prompts))
        prompts = [self.tokenizer.encode(prompt) or [self.tokenizer.eos] for prompt in asked.prompts]
        longest = max(map(len, prompts))
        if longest >= self.context:
            words = f"the prompt is too long: {longest:,} tokens, and the model's context is {self.context:,}"
            raise ApiError(400, words, param="prompt", code="context_length_exceeded")
        return self._order(Form("text", self.name), asked, prompts, frozenset())

    def _order(
        self, form: Form, asked: Asked, prompts: list[list[int]], ends: frozenset[int], dropped: int = 0
    ) -> Order:
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        texts = [(prompt, asked.settings(self.context - len(prompt))) for prompt in prompts]
        return Order(form, texts, ends, seed, asked, dropped)

    def check_model(self, name: str) -> None:
        """ApiError for another name than the model's."""
        if name != self.name:
            words = f"there is no model {name}; {self.name} is served"
            raise ApiError(404, words, param="model", code="model_not_found")


@contextmanager
def _as_api_error(param: str, code: str | None = None) -> Iterator[None]:
    try:
        yield
    except SiliconError as error:
        raise told(error, param, code) from None


class Completions:
    """An ASGI endpoint: reads a request, makes its texts, and writes them at once or as they come."""

    def __init__(self, service: Service, order: Callable[[bytes], Order]) -> None:
        self.service, self.order, self.limits = service, order, service.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with self.service.seat(), suppress(ClientDisconnect):
            body = await self._body(request)
            order = await asyncio.to_thread(self.order, body)
            job = Job(self.service.worker, order, _client(request, order.asked), self.limits.unread)
            try:
                await _unless_gone(receive, self._answer(job, order, scope, receive, send))
            except TimeoutError:
                self.service.hang_up(scope["client"])
                await asyncio.sleep(0)  # the connection is lost with the loop's next turn

    async def _body(self, request: Request) -> bytes:
        body, most = bytearray(), self.limits.body
        try:
            async with asyncio.timeout(self.limits.stall):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", code="timeout") from None
        return bytes(body)

    async def _answer(self, job: Job, order: Order, scope: Scope, receive: Receive, send: Send) -> None:
        if order.asked.stream:
            await self._stream(job, order, send)
        else:
            response = JSONResponse(await self._whole(job, order), headers=order.headers)
            async with asyncio.timeout(self.limits.stall):
                await response(scope, receive, send)

    async def _whole(self, job: Job, order: Order) -> dict[str, Any]:
        texts = [""] * len(job.works)
        async with aclosing(job.pieces()) as news:
            async for pieces in news:
                for index, text, _ in pieces:
                    texts[index] += text
        return order.form.whole(texts, [end for end in job.ends if end], order.prompt_tokens)

    async def _stream(self, job: Job, order: Order, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self.limits.stall):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = {"content-type": "text/event-stream; charset=utf-8"} | order.headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        if order.form.kind == "chat":
            await write(b"".join(event(order.form.opening(index)) for index in range(len(job.works))))
        try:
            async with aclosing(job.pieces()) as news:
                async for pieces in news:
                    await write(b"".join(event(order.form.piece(*piece)) for piece in pieces))
        except ApiError as error:
            await write(event(error.as_json()), more=False)
            return
        counts = order.form.counts(order.prompt_tokens, [end for end in job.ends if end])
        await write((event(counts) if order.asked.with_usage else b"") + DONE, more=False)


def _client(request: Request, asked: Asked) -> Hashable:
    """Who asks, as far as turns go: an address, the program there, and the user it names."""
    return request.client and request.client.host, request.headers.get("user-agent"), asked.user


def _fault(error: Exception) -> Exception:
    """What is said to a client of an error in the making; others are faults of ours."""
    if isinstance(error, Stopped):
        return ApiError(503, "the server is stopping", code="stopping")
    if is_out_of_memory(error):
        return ApiError(503, "the computer is out of memory", code="out_of_memory")
    return error


async def _unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do something for a client, until it leaves."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait({doing, leaving})


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
