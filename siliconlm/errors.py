"""The one error class for what the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SiliconError(Exception):
    """Says what is wrong, where, and what to type. The command line prints it and exits 1.

    `kind` is a word for programs: bad_setting, bad_environment, missing_input, bad_data, no_device, wrong_results,
    out_of_memory, cannot_create, io_error, run_in_use, training_failed, usage.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", kind: str = "bad_setting") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix
        self.kind = kind

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.what}{place}" + (f". {self.fix}" if self.fix else "")


def from_os_error(error: OSError, doing: str = "") -> SiliconError:
    """The same news as an `OSError` (disk full, no permission, missing file), as one clear line."""
    path = str(error.filename or "")
    kinds = {
        "ENOSPC": ("io_error", "Free some space, or set SILICON_HOME to a folder on another disk."),
        "EDQUOT": ("io_error", "Free some space, or set SILICON_HOME to a folder on another disk."),
        "EACCES": ("cannot_create", "Check the permissions, or set SILICON_HOME to a folder you can write to."),
        "EPERM": ("cannot_create", "Check the permissions, or set SILICON_HOME to a folder you can write to."),
        "EROFS": ("cannot_create", "Set SILICON_HOME to a folder you can write to."),
        "ENOTDIR": ("cannot_create", "A file stands where a folder is needed; set SILICON_HOME elsewhere."),
        "ENOENT": ("missing_input", "Check the path."),
    }
    import errno

    kind, fix = kinds.get(errno.errorcode.get(error.errno or 0, ""), ("io_error", ""))
    what = error.strerror or str(error)
    return SiliconError(f"{doing}: {what}" if doing else what, where=path, fix=fix, kind=kind)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`Did you mean ...?`, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"Did you mean {close[0]}?" if close else ""
