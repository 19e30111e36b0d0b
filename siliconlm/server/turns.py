"""Who is next: the waiting work of several clients, one piece of each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """First come first served within a client; between clients each has its turn, however much it has asked for."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, deque[T]] = {}  # the client whose turn it is stands first

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, client: Hashable, work: T) -> None:
        self.waiting.setdefault(client, deque()).append(work)

    def next(self) -> T:
        """Take the next piece of work; its client goes to the end of the line."""
        client = next(iter(self.waiting))
        line = self.waiting.pop(client)
        work = line.popleft()
        if line:
            self.waiting[client] = line
        return work

    def remove(self, client: Hashable, work: T) -> None:
        """Take work out that is no longer wanted, if it is there."""
        line = self.waiting.get(client, deque())
        if work in line:
            line.remove(work)
            if not line:
                del self.waiting[client]
