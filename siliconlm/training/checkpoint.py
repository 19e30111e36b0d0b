"""Run folders and the commit protocol: a checkpoint exists whole or not at all, also after a power cut.

    runs/<name>/run.toml                      settings with their sources
                log.jsonl                     every event, one a line
                evals.jsonl                   evaluations and scores after training
                checkpoints/step-000000500/   a Hugging Face model folder, plus what exact resume needs:
                    train.safetensors         raw weights, where the model's are their moving average
                    optimizer.safetensors     optimiser state by parameter name
                    state.json                counters
                    MANIFEST.json             line 1: SHA-256 of line 2; line 2: sizes and SHA-256 of the files

Order of a save: files synced, manifest last, folder synced, rename, parent synced; only then "saved". There is no
pointer to the latest: the newest folder whose manifest verifies is the latest, so a copied folder stays valid.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import siliconlm
from siliconlm.config import RunConfig, read_run, write_run
from siliconlm.errors import SiliconError, nearest
from siliconlm.events import Event, Saved
from siliconlm.files import home, remove_folder, sha256, staged_folder, sweep
from siliconlm.model.decoder import count_parameters
from siliconlm.model.weights import read_tensors, write_bytes, write_tensors

FORMAT = 1
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose manifest was read. `read` and `tensors` verify each file's hash as they open it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def sha256(self, name: str) -> str:
        if name not in self.manifest["files"]:
            raise SiliconError(f"{name} is not in this checkpoint", where=str(self.path), kind="bad_data")
        return str(self.manifest["files"][name]["sha256"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self.path / name, self.sha256(name))

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def state(self) -> dict[str, Any]:
        data = (self.path / "state.json").read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256("state.json"):
            raise SiliconError("damaged file", where=str(self.path / "state.json"), kind="bad_data")
        return dict(json.loads(data))

    def verify(self, names: Collection[str] | None = None) -> None:
        """Hash the named files, or all. SiliconError (bad_data) names the first that is missing, resized or altered."""
        for name, facts in self.manifest["files"].items():
            if names is not None and name not in names:
                continue
            path = self.path / name
            if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise SiliconError("missing or damaged file", where=str(path), kind="bad_data")


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its folder; SiliconError (bad_data) when its manifest is missing, altered or too new."""
    where = str(path / MANIFEST)
    try:
        digest, text = (path / MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError("its hash does not agree")
        manifest = json.loads(text)
    except (OSError, ValueError) as error:
        raise SiliconError(f"damaged checkpoint: {error}", where=where, kind="bad_data") from None
    if manifest["format"] > FORMAT:
        raise SiliconError(
            f"made by a newer SiliconLM ({manifest['versions']['siliconlm']})", where=where, kind="bad_data"
        )
    return Checkpoint(path, manifest)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk. One process at a time may write it; any number may read."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def evals_path(self) -> Path:
        return self.path / "evals.jsonl"

    def config(self) -> tuple[RunConfig, dict[str, Any]]:
        return read_run(self.path / "run.toml")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing. The lock dies with the process, so there are no stale ones."""
        import fcntl

        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise SiliconError(
                    f"run {self.name} is in use by {file.read().strip() or 'another process'}",
                    fix="Wait for it, or stop it.",
                    kind="run_in_use",
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            self._close_torn_line()
            sweep(self.path)
            (self.path / "checkpoints").mkdir(exist_ok=True)
            sweep(self.path / "checkpoints")
            yield

    def in_use(self) -> bool:
        """Whether a process holds the run for writing now."""
        import fcntl

        if not (self.path / ".lock").is_file():
            return False
        with open(self.path / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def log(self, event: Event) -> None:
        """Append one event with the time of day."""
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**event.as_json(), "at": round(time.time(), 3)}) + "\n")

    def record(self, event: Event) -> None:
        """Append what was found out about the run's model after training, which no log of training holds."""
        with open(self.evals_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**event.as_json(), "at": round(time.time(), 3)}) + "\n")

    def _close_torn_line(self) -> None:
        """End a line that a crash cut short, so that the next event stands on its own; readers skip the torn one."""
        with open(self.log_path, "a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
                file.write(b"\n")

    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, newest first by step."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step, reverse=True)

    def newest(self, names: Collection[str] | None = None) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint whose files (only the named ones, if any) verify, and a line for each newer one that
        did not."""
        skipped = []
        for path in self.checkpoints():
            try:
                checkpoint = read_checkpoint(path)
                checkpoint.verify(names)
            except SiliconError as error:
                skipped.append(f"skipped {path.name}: {error}")
                continue
            return checkpoint, skipped
        if skipped:
            raise SiliconError(
                f"no checkpoint of {self.name} is whole: {'; '.join(skipped)}", where=str(self.path), kind="bad_data"
            )
        raise SiliconError(
            f"run {self.name} has no checkpoint yet", where=str(self.path), fix="Train it again.", kind="missing_input"
        )

    def at_step(self, step: int | str) -> Checkpoint:
        """The checkpoint of one step, or of the lowest validation loss (`best`). Never substitutes another."""
        if step == "best":
            checkpoint = self.best()
            if checkpoint is None:
                raise SiliconError(f"run {self.name} has no evaluated checkpoint", kind="missing_input")
        else:
            paths = {_step(path): path for path in self.checkpoints()}
            if step not in paths:
                there = ", ".join(map(str, sorted(paths))) or "none"
                raise SiliconError(
                    f"run {self.name} has no step {step}", fix=f"There are: {there}.", kind="missing_input"
                )
            checkpoint = read_checkpoint(paths[int(step)])
        checkpoint.verify()
        return checkpoint

    def best(self) -> Checkpoint | None:
        """The evaluated checkpoint with the lowest validation loss."""
        readable = []
        for path in self.checkpoints():
            try:
                readable.append(read_checkpoint(path))
            except SiliconError:
                continue  # `newest` reports it; a damaged checkpoint is never the best
        evaluated = [item for item in readable if item.manifest["val_loss"] is not None]
        return min(evaluated, key=lambda item: float(item.manifest["val_loss"]), default=None)

    def save(
        self,
        step: int,
        val_loss: float | None,
        texts: Mapping[str, bytes],
        tensors: Mapping[str, dict[str, Tensor]],
        keep: int,
    ) -> Saved:
        """Commit a checkpoint, then remove those that are neither the newest `keep` nor the best."""
        start = time.perf_counter()
        self._check_space(tensors)
        target = self.path / "checkpoints" / f"step-{step:09d}"
        with staged_folder(target, replace=True) as stage:
            files = {name: write_bytes(stage / name, text) for name, text in texts.items()}
            files |= {name: write_tensors(stage / name, group) for name, group in tensors.items()}
            manifest = {"format": FORMAT, "step": step, "val_loss": val_loss, "files": files, "versions": versions()}
            text = json.dumps(manifest)
            write_bytes(stage / MANIFEST, hashlib.sha256(text.encode()).hexdigest().encode(), b"\n", text.encode())
        self._retain(step, keep)
        size = sum(facts["bytes"] for facts in files.values())
        return Saved(step, str(target), size, round(time.perf_counter() - start, 3))

    def _check_space(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        need = sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())
        free = shutil.disk_usage(self.path).free
        if free < 1.1 * need + (16 << 20):
            raise SiliconError(
                f"No space left on device: a checkpoint needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
                where=str(self.path),
                fix="Free some space and type silicon resume; earlier checkpoints are whole.",
                kind="io_error",
            )

    def _retain(self, step: int, keep: int) -> None:
        """Remove what is older than the newest `keep` up to `step`. Newer ones are damaged: resuming passed them by."""
        valid = [path for path in self.checkpoints() if _step(path) <= step]
        surplus = valid[keep:]
        if not surplus:
            return
        read_checkpoint(valid[0]).verify()  # never delete the old for a new one that is not good
        best = self.best()
        for path in surplus:
            if best is None or path != best.path:
                remove_folder(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoint_bytes(config: RunConfig) -> int:
    """An estimate of a checkpoint's size: weights and at most two moments in float32, and the weights' average."""
    return count_parameters(config.model) * 4 * (4 if config.train.ema else 3)


def kept_bytes(config: RunConfig) -> int:
    """The most that the checkpoints of a run take: the newest, the best, and one that is being written."""
    return (config.train.keep + 2) * checkpoint_bytes(config)


def versions() -> dict[str, str]:
    return {
        "siliconlm": siliconlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def runs_folder() -> Path:
    return home() / "runs"


def create_run(name: str, config: RunConfig, about: Mapping[str, Any]) -> RunFolder:
    """A new run folder. SiliconError when the name is taken or is no plain file name."""
    path = check_new_run(name)
    with staged_folder(path) as stage:
        (stage / "checkpoints").mkdir()
        write_run(stage / "run.toml", config, {**about, "versions": versions()})
    return RunFolder(path)


def check_new_run(name: str) -> Path:
    """The folder a new run would take; SiliconError when the name is taken or is no plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise SiliconError(f"{name!r} is no run name", fix="Use letters, digits, '.', '_' and '-'.")
    path = runs_folder() / name
    if path.exists():
        fix = f"Type silicon resume {name}, or choose another --name."
        raise SiliconError(f"run {name} exists", where=str(path), fix=fix, kind="cannot_create")
    return path


def free_run_name(stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3`... whichever is not taken."""
    taken = {path.name for path in runs_folder().glob("*")}
    return next(name for name in _numbered(stem) if name not in taken)


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def all_runs() -> list[RunFolder]:
    """Runs at home, the most recently written first."""
    folders = [path for path in runs_folder().glob("[!.]*") if (path / "run.toml").is_file()]
    return [RunFolder(path) for path in sorted(folders, key=_last_written, reverse=True)]


def _last_written(path: Path) -> float:
    log = path / "log.jsonl"
    return (log if log.is_file() else path / "run.toml").stat().st_mtime


def find_run(name: str | None) -> RunFolder:
    """A run by name or path; the latest when no name is given."""
    if name is None:
        runs = all_runs()
        if not runs:
            raise SiliconError(
                "there is no run yet", where=str(runs_folder()), fix="Type silicon train.", kind="missing_input"
            )
        return runs[0]
    for path in (runs_folder() / name, Path(name).expanduser()):
        if (path / "run.toml").is_file():
            return RunFolder(path)
    known = [run.name for run in all_runs()]
    fix = nearest(name, known) or (f"There are: {', '.join(known[:8])}." if known else "Type silicon train.")
    raise SiliconError(f"no run named {name}", where=str(runs_folder()), fix=fix, kind="missing_input")


def read_log(run: RunFolder) -> list[dict[str, Any]]:
    """The events of a run in order, without those that a resume from an earlier step took back."""
    events: list[dict[str, Any]] = []
    for event in _records(run.log_path):
        if event.get("event") == "resumed":
            events = [old for old in events if old.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def read_evals(run: RunFolder) -> list[dict[str, Any]]:
    """What was found out about a run's model after training, in order."""
    return list(_records(run.evals_path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, if there is one."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # torn by a crash
