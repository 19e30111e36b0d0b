"""Numbers as people read them: on the terminal and in reports alike."""

from __future__ import annotations


def clock(seconds: float | None) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, scale in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def few(count: float) -> str:
    """0.47, 4.6, 35, 1.3 k."""
    return f"{count:.2g}" if count < 100 else number(count)
