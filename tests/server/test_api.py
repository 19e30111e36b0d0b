"""OpenAI's API by OpenAI's own client, and its error forms."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

from siliconlm.config import SampleConfig
from siliconlm.data.chat import Message
from siliconlm.inference.session import generate
from siliconlm.server.protocol import MOST_TEXTS


def ask(served: Any, text: str = "Who are you?", **options: Any) -> Any:
    said = [{"role": "user", "content": text}]
    return served.client.chat.completions.create(**{"model": "m", "messages": said, "temperature": 0, **options})


def continued(served: Any, prompt: str, seed: int = 0, **settings: Any) -> tuple[str, int, str]:
    """The text that the one-by-one path makes, its tokens, and why it ends."""
    model, tokenizer = served.service.worker.batch.model, served.tokenizer
    room = served.service.context - max(1, len(tokenizer.encode(prompt)))
    drawn = SampleConfig(**{"temperature": 0, "max_tokens": room, **settings})
    pieces = list(generate(model, tokenizer, served.device, prompt, drawn, seed))
    return "".join(piece.text for piece in pieces), pieces[-1].tokens, pieces[-1].stopped_by


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_model_is_listed(served: Any) -> None:
    [model] = served.client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("m", "model", "siliconlm")
    assert served.client.models.retrieve("m").id == "m"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("n")


def test_an_answer_is_the_models(served: Any) -> None:
    answer = ask(served)
    [choice] = answer.choices
    assert choice.message.content == served.alone("Who are you?") and choice.message.role == "assistant"
    assert answer.object == "chat.completion" and answer.model == "m" and answer.id.startswith("chatcmpl-")
    prompt = served.service.template.prompt((Message("user", "Who are you?"),))
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_conversation_with_a_system_message(served: Any) -> None:
    talk = [("developer", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Bye")]
    said = [{"role": role, "content": content} for role, content in talk]
    asked = {"messages": said, "model": "m", "temperature": 0}
    answer = served.client.chat.completions.create(**asked)
    said[0]["role"] = "system"
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in said]
    assert answer.choices[0].message.content == ask(served, messages=parts).choices[0].message.content
    assert answer.choices[0].message.content != ask(served, "Bye").choices[0].message.content


def test_a_stream_says_who_speaks_then_the_text_then_why_it_ends(served: Any) -> None:
    whole = ask(served)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, counts = chunks
    assert first.choices[0].delta.role == "assistant" and not first.choices[0].delta.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [*middle, last])
    assert text == whole.choices[0].message.content and len(middle) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert counts.choices == [] and counts.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_on_the_wire(served: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 2}
    response = served.post(json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response)
    assert done == "[DONE]" and not any(chunk.get("usage") for chunk in chunks)
    assert response.text.endswith("data: [DONE]\n\n")


def test_plain_text_is_continued(served: Any) -> None:
    for prompt in ("To be", ""):
        text, tokens, _ = continued(served, prompt, max_tokens=20)
        answer = served.client.completions.create(model="m", prompt=prompt, max_tokens=20, temperature=0)
        assert answer.choices[0].text == text and answer.usage.completion_tokens == tokens
        assert answer.object == "text_completion"
        streamed = served.client.completions.create(model="m", prompt=prompt, max_tokens=20, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_a_seed_gives_its_texts_again(served: Any) -> None:
    """Each of them with a seed of its own, as `silicon sample` draws them."""
    options = {"model": "m", "prompt": "O", "temperature": 1.3, "top_p": 0.9, "max_tokens": 12}
    answer = served.client.completions.create(**options, seed=5, n=3)
    texts = [choice.text for choice in answer.choices]
    settings = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 12}
    assert texts == [continued(served, "O", 5 + index, **settings)[0] for index in range(3)]
    assert len(set(texts)) == 3
    drawn = {served.client.completions.create(**options).choices[0].text for _ in range(4)}
    assert len(drawn) > 1, "without a seed each time another"
    served.client.completions.create(**options, seed=-3)


def test_several_texts_come_in_one_stream(served: Any) -> None:
    whole = ask(served, n=3, temperature=1, seed=2)
    texts = dict.fromkeys(range(3), "")
    roles = []
    for chunk in ask(served, n=3, temperature=1, seed=2, stream=True):
        [choice] = chunk.choices
        roles += [choice.index] if choice.delta.role else []
        texts[choice.index] += choice.delta.content or ""
    assert roles == [0, 1, 2]
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    both = served.client.completions.create(model="m", prompt=["a", "b"], n=2, temperature=0, max_tokens=5)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[::2]] == [continued(served, x, max_tokens=5)[0] for x in "ab"]


def test_why_it_ends(served: Any) -> None:
    whole = ask(served).choices[0].message.content
    for limit in ("max_tokens", "max_completion_tokens"):
        short = ask(served, **{limit: 3})
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
        assert whole.startswith(short.choices[0].message.content)
    for stop in (whole[5:7], ["nowhere", whole[5:7]]):
        stopped = ask(served, stop=stop)
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].message.content == whole.partition(whole[5:7])[0]


def test_the_end_of_the_context_is_a_length(serve: Any) -> None:
    small = serve(model=None)
    text, tokens, why = continued(small, "x" * 200)
    answer = small.client.completions.create(model="m", prompt="x" * 200, temperature=0, max_tokens=10_000)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (text, tokens)
    assert answer.choices[0].finish_reason == ("length" if why == "max_tokens" else "stop")
    assert answer.usage.total_tokens <= 256


def test_a_long_history_loses_its_oldest_turns_whole(served: Any) -> None:
    old = [{"role": role, "content": f"{n} {role} says something"} for n in range(20) for role in ("user", "assistant")]
    head, last = [{"role": "system", "content": "Be kind."}], [{"role": "user", "content": "And now?"}]
    answer = ask(served, messages=[*head, *old, *last])
    kept = next(old[start:] for start in range(0, 40, 2) if fits(served, [*head, *old[start:], *last]))
    assert 0 < len(kept) < 40
    assert answer.choices[0].message.content == ask(served, messages=[*head, *kept, *last]).choices[0].message.content
    assert answer.usage.prompt_tokens == tokens_of(served, [*head, *kept, *last])


def tokens_of(served: Any, messages: list[dict[str, str]]) -> int:
    return len(served.service.template.prompt(tuple(Message(**message) for message in messages)))


def fits(served: Any, messages: list[dict[str, str]]) -> bool:
    """A quarter of the context is for the answer."""
    return tokens_of(served, messages) + served.service.context // 4 <= served.service.context


# --- what is refused -------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hi"}]
FINE: list[dict[str, Any]] = [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": []},
    {"response_format": {"type": "text"}, "tool_choice": "none", "service_tier": "auto", "store": False},
    {"user": "ann", "metadata": {"a": "b"}, "parallel_tool_calls": False, "modalities": ["text"]},
    {"temperature": None, "stop": None, "n": None, "seed": None, "tools": None, "stream_options": None},
    {"messages": [{"role": "user", "content": "Hi", "name": None}]},
    {"stop": ["a", "b", "c", "d"]},
    {"temperature": 2, "top_p": 1},
]
WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", "Did you mean temperature?"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": 1e-9}, "temperature", "at least 0.001"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"n": MOST_TEXTS + 1}, "n", str(MOST_TEXTS)),
    ({"n": 0}, "n", "1"),
    ({"seed": 1 << 63}, "seed", "less than"),
    ({"stop": ["a"] * 5}, "stop", "up to four"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": [1]}, "stop", "string"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "cannot honour"),
    ({"presence_penalty": -1}, "presence_penalty", "cannot honour"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "cannot honour"),
    ({"logprobs": True}, "logprobs", "cannot honour"),
    ({"tools": [{"type": "function"}]}, "tools", "cannot honour"),
    ({"response_format": {"type": "json_object"}}, "response_format", "cannot honour"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "unknown"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": "Hi"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages", "'robot'"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
    ({"messages": [*HELLO, *HELLO]}, "messages", "out of order"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages", "last"),
    ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, "messages", "name"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]},
        "messages",
        "text",
    ),
    ({"messages": [{"role": "user", "content": "日本"}]}, "messages", "'日'"),
    ({"model": None}, "model", "required"),
]


@pytest.mark.parametrize("values", FINE, ids=str)
def test_what_changes_nothing_is_taken(served: Any, values: dict[str, Any]) -> None:
    response = served.post(json={"model": "m", "messages": HELLO, "max_tokens": 1, **values})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("values", "param", "words"), WRONG, ids=str)
def test_what_cannot_be_honoured_is_refused_by_name(
    served: Any, values: dict[str, Any], param: str | None, words: str
) -> None:
    response = served.post(json={"model": "m", "messages": HELLO, **values})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"], error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"model": NaN}', "\udc80", "[" * 100_000, '{"model": "\\ud800"}'], ids=range(8)
)
def test_what_is_no_json_is_refused(served: Any, body: str) -> None:
    content = body.encode("utf-8", "surrogateescape")
    response = served.post(content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_another_model_is_not_found(served: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(served, model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_what_does_not_fit_the_context_is_refused(served: Any) -> None:
    for refused in (
        lambda: ask(served, "x" * 300),
        lambda: served.client.completions.create(model="m", prompt="x" * 300),
    ):
        with pytest.raises(openai.BadRequestError, match="too long") as caught:
            refused()
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"prompt": ["a"] * (MOST_TEXTS + 1)}, "prompt"),
        ({"prompt": ["a", "b", "c"], "n": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": "é"}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ({}, "prompt"),
    ],
)
def test_plain_text_has_its_bounds_too(served: Any, values: dict[str, Any], param: str) -> None:
    response = served.post("/v1/completions", json={"model": "m", **values})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_model_that_was_not_taught_to_talk_says_so(serve: Any) -> None:
    base = serve(talks=False)
    assert base.client.completions.create(model="m", prompt="a", max_tokens=1).choices
    with pytest.raises(openai.BadRequestError, match="not tuned on conversations") as caught:
        ask(base)
    assert caught.value.code == "no_chat_template"


def test_other_paths_and_methods(served: Any) -> None:
    missing, wrong = httpx.get(f"{served.url}/v1/nothing"), httpx.get(f"{served.url}/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/nothing" in missing.json()["error"]["message"] and wrong.headers["allow"] == "POST"


def test_a_fault_of_ours_is_told_without_its_trace(serve: Any, until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One that is really there: the model loses its head. The next who ask are served again."""
    broken = serve()
    reader = broken.service.worker.batch.reader
    short, reader.one_token = reader.one_token, "no function"
    response = broken.post()
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "Traceback" not in response.text and "str" not in response.json()["error"]["message"].split()
    until(lambda: "TypeError" in caplog.text)  # what the terminal says
    reader.one_token = short
    assert broken.post().json()["choices"][0]["message"]["content"] == broken.alone("Who are you?")
    assert broken.quiet()
