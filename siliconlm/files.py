"""Writing so that nothing is lost: write beside, sync, rename, sync the folder.

A rename alone survives `kill -9` but not a power cut; the syncs make it survive both (reliability: LevelDB, SQLite).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siliconlm.errors import SiliconError

PIECE = 1 << 20


def home() -> Path:
    """The folder for runs, data and profiles: `SILICON_HOME`, else the platform's user data folder."""
    given = os.environ.get("SILICON_HOME")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("siliconlm", appauthor=False)


def sync(fd: int) -> None:
    """Force a file or folder to the disk itself. On macOS fsync stops at the drive's cache; F_FULLFSYNC does not."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # ExFAT and network drives do not know it
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step: readers see the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes when it does not.

    Every file written in the block must have been synced by its writer. A folder that already has the name is an
    OSError; with `replace` it is moved aside first and removed only after the new one is durable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".tmp-{target.name}.{secrets.token_hex(4)}")
    stage.mkdir()
    try:
        yield stage
        sync_folder(stage)
        discarded = _set_aside(target) if replace and target.exists() else None
        try:
            os.rename(stage, target)
        except OSError:
            if discarded:
                os.rename(discarded, target)
            raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    sync_folder(target.parent)
    if discarded:
        shutil.rmtree(discarded, ignore_errors=True)


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file for `what`, which one process at a time may write. The lock dies with the process."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "Wait for it, or stop it."
            raise SiliconError(f"{what} is in use by another process", fix=fix, kind="run_in_use") from None
        yield


def copy_file(source: Path, target: Path) -> None:
    """A new file with the content of another, synced to disk."""
    with open(source, "rb") as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written, PIECE)
        written.flush()
        sync(written.fileno())


def remove_folder(path: Path) -> None:
    """Remove a folder so that a half-removed one is never taken for a whole one."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    discarded = path.with_name(f".trash-{path.name}.{secrets.token_hex(4)}")
    os.rename(path, discarded)
    return discarded


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what interrupted writes left in `folder`, or there of `name` alone. Only for the one process that may
    write that."""
    ending = "*" if name is None else f"{glob.escape(name)}.{'[0-9a-f]' * 8}"  # of `a`, not of `a.b`
    for leftover in [*folder.glob(f".tmp-{ending}"), *folder.glob(f".trash-{ending}")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256(path: Path, start: int = 0) -> str:
    """The SHA-256 of a file's bytes from `start` on, in hexadecimal, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
