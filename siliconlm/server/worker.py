"""The one thread that owns the model: takes work in turn, makes texts a token at a time, tells what is ready."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from siliconlm.config import SampleConfig
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.events import Sampled
from siliconlm.inference.batch import BatchGenerator, Row
from siliconlm.server.turns import Turns

News = Sampled | Exception


@dataclass(eq=False, slots=True)
class Work:
    """A text to be made for a client. `tell` is called on the event loop with each piece, or what went wrong."""

    client: Hashable
    prompt: list[int]
    settings: SampleConfig
    seed: int
    index: int
    ends: frozenset[int]
    tell: Callable[[News], None]
    cancelled: bool = False


class Stopped(Exception):
    """The server ends."""


class Worker:
    """Makes texts, several at once. All methods but `_run` and what it calls belong to the event loop's thread."""

    def __init__(self, batch: BatchGenerator, tokenizer: Tokenizer) -> None:
        self.batch, self.tokenizer = batch, tokenizer
        self.turns: Turns[Work] = Turns()
        self.running: dict[Row, Work] = {}
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """To be called on the event loop that is to hear of the texts."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def close(self) -> None:
        """End all texts, and the thread with its next token."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def submit(self, work: Work) -> None:
        with self.changed:
            if not self.closing:
                self.turns.add(work.client, work)
                self.changed.notify()
                return
        work.tell(Stopped())

    def cancel(self, work: Work) -> None:
        """Make no more of a text; its place is free with the next token."""
        with self.changed:
            work.cancelled = True
            self.turns.remove(work.client, work)
            self.changed.notify()

    def counts(self) -> dict[str, int]:
        """Texts in the making and waiting."""
        return {"running": len(self.running), "queued": len(self.turns)}

    def _run(self) -> None:
        while self._wait():
            self._dismiss()
            self._tell(self._join() + self._step())
        with self.changed:
            waiting = [self.turns.next() for _ in range(len(self.turns))]
        self._tell([(work, Stopped()) for work in (*self.running.values(), *waiting)])
        self._clear()

    def _wait(self) -> bool:
        """Until there is work; whether to go on."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.turns or self.running)
            return not self.closing

    def _dismiss(self) -> None:
        """Rows whose clients have left make room."""
        for row, work in list(self.running.items()):
            if work.cancelled:
                self.batch.leave(row)
                del self.running[row]

    def _join(self) -> list[tuple[Work, News]]:
        """One newcomer, if there is room: the others are to wait for one prompt at most."""
        with self.changed:
            if not self.turns or len(self.running) == self.batch.size:
                return []
            work = self.turns.next()
        row = Row(self.batch.model, self.tokenizer, work.prompt, work.settings, work.seed, work.index, work.ends)
        self.running[row] = work
        try:
            ready = self.batch.join(row)
        except Exception as error:  # whatever it is, the one who asked hears of it, and the others go on
            del self.running[row]
            return [(work, error)]
        return self._ready([(row, ready)] if ready else [])

    def _step(self) -> list[tuple[Work, News]]:
        if not self.running:
            return []
        try:
            return self._ready(self.batch.step())
        except Exception as error:  # likewise of all who are here, and the next may be served
            news: list[tuple[Work, News]] = [(work, error) for work in self.running.values()]
            self._clear()
            return news

    def _ready(self, made: list[tuple[Row, Sampled]]) -> list[tuple[Work, News]]:
        news: list[tuple[Work, News]] = [(self.running[row], ready) for row, ready in made]
        for row, ready in made:
            if ready.done:
                del self.running[row]
        return news

    def _clear(self) -> None:
        self.batch.clear()
        self.running.clear()

    def _tell(self, news: list[tuple[Work, News]]) -> None:
        if news and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Work, News]]) -> None:
    for work, what in news:
        work.tell(what)
