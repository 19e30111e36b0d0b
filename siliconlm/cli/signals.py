"""Ctrl-C and kill, politely: the first asks training to stop after its step and save, the second stops at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

WATCHED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Signals:
    """Installed for the length of a `with` block. Before `polite` is set (nothing to save yet) any signal ends it."""

    def __init__(self) -> None:
        self.polite = False
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._receive) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """The name of the signal that asked to stop, or None. The training loop asks once a step."""
        return self.received.name if self.received else None

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received or not self.polite:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        print("\nstopping after this step and saving; once more stops at once", file=sys.stderr)
