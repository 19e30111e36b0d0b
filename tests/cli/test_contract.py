"""What scripts rely on: exit codes, which stream, JSON, places, seeds, and a quiet end when nobody reads."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import siliconlm
from siliconlm import engine
from siliconlm.cli.signals import Signals
from siliconlm.config import known_settings
from siliconlm.data.dataset import open_dataset
from siliconlm.data.packing import validation
from siliconlm.hardware.device import open_device
from siliconlm.model.weights import read_model
from siliconlm.training.loop import evaluate, result_of

if TYPE_CHECKING:
    from .conftest import Silicon, Trained

COMMANDS = [
    "chat",
    "doctor",
    "finetune",
    "run",
    "serve",
    "prepare",
    "probe-batch",
    "profile",
    "plan",
    "train",
    "resume",
    "sample",
    "eval",
    "runs",
    "report",
    "settings",
    "tokenizer",
]
ESCAPE = "\x1b"

HELP = """
import contextlib, io, json, sys
from siliconlm.cli.app import main
texts = {}
for words in json.load(sys.stdin):
    sys.argv, out = ["silicon", *words], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as ended:
            texts[" ".join(words)] = [ended.code, out.getvalue()]
print(json.dumps([texts, sorted({"torch", "numpy", "rich"} & sys.modules.keys())]))
"""


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, tuple[int, str]], list[str]]:
    """The help of silicon and of each command, and which heavy modules it took to answer."""
    asked = [["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", HELP], input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=True
    )
    texts, heavy = json.loads(done.stdout)
    return {words: tuple(answer) for words, answer in texts.items()}, heavy


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_waits_for_nothing_heavy(helps: Any) -> None:
    texts, heavy = helps
    assert heavy == []
    code, text = texts["--help"]
    assert code == 0 and texts["-h"] == texts["--help"]
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", text.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert texts["--version"] == (0, f"silicon {siliconlm.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(helps: Any, command: str) -> None:
    code, text = helps[0][f"{command} --help"]
    assert code == 0 and f"Usage: silicon {command}" in text
    assert f"Example: silicon {command}" in " ".join(text.split())
    assert "--json" in text and max(map(len, text.splitlines())) <= 80


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """Processor time, the best of five: what else the machine is doing does not count."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "siliconlm", "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3


def test_no_command_shows_the_help_as_a_usage_error(silicon: Silicon) -> None:
    done = silicon()
    assert (done.code, done.err) == (2, "") and done.out.startswith("Usage: silicon")


# --- a program's end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["settings"], ["settings", "--json"], ["--help"], ["runs", "--json"]])
def test_nobody_reading_is_no_error(child: Silicon, words: list[str]) -> None:
    """As in `silicon settings | head -1`, with a reader that has left before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = child(*words, stdout=writing)
    finally:
        os.close(writing)
    assert (done.code, done.err) == (0, "")


def test_an_error_can_be_read_by_people_and_programs(child: Silicon) -> None:
    done = child("train", "--preset", "tny", "--json")
    assert done.code == 1
    assert done.err == "error: no preset named tny\n  Did you mean tiny?\n"
    assert done.json() == {
        "error": "no preset named tny",
        "where": "",
        "fix": "Did you mean tiny?",
        "kind": "missing_input",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--stesp", "3"], "No such option: --stesp"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "--steps"], "--steps"),
        (["eval", "one", "two"], "unexpected extra argument"),
    ],
)
def test_a_usage_error_is_two_lines_and_exit_2(silicon: Silicon, words: list[str], says: str) -> None:
    done = silicon(*words, "--json")
    assert done.code == 2
    first, second = done.err.splitlines()
    assert first.startswith("error: ") and says in first
    assert re.fullmatch(r"  See silicon( train| eval)? --help\.", second)
    assert done.json()["kind"] == "usage" and done.json()["error"] in first


def test_what_is_printed_cannot_steer_the_terminal(silicon: Silicon) -> None:
    done = silicon("train", "--set", "tra\nin.\x1b[31mx=1")
    assert done.code == 1 and ESCAPE not in done.err and len(done.err.splitlines()) == 2
    assert r"tra\nin.\x1b[31mx" in done.err


# --- results on stdout, one object with --json -----------------------------------------------------------------------


def test_doctor(silicon: Silicon) -> None:
    shown = silicon("doctor")
    report = silicon("doctor", "--json").json()
    assert shown.code == (0 if report["healthy"] else 1) and shown.err == ""
    assert all(check["name"] in shown.out for check in report["checks"])
    assert {choice["setting"] for choice in report["choices"]} == {"machine.device", "machine.dtype"}
    assert report["torch"]["version"] in shown.out and ESCAPE not in shown.out
    assert all(check["remedy"] for check in report["checks"] if check["status"] == "fail")


def test_prepare(silicon: Silicon, made: Trained, home: Path) -> None:
    done = silicon("prepare", made.text, "--name", "mine", "--tokenizer", "char")
    assert done.code == 0 and done.out.startswith(f"dataset mine is ready: {home / 'data' / 'mine'}\n")
    assert "next: silicon train --data mine" in done.out
    again = silicon("prepare", made.text, "--name", "mine", "--tokenizer", "char", "--json")
    record = again.json()
    assert again.code == 0 and again.err == "" and record["reused"] and record["name"] == "mine"
    assert record["card"] == json.loads((home / "data" / "mine" / "dataset.json").read_text())
    assert sorted(path.name for path in (home / "data").iterdir()) == ["mine"]


def test_prepare_writes_a_dataset_for_other_programs(silicon: Silicon, made: Trained, tmp_path: Path) -> None:
    assert silicon("prepare", made.text, "--name", "mine").code == 0
    done = silicon("prepare", "--write", "llmc", "mine", "--output", tmp_path / "out")
    assert done.code == 0 and done.out.startswith(f"dataset mine is written for llmc: {tmp_path / 'out'}\n")
    files = ["mine_train_000001.bin", "mine_val_000000.bin", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    again = silicon("prepare", "mine", "--write", "nanogpt", "--output", tmp_path / "again", "--json").json()
    assert again["event"] == "written" and again["files"] == ["tokenizer.json", "train.bin", "val.bin"]


def test_tokenizer(silicon: Silicon, trained: Trained) -> None:
    shown = silicon("tokenizer", "plays", "To be,\nor not")
    assert shown.code == 0 and shown.err == "" and ESCAPE not in shown.out
    first, second, *view = shown.out.splitlines()
    assert first.startswith("char tokenizer with") and second == "  1.00 bytes per token on this text"
    assert view == ["T|o| |b|e|,|↵", "|o|r| |n|o|t"]
    found = silicon("tokenizer", "plays", "To be", "--json").json()
    with open_dataset("plays") as dataset:
        assert found["ids"] == dataset.tokenizer.encode("To be") and found["pieces"] == list("To be")
        assert found["size"] == dataset.tokenizer.size
    of_run, bare = silicon("tokenizer", "whole", "--json"), silicon("tokenizer", "--json")
    assert of_run.json() == bare.json() | {"kind": "tokenizer.json"}
    assert "validation text of plays" in silicon("tokenizer", "whole").out


def test_runs(silicon: Silicon, trained: Trained) -> None:
    shown = silicon("runs")
    assert shown.code == 0 and shown.err == ""
    words = shown.out.split()
    assert words[0] == "run" and words.index("whole") < words.index("cut"), "the latest first"
    whole, cut = silicon("runs", "--json").json()["runs"]
    assert (whole["run"], whole["step"], whole["state"], whole["dataset"]) == ("whole", 8, "done", "plays")
    assert (cut["run"], cut["step"], cut["state"]) == ("cut", 6, "SIGINT")
    assert whole["path"] == str(trained.home / "runs" / "whole") and whole["val_loss"] > 0


def test_runs_without_any(silicon: Silicon, home: Path) -> None:
    assert silicon("runs").out == "no runs yet: silicon train\n"
    assert silicon("runs", "--json").json() == {"runs": []}
    assert not home.exists(), "looking makes nothing"


def test_settings(silicon: Silicon) -> None:
    record = silicon("settings", "--json").json()
    assert record.keys() == known_settings().keys()
    assert record["train.save_every"]["default"] == 0 and all(item["help"] for item in record.values())
    shown = {word for word in silicon("settings", "train").out.split() if word in record}
    assert shown == {name for name in record if name.startswith("train.")}


def test_a_dry_run_shows_settings_with_sources_and_trains_nothing(silicon: Silicon, own: Trained) -> None:
    before = own.files()
    words = [
        "train",
        "--data",
        "plays",
        "--preset",
        own.preset,
        "--time",
        "1m30s",
        "--set",
        "optim.lr=0.01",
        "--dry-run",
    ]
    record = silicon(*words, "--json").json()
    told = record["settings"]
    assert told["train.time"] == {"value": 90.0, "source": "--time"} and "train.steps" not in told
    assert told["optim.lr"] == {"value": 0.01, "source": "--set"}
    assert told["model.n_layer"] == {"value": 1, "source": f"preset {own.preset}"}
    assert told["data.name"] == {"value": "plays", "source": "--data"}
    assert told["model.norm"] == {"value": "rmsnorm", "source": "default"}
    assert told["model.vocab_size"]["source"] == "data" and told["machine.device"]["value"] != "auto"
    assert record["started"]["budget"] == "90 s" and record["started"]["dataset"] == "plays"

    shown = silicon(*words)
    assert shown.code == 0 and shown.out.endswith("dry run: nothing was trained\n")
    lines = [line.split() for line in shown.out.splitlines()]
    rows = {words[0]: words for words in lines if words[0] in known_settings()}
    assert rows["optim.lr"][1:] == ["0.01", "--set"] and rows["train.time"][1:] == ["90.0", "--time"]
    assert rows.keys() == told.keys()
    assert own.files() == before


def test_a_dry_run_foresees_tokens_disk_and_only_a_time_that_was_measured(silicon: Silicon, own: Trained) -> None:
    words = ["train", "--data", "plays", "--preset", own.preset, "--dry-run"]
    foreseen = silicon(*words, "--tokens", "640", "--json").json()["foreseen"]
    card = json.loads((own.home / "data" / "plays" / "dataset.json").read_text())
    assert foreseen["tokens"] == 640 and foreseen["passes"] == 640 / card["splits"]["train"]["tokens"]
    assert foreseen["seconds"] is foreseen["tokens_per_s"] is None and foreseen["memory"] > foreseen["weights"] > 0
    one = sum(file.stat().st_size for file in own.checkpoints("whole")[0].glob("*.safetensors"))
    assert 5 * one <= foreseen["disk"] <= 8 * one, "the newest three, the best, and the one being written"
    shown = [line.split() for line in silicon(*words, "--time", "1m").out.splitlines()]
    assert ["tokens", "not", "measured"] in shown and ["time", "1m"] in shown


@pytest.mark.slow
def test_a_dry_run_reckons_with_the_measured_speed(silicon: Silicon, own: Trained, tmp_path: Path) -> None:
    (tmp_path / "free.toml").write_text(own.preset.read_text().replace("micro_batch = 2", ""))
    words = ["--data", "plays", "--preset", tmp_path / "free.toml"]
    assert silicon("profile", *words, "--limit", "20s").code == 0
    by_steps = silicon("train", *words, "--steps", "100", "--dry-run", "--json").json()["foreseen"]
    by_time = silicon("train", *words, "--time", "2m", "--dry-run", "--json").json()["foreseen"]
    rate = by_steps["tokens_per_s"]
    assert rate == by_time["tokens_per_s"] > 0
    val = json.loads((own.home / "data" / "plays" / "dataset.json").read_text())["splits"]["val"]["tokens"]
    evaluated = 20 * val + val  # twenty times during the run and once at its end, at twice the speed of training
    assert val < 16_384 and by_steps["tokens"] == 6400
    assert by_steps["seconds"] == pytest.approx((6400 + evaluated / 2) / rate)
    assert by_time["seconds"] == 120 and 0.87 * 120 * rate <= by_time["tokens"] < 120 * rate


def test_a_disk_too_small_for_the_checkpoints_is_told(
    silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siliconlm.engine.training.disk_free", lambda _: 1000)
    for more in (["--dry-run"], ["--steps", "1"]):
        done = silicon("train", "--data", "plays", "--preset", own.preset, *more)
        assert done.code == 0 and "the disk may fill up" in done.told and "train.keep=2" in done.told


# --- training --------------------------------------------------------------------------------------------------------


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_train_tells_one_event_a_line_and_leaves_a_run(silicon: Silicon, own: Trained) -> None:
    words = ["train", "--data", "plays", "--preset", own.preset, "--name", "mine", "--set", "train.save_every=3"]
    done = silicon(*words, "--steps", "7", "--json")
    assert done.code == 0 and done.err == ""
    told = events(done.out)
    assert [event["step"] for event in told if event["event"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    last = told[-1]
    assert (last["event"], last["reason"], last["step"], last["run"]) == ("finished", "done", 7, "mine")
    folder = own.home / "runs" / "mine"
    assert last["path"] == str(folder)
    saved = [event["path"] for event in told if event["event"] == "saved"]
    assert [Path(path).name for path in saved] == ["step-000000003", "step-000000006", "step-000000007"]
    assert sorted(map(str, own.checkpoints("mine"))) == saved
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(event.pop("at") for event in logged)
    assert [event for event in told if event["event"] not in ("notice", "chosen")][-len(logged) :] == logged


def test_train_for_people(silicon: Silicon, own: Trained) -> None:
    words = ["train", "--data", "plays", "--preset", own.preset, "--tokens", "320", "--set", "train.save_every=2"]
    done = silicon(*words)
    assert done.code == 0 and ESCAPE not in done.out + done.err
    assert done.out.splitlines()[0].startswith("run plays-mini is done: step 5, 320 tokens")
    assert 'next: silicon sample "To be or not" --run plays-mini' in done.out and "val_loss" in done.out
    assert "parameters on " in done.err and "saved step 4" in done.err
    assert silicon(*words).out.startswith("run plays-mini-2 is done"), "a free name is found"


def test_the_same_seed_gives_the_same_run(silicon: Silicon, own: Trained) -> None:
    losses = {}
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        words = ["train", "--data", "plays", "--preset", own.preset, "--steps", "3", "--name", name, "--seed", seed]
        told = events(silicon(*words, "--json").out)
        losses[name] = [event["loss"] for event in told if event["event"] == "step"]
    assert losses["a"] == losses["b"] != losses["c"] and len(losses["a"]) == 3


def test_resume_goes_on_with_the_latest_run_by_name_or_path(silicon: Silicon, own: Trained) -> None:
    done = silicon("resume", "cut", "--json")
    told = events(done.out)
    assert done.code == 0
    assert [event["step"] for event in told if event["event"] == "resumed"] == [6]
    assert [event["step"] for event in told if event["event"] == "step"] == [7, 8]
    assert told[-1]["event"] == "finished" and told[-1]["step"] == 8
    again = silicon("resume", own.home / "runs" / "cut")
    assert again.code == 0 and "has used its budget of 8 steps" in again.told
    assert again.out.startswith("run cut is done: step 8"), "the run written last is the latest"
    assert silicon("resume").out.startswith("run cut is done")


def test_a_run_stopped_before_its_first_checkpoint_starts_again(silicon: Silicon, own: Trained) -> None:
    for folder in own.checkpoints("cut"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    done = silicon("resume", "cut", "--json")
    told = events(done.out)
    assert done.code == 0 and told[-1]["step"] == 8
    assert any("starts again" in event.get("message", "") for event in told)
    assert [event["step"] for event in told if event["event"] == "step"] == list(range(1, 9))
    table = {row["run"]: row for row in silicon("runs", "--json").json()["runs"]}
    assert table["cut"]["step"] == 8 and table["cut"]["state"] == "done"


def test_training_without_data_prepares_the_builtin_corpus_and_says_so(
    silicon: Silicon, made: Trained, home: Path
) -> None:
    done = silicon("train", "--preset", made.preset, "--steps", "1", "--set", "train.eval_tokens=32", "--name", "first")
    assert done.code == 0 and "nothing is prepared yet: preparing the built-in corpus" in done.told
    assert (home / "data" / "builtin" / "dataset.json").is_file() and (home / "runs" / "first" / "run.toml").is_file()
    bare = silicon("prepare")
    assert bare.code == 0 and bare.out.startswith("dataset builtin is already prepared")
    assert "training on dataset builtin" in silicon("train", "--preset", made.preset, "--dry-run").told


# --- using a model ---------------------------------------------------------------------------------------------------


def test_sample_prints_the_prompt_and_its_continuation(silicon: Silicon, trained: Trained) -> None:
    words = ["sample", "To be", "--max-tokens", "40", "--seed", "4"]
    first = silicon(*words, "--run", "whole")
    assert first.code == 0 and first.out.startswith("To be") and len(first.out) > len("To be\n")
    assert re.fullmatch(r"\d+ tokens, \d+ tokens/s\n", first.err)
    assert silicon(*words).out == first.out, "the latest run, the same seed"
    assert silicon(*words[:-1], "5").out != first.out
    record = silicon(*words, "--json").json()
    assert record["prompt"] == "To be" and [item["text"] + "\n" for item in record["samples"]] == [first.out]
    assert record["samples"][0]["stopped_by"] in ("max_tokens", "end of text")


def test_sampling_settings_reach_the_sampler(silicon: Silicon, trained: Trained) -> None:
    greedy = silicon("sample", "To be", "--max-tokens", "12", "--temperature", "0")
    assert greedy.out == silicon("sample", "To be", "--max-tokens", "12", "--top-k", "1", "--seed", "9").out
    many = silicon("sample", "A", "--num-samples", "3", "--max-tokens", "5", "--seed", "1", "--json").json()["samples"]
    assert (
        len(many) == 3
        and len({item["text"] for item in many}) > 1
        and {item["tokens"] for item in many} <= set(range(6))
    )
    shown = silicon("sample", "A", "--num-samples", "3", "--max-tokens", "5", "--seed", "1").out
    assert shown == "\n---\n\n".join(item["text"] + "\n" for item in many), "made at once, shown one after the other"
    letter = greedy.out[5]
    stopped = silicon("sample", "To be", "--max-tokens", "12", "--temperature", "0", "--stop", letter, "--json").json()
    assert stopped["samples"][0]["text"] == "To be" and stopped["samples"][0]["stopped_by"] == "stop text"


def test_eval_has_the_loss_over_the_whole_split(silicon: Silicon, trained: Trained) -> None:
    record = silicon("eval", "whole", "--json").json()
    with open_dataset("plays") as dataset:
        model, _ = read_model(trained.checkpoints("whole")[0])
        device = open_device(engine.configs.resolve().machine)
        windows = validation(dataset, model.config.context, engine.configs.DataConfig())
        expected = result_of(evaluate(model, dataset, windows, device, 16, 8))
        assert record["tokens"] == dataset.val.count - 1 and record["complete"] is True
    assert record["val_loss"] == pytest.approx(expected.val_loss, abs=1e-5)
    assert record["val_bpb"] == pytest.approx(expected.val_bpb, abs=1e-5)
    shown = silicon("eval")
    assert shown.code == 0 and f"step 8: val_loss {record['val_loss']:.4f} nats/token" in shown.out and shown.err == ""
    assert silicon("eval", "whole", "--step", "4", "--json").json()["step"] == 4
    assert silicon("eval", "whole", "--step", "best", "--json").json()["step"] in (4, 8)


def test_a_checkpoint_is_a_model_folder_of_its_own(silicon: Silicon, trained: Trained) -> None:
    folder = trained.checkpoints("whole")[0]
    by_run = silicon("sample", "To be", "--max-tokens", "8", "--seed", "4")
    assert silicon("sample", "To be", "--max-tokens", "8", "--seed", "4", "--run", folder).out == by_run.out
    record = silicon("eval", folder, "--data", "plays", "--json").json()
    assert record["val_loss"] == pytest.approx(silicon("eval", "--json").json()["val_loss"], abs=1e-6)


# --- the process itself ----------------------------------------------------------------------------------------------


def test_python_m_siliconlm_is_the_same_command(child: Silicon, trained: Trained) -> None:
    """One child for the whole way through torch: warnings are errors there, and stdout has the text alone."""
    done = child("sample", "To be", "--max-tokens", "9", "--seed", "4", "--run", "whole")
    assert done.code == 0, done.err
    assert done.out.startswith("To be") and done.err.count("\n") == 1 and ESCAPE not in done.out + done.err
    assert child("--version").out == f"silicon {siliconlm.__version__}\n"


def on_a_terminal(words: list[str], **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    main, side = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "siliconlm", *words]
    with subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=clean | {"TERM": "xterm-256color"} | environment
    ) as process:
        os.close(side)
        read = bytearray()
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # Linux says so where the other end is closed
                piece = b""
            if not piece:
                break
            read += piece
    os.close(main)
    assert process.returncode == 0
    return read.decode()


def test_colours_only_where_they_are_wanted() -> None:
    colour = re.compile(r"\x1b\[([0-9;]*;)?(3[0-7]|4[0-7]|9[0-7]|10[0-7])(;[0-9;]*)?m")
    words = ["doctor"]
    assert colour.search(on_a_terminal(words))
    assert not colour.search(on_a_terminal(words, NO_COLOR="1"))


def test_a_sample_streams_as_one_text_on_a_terminal(trained: Trained) -> None:
    """What is shown piece by piece must read like what is written at once."""
    words = ["sample", "To be", "--max-tokens", "30", "--seed", "4", "--run", "whole"]
    shown = on_a_terminal(words).replace("\r\n", "\n")
    piped = subprocess.run([sys.executable, "-m", "siliconlm", *words], stdout=subprocess.PIPE, text=True, check=True)
    assert piped.stdout.startswith("To be") and shown.startswith(piped.stdout)


def test_a_reader_that_goes_away_stops_training_saved(own: Trained) -> None:
    """`silicon train --json | head -1`: what was trained is kept, and the exit code says that it was stopped."""
    words = ["train", "--data", "plays", "--preset", str(own.preset), "--steps", "100000", "--json", "--name", "piped"]
    command = [sys.executable, "-m", "siliconlm", *words, "--profile", "none", "--set", "machine.threads=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while b'"step"' not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
    assert own.checkpoints("piped")


def test_signals_ignored_by_nohup_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signals.polite = True
            signal.raise_signal(signal.SIGHUP)
            assert signals.reason() is None
            signal.raise_signal(signal.SIGTERM)
            assert signals.reason() == "SIGTERM" and signals.exit_code == 143
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_there_is_anything_to_save_a_signal_ends_the_command() -> None:
    with Signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with Signals(), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_a_shape_that_cannot_be_saved_is_refused_before_any_work(silicon: Silicon, own: Trained) -> None:
    done = silicon("train", "--data", "plays", "--preset", own.preset, "--set", "model.bias=true", "--name", "odd")
    assert done.code == 1 and "no known model family" in done.err
    assert not (own.home / "runs" / "odd").exists()


def test_the_dataset_can_be_a_setting(silicon: Silicon, own: Trained) -> None:
    words = ["train", "--preset", own.preset, "--set", "data.name=plays", "--dry-run", "--json"]
    told = silicon(*words).json()["settings"]
    assert told["data.name"] == {"value": "plays", "source": "--set"}
