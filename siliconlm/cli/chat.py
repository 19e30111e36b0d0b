"""A conversation in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

from rich.text import Text

from siliconlm import events as ev
from siliconlm.cli.render import as_json, err, notice, out, printable
from siliconlm.config import sampling
from siliconlm.data.chat import Message, conversation
from siliconlm.data.records import read_records
from siliconlm.errors import SiliconError, from_os_error, nearest
from siliconlm.files import write_file
from siliconlm.inference.conversation import Talk

HELP = """  /help            this list
  /retry           answer the last message again
  /clear           forget the conversation
  /system TEXT     how the model is to behave; alone, nothing special
  /temperature T   0 always takes the likeliest token
  /save FILE       the conversation as a line of JSON, which silicon finetune reads
  /load FILE       go on with a saved one
  /quit            leave (as Ctrl-D)
  Ctrl-C stops an answer."""


def chat(opening: Generator[ev.Event, None, Talk], prompt: str | None, system: str | None, json_out: bool) -> None:
    """Talk until the end of input, or ask once."""
    talk = _opened(opening)
    if system:
        talk.messages = [Message("system", system)]
    if prompt is not None:
        _once(talk, prompt, json_out)
    elif json_out or not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                _once(talk, line.strip(), json_out)
    else:
        Room(talk).run()


def _opened(opening: Generator[ev.Event, None, Talk]) -> Talk:
    while True:
        try:
            event = next(opening)
        except StopIteration as stop:
            talk: Talk = stop.value
            return talk
        if isinstance(event, ev.Notice):
            notice(event)


def _once(talk: Talk, prompt: str, json_out: bool) -> None:
    begun, tokens, stopped_by = time.perf_counter(), 0, ""
    for event in talk.ask(prompt):
        if isinstance(event, ev.Notice):
            notice(event)
        elif isinstance(event, ev.Sampled):
            if not json_out:
                print(printable(event.text) if sys.stdout.isatty() else event.text, end="", flush=True)
            if event.done:
                tokens, stopped_by = event.tokens, event.stopped_by
    rate = tokens / max(1e-9, time.perf_counter() - begun)
    if json_out:
        answer = talk.messages[-1].content if talk.messages[-1:] and talk.messages[-1].role == "assistant" else ""
        facts = {"tokens": tokens, "stopped_by": stopped_by, "tokens_per_s": round(rate, 1)}
        as_json({"prompt": prompt, "answer": answer, **facts})
    else:
        print()


class Room:
    """A terminal in which somebody talks: lines are messages, or commands where they begin with a slash."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: out.print(HELP),
            "/clear": self.clear,
            "/retry": self.retry,
            "/system": self.system,
            "/temperature": self.temperature,
            "/save": self.save,
            "/load": self.load,
        }

    def run(self) -> None:
        with suppress(ImportError):  # editing and history of lines, where the system has it
            import readline  # noqa: F401
        err.print(Text("/help shows what there is; Ctrl-D leaves", style="dim"))
        for line in self.lines():
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif word.startswith("/"):
                    known = [*self.commands, "/quit"]
                    raise SiliconError(f"no command {word}", fix=nearest(word, known) or "Type /help.")
                else:
                    self.answer(line)
            except SiliconError as error:
                err.print(Text(str(error), style="yellow"))
            except OSError as error:
                err.print(Text(str(from_os_error(error)), style="yellow"))

    def lines(self) -> Iterator[str]:
        """What is typed, without empty lines. Ctrl-C here only clears the line."""
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                continue
            except EOFError:
                print()
                return
            if line:
                yield line

    def answer(self, text: str) -> None:
        try:
            with closing(self.talk.ask(text)) as answer:
                for event in answer:
                    if isinstance(event, ev.Notice):
                        notice(event)
                    elif isinstance(event, ev.Sampled):
                        print(printable(event.text), end="", flush=True)
            print()
        except KeyboardInterrupt:
            err.print(Text(" (stopped)", style="dim"))

    def clear(self, _: str) -> None:
        self.talk.messages = [message for message in self.talk.messages if message.role == "system"]
        self.talk.told = False
        err.print(Text("forgotten", style="dim"))

    def retry(self, _: str) -> None:
        asked = [number for number, message in enumerate(self.talk.messages) if message.role == "user"]
        if not asked:
            raise SiliconError("nothing was asked yet")
        text = self.talk.messages[asked[-1]].content
        del self.talk.messages[asked[-1] :]
        self.talk.seed += 1  # another answer
        self.answer(text)

    def system(self, text: str) -> None:
        rest = [message for message in self.talk.messages if message.role != "system"]
        self.talk.messages = [*([Message("system", text)] if text else []), *rest]

    def temperature(self, text: str) -> None:
        try:
            self.talk.settings = sampling(**self.talk.settings.model_dump() | {"temperature": float(text)})
        except ValueError:
            raise SiliconError(f"{text!r} is no number", fix="Type /temperature 0.7.") from None

    def save(self, text: str) -> None:
        if not text:
            raise SiliconError("it needs a name", fix="Type /save talk.jsonl.")
        path = Path(text).expanduser()
        if path.exists():
            raise SiliconError("there is a file already", where=str(path), fix="Choose another name.")
        write_file(path, json.dumps({"messages": [message._asdict() for message in self.talk.messages]}) + "\n")
        err.print(Text(f"saved: {path}", style="dim"))

    def load(self, text: str) -> None:
        path = Path(text).expanduser()
        if not path.is_file():
            raise SiliconError("no such file", where=text or "/load", fix="Type /load talk.jsonl.")
        place, record = next(read_records(path), (str(path), None))
        self.talk.messages = list(conversation(record, place))
        for message in self.talk.messages:
            out.print(Text(("> " if message.role == "user" else "") + printable(message.content)))
