"""OpenAI's forms: what a request may ask, how answers are written, and how errors are."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from siliconlm.config import SampleConfig
from siliconlm.data.chat import Conversation, conversation
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Sampled

MOST_TEXTS = 8  # of one request
DONE = b"data: [DONE]\n\n"


# --- errors ----------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """What went wrong, as OpenAI says it. `param` is the field at fault, `code` a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_json(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def told(error: SiliconError, param: str, code: str | None = None) -> ApiError:
    """A fault of a request that was found farther down."""
    message = f"{error.what}. {error.fix}" if error.fix else error.what
    return ApiError(400, message, param=param, code=code)


# --- requests --------------------------------------------------------------------------------------------------------

# Taken, and of no effect here.
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
# Taken at the values that change nothing; others could not be honoured.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(BaseModel):
    """What both kinds of request may hold, but for what changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int = Field(1, ge=1, le=MOST_TEXTS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, longest: int) -> SampleConfig:
        """How to draw the text, of `longest` tokens at most; ApiError where a value is out of bounds."""
        _check(len(self.stops) <= 4 and all(self.stops), "stop", "up to four texts, none of them empty")
        _check(self.stream or self.stream_options is None, "stream_options", "it needs stream = true")
        given = {"max_tokens": self.limit, "temperature": self.temperature, "top_p": self.top_p}
        values = {name: value for name, value in given.items() if value is not None}
        try:
            asked = SampleConfig(**{"max_tokens": longest, "stop": self.stops, **values})
        except ValidationError as error:
            raise _fault(error, SampleConfig) from None
        return asked.model_copy(update={"max_tokens": min(asked.max_tokens, longest)})


class ChatAsked(Asked):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> Conversation:
        """What was said so far, a question last; ApiError where that is no conversation."""
        said = []
        for number, message in enumerate(self.messages):
            for name in message.keys() - {"role", "content"}:
                words = f"messages[{number}].{name}: this server cannot honour it"
                _check(message[name] is None, "messages", words)
            said.append(message | {"role": "system"} if message.get("role") == "developer" else message)
        try:
            messages = conversation(said, "messages")
        except SiliconError as error:
            raise ApiError(400, error.what, param="messages") from None
        _check(messages[-1].role == "user", "messages", "the last one must be the user's")
        return messages


class TextAsked(Asked):
    prompt: str | list[str]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


A = TypeVar("A", bound=Asked)


def parse(kind: type[A], body: bytes) -> A:
    """A request out of JSON; ApiError that names the field at fault. Null is as if a field were not there."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    given = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    for name in given.keys() & NEUTRAL.keys():
        words = f"this server cannot honour it; only {json.dumps(NEUTRAL[name][0])} is taken"
        _check(given.pop(name) in NEUTRAL[name], name, words)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _fault(error, kind) from None


def _check(right: bool, param: str, words: str) -> None:
    if not right:
        raise ApiError(400, f"{param}: {words}", param=param)


def _fault(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    problem = error.errors(include_url=False)[0]
    path, param = ".".join(map(str, problem["loc"])), str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        close = nearest(path, kind.model_fields)
        return ApiError(400, f"unknown field {path}. {close}".strip(), param=param, code="unknown_parameter")
    words = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {words[0].lower()}{words[1:]}", param=param)


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """How the texts of one request are written: as a chat's messages, or plain."""

    kind: Literal["chat", "text"]
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: list[str], ends: list[Sampled], prompt_tokens: int) -> dict[str, Any]:
        """All at once."""
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            what = said if self.kind == "chat" else {"text": text}
            choices.append({"index": index, **what, "logprobs": None, "finish_reason": finish_reason(end)})
        return self._head(kind) | {"choices": choices, "usage": usage(prompt_tokens, ends)}

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks, before the first piece of a chat's text."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str, end: Sampled | None) -> dict[str, Any]:
        """The next piece of a text; the last one says why it ends."""
        what = {"delta": {"content": text} if text else {}} if self.kind == "chat" else {"text": text}
        return self._chunk(index, what, finish_reason(end) if end else None)

    def counts(self, prompt_tokens: int, ends: list[Sampled]) -> dict[str, Any]:
        """The last of a stream."""
        return self._head(self._chunks) | {"choices": [], "usage": usage(prompt_tokens, ends)}

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _chunk(self, index: int, what: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **what, "logprobs": None, "finish_reason": reason}
        return self._head(self._chunks) | {"choices": [choice]}

    def _head(self, object: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.kind == "chat" else "cmpl-"
        return {"id": prefix + self.id, "object": object, "created": self.created, "model": self.model}


def finish_reason(end: Sampled) -> str:
    return "length" if end.stopped_by == "max_tokens" else "stop"


def usage(prompt_tokens: int, ends: list[Sampled]) -> dict[str, int]:
    made = sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


def event(record: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
