"""Datasets out of text or conversations, whichever the sources hold."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from siliconlm.data.chat import Template, open_template
from siliconlm.data.conversations import (
    BUILTIN_CHAT,
    hold_conversations,
    prepare_chat,
    record_files,
    show,
)
from siliconlm.data.dataset import datasets, open_dataset
from siliconlm.data.hub import HUB, fetch_dataset
from siliconlm.data.prepare import VAL_FRACTION, VOCAB_SIZE, given_tokenizer, prepare
from siliconlm.data.sources import BUILTIN
from siliconlm.engine.models import Opened, open_model
from siliconlm.engine.setup import dataset_name
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Event,
    Notice,
    Prepared,
)
from siliconlm.model.weights import read_template


@dataclass(frozen=True, slots=True)
class Preparation:
    """What `silicon prepare` was asked for. `base` is a model whose tokenizer and template conversations are for."""

    sources: tuple[str, ...] = (BUILTIN,)
    name: str | None = None
    tokenizer: str | None = None
    vocab_size: int = VOCAB_SIZE
    val_fraction: float = VAL_FRACTION
    force: bool = False
    field: str | None = None
    template: str | None = None
    base: str | None = None


def prepare_sources(asked: Preparation, show_mask: bool = False) -> Iterator[Event]:
    """Text or conversations into a dataset, whichever the sources hold; or only show what would be learned."""
    name = asked.name or dataset_name(list(asked.sources))
    sources = yield from _fetched(asked.sources)
    if asked.field is None and hold_conversations(sources):
        template = yield from _template_for(asked)
        if show_mask:
            yield from show(sources, template)
        else:
            yield from prepare_chat(sources, name, template, asked.val_fraction, asked.force)
        return
    given = {"--show-mask": show_mask, "--template": asked.template, "--base": asked.base}
    if wrong := [flag for flag, value in given.items() if value]:
        where = " ".join(asked.sources)
        raise SiliconError(f"{wrong[0]} is for conversations, and these are none", where=where, kind="usage")
    more = (asked.tokenizer, asked.vocab_size, asked.val_fraction, asked.force)
    yield from prepare(list(asked.sources), name, *more, field=asked.field)


def _fetched(words: Sequence[str]) -> Generator[Event, None, list[str]]:
    """The sources, those on the hub as the files that were fetched."""
    sources: list[str] = []
    for word in words:
        sources += map(str, (yield from fetch_dataset(word))) if word.startswith(HUB) else [word]
    return sources


def _template_for(asked: Preparation) -> Generator[Event, None, Template]:
    if asked.base and asked.tokenizer:
        raise SiliconError("--base and --tokenizer are both given; a base has its own tokenizer", kind="usage")
    if asked.base:
        opened = yield from open_model(asked.base)
        return open_template(opened.tokenizer, asked.template, read_template(opened.path))
    tokenizer = given_tokenizer(asked.tokenizer or "byte")
    if tokenizer is None:
        fix = "Type --base RUN, or --tokenizer byte."
        raise SiliconError(
            f"conversations are for a model that is there: no {asked.tokenizer} is made of them", fix=fix
        )
    return open_template(tokenizer, asked.template)


def tuning_data(opened: Opened, data: str, template: str | None) -> Generator[Event, None, str]:
    """The folder of a prepared dataset, or of one that is prepared now for a model."""
    if data in datasets() or (Path(data).expanduser() / "dataset.json").is_file():
        with open_dataset(data) as dataset:
            if template is None:  # of another tokenizer it is refused by name
                return str(dataset.path)
    word = open_template(opened.tokenizer, template, read_template(opened.path))
    if data != BUILTIN_CHAT:
        record_files(Path(data).expanduser())
    folder = ""
    for event in prepare_chat([data], dataset_name([data]), word, marked=True):
        if isinstance(event, Prepared):
            folder = event.path
            yield Notice(f"conversations are prepared for {opened.name}: {folder}")
        else:
            yield event
    return folder
