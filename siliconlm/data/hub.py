"""Data sets and tokenizers from the Hugging Face hub: `hf://datasets/OWNER/NAME[/SPLIT]` and `hf://OWNER/NAME`.

Only data files are fetched, never code. They go into the cache that other programs for the hub share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from siliconlm.errors import SiliconError
from siliconlm.events import Event, Notice, Working

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hf://"
DATASETS = f"{HUB}datasets/"
NAME = r"[\w.-]+/[\w.-]+"
SPLIT = "train"
KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")  # of a split that has several the first is read
NUMBERING = re.compile(r"[-_.]\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # of a split's files: train-00000-of-00002


def fetch_dataset(word: str) -> Generator[Event, None, list[Path]]:
    """The files of a split of a data set on the hub, by name; the training split where none is given.

    Yields Working in bytes, once a file. A split is a word in the files' paths: `train` is data/train-00000.parquet as
    well as train/a.jsonl.
    """
    repo, split = _named(word)
    with _plain_errors(repo, word):
        sizes = _listing(repo, "dataset")
    files = yield from _chosen([path for path in sizes if PurePosixPath(path).suffix in KINDS], split, word)
    total = sum(sizes[file] for file in files)
    done = 0
    paths = []
    for file in files:
        yield Working(f"downloading {repo}", done, total, "bytes")
        with _plain_errors(repo, word):
            paths.append(_download(repo, file, "dataset"))
        done += sizes[file]
        yield Working(f"downloading {repo}", done, total, "bytes")
    return paths


def fetch_tokenizer(word: str) -> Path:
    """The tokenizer.json of a model on the hub."""
    repo = word.removeprefix(HUB)
    if not re.fullmatch(NAME, repo):
        raise _unfetched("this names no model on the hub", word, f"Type --tokenizer {HUB}OWNER/NAME")
    with _plain_errors(repo, word):
        if "tokenizer.json" not in _listing(repo, "model"):
            fix = "Name another model, or give the path of a tokenizer.json."
            raise _unfetched(f"{repo} has no tokenizer.json", word, fix)
        return _download(repo, "tokenizer.json", "model")


def _named(word: str) -> tuple[str, str]:
    """The data set's name on the hub, and the split."""
    found = re.fullmatch(f"({NAME})(?:/(.+?))?/?", word.removeprefix(DATASETS))
    if not word.startswith(DATASETS) or not found:
        fix = f"Type: silicon prepare {DATASETS}OWNER/NAME, or {DATASETS}OWNER/NAME/SPLIT"
        raise _unfetched("this names no data set on the hub", word, fix)
    return found[1], found[2] or SPLIT


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _listing(repo: str, kind: str) -> dict[str, int]:
    """The files of a repository, with their sizes in bytes."""
    api = _api()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    return {file.rfilename: file.size or 0 for file in ask(repo, files_metadata=True).siblings or ()}


def _download(repo: str, file: str, kind: str) -> Path:
    return Path(_api().hf_hub_download(repo, file, repo_type=kind))


# --- splits ----------------------------------------------------------------------------------------------------------


def _chosen(files: list[str], split: str, word: str) -> Generator[Event, None, list[str]]:
    """The files of a split, of one kind: data sets often hold the same texts in several."""
    places = {file: _place(file, split) for file in files}
    found = sorted(file for file in files if places[file])
    if not found:
        raise _no_split(files, split, word)
    if len({places[file] for file in found}) > 1:
        there = sorted({places[file] for file in found})
        fix = f"Type: silicon prepare {DATASETS}{_named(word)[0]}/{there[0]}"
        what = f"there are several {split}: {_listed(there)}"
        raise SiliconError(what, where=word, fix=fix, kind="missing_input")
    kind = min((PurePosixPath(file).suffix for file in found), key=KINDS.index)
    taken = [file for file in found if PurePosixPath(file).suffix == kind]
    others = sorted(set(found) - set(taken))
    if others:
        yield Notice(f"read only the {kind} files of the split, not {_listed(others)}")
    return taken


def _place(file: str, split: str) -> str:
    """The path from the top to where the split's name stands in a file's path; nothing where it does not."""
    whole = str(PurePosixPath(file).with_suffix(""))
    for path in (file, whole, NUMBERING.sub("", whole)):
        start = f"/{path}/".find(f"/{split}/")
        if start >= 0:
            return path[: start + len(split)]
    return ""


def _no_split(files: list[str], split: str, word: str) -> SiliconError:
    if not files:
        what = "there are no data files; looked for " + ", ".join(f"*{kind}" for kind in KINDS)
        return SiliconError(what, where=word, fix="Choose another data set.", kind="missing_input")
    there = sorted({_group(file) for file in files})
    fix = f"Type: silicon prepare {DATASETS}{_named(word)[0]}/{there[0]}"
    return SiliconError(f"no split {split}; there are: {_listed(there)}", where=word, fix=fix, kind="missing_input")


def _group(file: str) -> str:
    """What to call the files that are numbered like this one: their common name, or else their folder."""
    path = PurePosixPath(file)
    numbered = path.stem.replace("_", "").isdigit() and len(path.parts) > 1
    return str(path.parent) if numbered else NUMBERING.sub("", str(path.with_suffix("")))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


# --- what can go wrong -----------------------------------------------------------------------------------------------


@contextmanager
def _plain_errors(repo: str, word: str) -> Iterator[None]:
    """What the hub and the way to it can answer, each as one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if word.startswith(DATASETS) else ''}{repo}"
        fix = f"Agree to its terms at {page}, then type: hf auth login"
        raise _unfetched("the hub gives this only to those who agree to its terms", word, fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "Check the name. If it is private, type: hf auth login"
        raise _unfetched(f"the hub has no {repo}, or it is private", word, fix) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise _unfetched(f"the hub refuses this ({status})", word, "Type: hf auth login") from error
        why = f"it answered {status}" if status else str(error.__cause__ or error).partition("\n")[0]
        fix = "Check the network, or give a file that you have."
        raise _unfetched(f"cannot reach the hub: {why}", word, fix) from error


def _unfetched(what: str, word: str, fix: str) -> SiliconError:
    return SiliconError(what, where=word, fix=fix, kind="missing_input")
