"""Models opened and used: one door for runs and folders, sampling, talking, evaluating, exporting."""

from __future__ import annotations

import itertools
import secrets
import shlex
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siliconlm.config import DataConfig, RunConfig, SampleConfig
from siliconlm.data.chat import Template, open_template
from siliconlm.data.conversations import (
    BUILTIN_CHAT,
    read_questions,
)
from siliconlm.data.dataset import Dataset, open_dataset
from siliconlm.data.packing import validation
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.engine.setup import NO_ROOM, machine_of, telling_out_of_memory
from siliconlm.errors import SiliconError
from siliconlm.events import (
    Event,
    Notice,
    Scored,
    Working,
)
from siliconlm.files import copy_file, staged_folder
from siliconlm.hardware.device import (
    Device,
)
from siliconlm.inference.answers import answers
from siliconlm.inference.batch import BatchGenerator, row_bytes
from siliconlm.inference.conversation import Talk
from siliconlm.inference.harness import measure
from siliconlm.inference.session import check_prompt, generate
from siliconlm.model.decoder import Decoder
from siliconlm.model.weights import MODEL_FILES, TEMPLATE_FILE, read_model, read_template
from siliconlm.training.checkpoint import (
    RunFolder,
    find_run,
)
from siliconlm.training.loop import evaluate, evaluation_batch
from siliconlm.tuning.verdicts import features_of, open_sound


def dataset_of(config: RunConfig, about: Mapping[str, Any]) -> Dataset:
    """A run's dataset where it was, or by its name where the home has moved. `restore` compares the contents."""
    path = str(about.get("dataset", ""))
    return open_dataset(path if path and Path(path).is_dir() else config.data.name)


def check_tokenizer(dataset: Dataset, opened: Opened) -> None:
    if dataset.tokenizer.sha256 != opened.tokenizer.sha256:
        raise SiliconError(
            f"dataset {dataset.name} was made with another tokenizer than the model's",
            fix=f"Prepare it with --tokenizer {shlex.quote(str(opened.path / 'tokenizer.json'))}.",
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to use, and the run it came from (None for a folder that is no run of ours)."""

    model: Decoder
    tokenizer: Tokenizer
    run: RunFolder | None
    step: int
    path: Path

    @property
    def name(self) -> str:
        return self.run.name if self.run else self.path.name

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def template(self, word: str | None = None) -> Template:
        """How it was taught to talk; SiliconError where it was not."""
        own = read_template(self.path)
        if word is None and own is None:
            what = f"{self.run.name if self.run else self.path} was not tuned on conversations"
            fix = f"Type silicon finetune{f' {self.run.name}' if self.run else ''} --data {BUILTIN_CHAT} first."
            raise SiliconError(what, fix=fix, kind="missing_input")
        return open_template(self.tokenizer, word, own)


def open_model(name: str | None, step: int | str | None = None) -> Generator[Event, None, Opened]:
    """The one door: a run by name or path (its newest whole checkpoint, or a step), or a Hugging Face folder."""
    folder = Path(name).expanduser() if name else None
    if folder and (folder / "config.json").is_file():
        return Opened(*read_model(folder), None, 0, folder)
    run = find_run(name)
    if step is None:
        checkpoint, skipped = run.newest(MODEL_FILES)
        yield from (Notice(line, "warning") for line in skipped)
    else:
        checkpoint = run.at_step(step)
    model, tokenizer = read_model(checkpoint.path, checkpoint.sha256("model.safetensors"))
    return Opened(model, tokenizer, run, checkpoint.step, checkpoint.path)


def sample(
    prompt: str, name: str | None, settings: SampleConfig, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Continue a prompt with a trained model; streams pieces of text."""
    opened = yield from open_model(name, step)
    check_prompt(opened.tokenizer, prompt)
    place = yield from open_sound(machine_of(device), "cached_decoding", *features_of(opened.model.config))
    seed = settings.seed if settings.seed is not None else secrets.randbits(32)
    with telling_out_of_memory(NO_ROOM):
        opened.model.to(place.torch_device)
        yield from generate(opened.model, opened.tokenizer, place, prompt, settings, seed)


def talk(
    name: str | None,
    settings: SampleConfig,
    device: str | None = None,
    step: int | str | None = None,
    template: str | None = None,
) -> Generator[Event, None, Talk]:
    """A conversation with a model that was taught to talk."""
    opened = yield from open_model(name, step)
    word = opened.template(template)
    place = yield from open_sound(machine_of(device), "cached_decoding", *features_of(opened.model.config))
    seed = settings.seed if settings.seed is not None else secrets.randbits(32)
    with telling_out_of_memory(NO_ROOM):
        return Talk(opened.model.to(place.torch_device), word, place, settings, seed)


ROWS = 16  # texts made at once: on a CPU 10 M parameters then make 3.5 times the tokens/s of one text, 32 no more


def open_batch(name: str | None, device: str | None = None) -> Generator[Event, None, tuple[Opened, BatchGenerator]]:
    """A model, and memory for as many texts at once as half of what is free holds."""
    opened = yield from open_model(name)
    place = yield from open_sound(machine_of(device), "cached_decoding", *features_of(opened.model.config))
    with telling_out_of_memory(NO_ROOM):
        model = opened.model.to(place.torch_device)
        room = place.memory_budget() // (2 * row_bytes(model.config, place.dtype))
        return opened, BatchGenerator(model, place, max(1, min(ROWS, room)))


def validate(
    name: str | None, data: str | None = None, device: str | None = None, step: int | str | None = None
) -> Iterator[Event]:
    """Loss of a model on the whole validation split of its dataset (or of another with the same tokenizer)."""
    opened = yield from open_model(name, step)
    if data:
        dataset = open_dataset(data)
    elif opened.run:
        dataset = dataset_of(*opened.run.config())
    else:
        raise SiliconError("a model folder has no dataset of its own", fix="Type --data NAME.", kind="missing_input")
    place = yield from open_sound(machine_of(device), *features_of(opened.model.config))
    with dataset, telling_out_of_memory(NO_ROOM):
        dataset.val.verify()
        check_tokenizer(dataset, opened)
        context = opened.model.config.context
        windows, batch = validation(dataset, context, _data_config(opened)), evaluation_batch(context)
        model = opened.model.to(place.torch_device)
        result = yield from evaluate(model, dataset, windows, place, batch, opened.step)
        results = itertools.chain([result], _scores(opened, dataset, place))
        # What is found on other data says nothing that the run's own records could be held against.
        yield from results if data else _recorded(opened, results)


def measure_tasks(
    name: str | None,
    tasks: Sequence[str],
    limit: int | None = None,
    device: str | None = None,
    step: int | str | None = None,
) -> Iterator[Event]:
    """A model on tasks of lm-evaluation-harness."""
    opened = yield from open_model(name, step)
    place = yield from open_sound(machine_of(device), "cached_decoding", *features_of(opened.model.config))
    with telling_out_of_memory(NO_ROOM):
        model = opened.model.to(place.torch_device)
        yield from _recorded(opened, measure(model, opened.tokenizer, place, tasks, opened.step, limit))


def _recorded(opened: Opened, events: Iterable[Event]) -> Iterator[Event]:
    """Pass results on, and note them in the run that the model is of, for its report."""
    noting = opened.run is not None
    for event in events:
        if noting and opened.run and not isinstance(event, Working):
            try:
                opened.run.record(event)
            except OSError as error:
                noting = False
                yield Notice(f"not noted in the run: {error.strerror}", "warning")
        yield event


def export_folder(name: str | None, target: Path) -> Iterator[Event]:
    """A model as a Hugging Face folder of its own: config, tokenizer, chat template and weights."""
    opened = yield from open_model(name)
    with staged_folder(target, replace=True) as stage:
        for file in sorted(opened.path.iterdir()):
            if file.name in (*MODEL_FILES, TEMPLATE_FILE, "tokenizer_config.json", "generation_config.json"):
                copy_file(file, stage / file.name)
    yield Notice(f"exported: {target}")


def _data_config(opened: Opened) -> DataConfig:
    """How documents were kept apart when the model was trained."""
    return opened.run.config()[0].data if opened.run else DataConfig(document_mask=True)


def _scores(opened: Opened, dataset: Dataset, device: Device) -> Iterator[Event]:
    """How many held-out questions of each task the model answers to the letter."""
    if not dataset.is_chat:
        return
    template = Template(dataset.card["template"], dataset.tokenizer)
    for task, questions in read_questions(dataset).items():
        begun = time.perf_counter()
        prompts = [template.prompt(asked[:-1]) for asked in questions]
        right = 0
        for done, (number, text) in enumerate(
            answers(opened.model, opened.tokenizer, device, prompts, template.ends), 1
        ):
            right += text.strip() == questions[number][-1].content.strip()
            yield Working(task, done, len(questions), "questions")
        yield Scored(opened.step, task, right, len(questions), round(time.perf_counter() - begun, 3))
