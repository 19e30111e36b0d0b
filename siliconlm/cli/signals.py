"""Ctrl-C and kill, politely: the first asks training to stop after its step and save, the second stops at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

WATCHED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Signals:
    """Installed for the length of a `with` block. Before `polite` is set there is nothing to save, and any signal ends
    the command. A signal that was ignored before (nohup) stays ignored."""

    def __init__(self) -> None:
        self.polite = False
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        watched = [number for number in WATCHED if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._receive) for number in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: signal.Signals) -> None:
        """Ask training to stop as if the signal had come, unless one has."""
        self.received = self.received or number

    def reason(self) -> str | None:
        """The name of the signal that asked to stop, or None. The training loop asks once a step."""
        return self.received.name if self.received else None

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.polite:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.stop(signal.Signals(number))
        with suppress(OSError):  # the terminal may be what has gone
            os.write(2, b"\nstopping after this step and saving; once more stops at once\n")
