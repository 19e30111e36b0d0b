"""Measuring from the command line: what is shown, found again, listed, exported, and used by training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from siliconlm.hardware.device import Device
from siliconlm.tuning import choose, profiles, verdicts
from siliconlm.tuning import probe as module
from siliconlm.tuning.selftest import Verdict

if TYPE_CHECKING:
    from .conftest import Silicon, Trained

MIB = 1 << 20
# A child that measures nothing: answers at once, with more speed for more sequences, and leaves a mark.
QUICK = """
import json, math, os, sys
request = json.loads(sys.stdin.readline())
micro, model = request["config"]["machine"]["micro_batch"], request["config"]["model"]
open(os.environ["MARKS"], "a").write(f"{micro}\\n")
size = model["n_layer"] * model["n_embd"] ** 2
forward = 0.001 + size * micro * model["context"] / 1e9
print(json.dumps({"memory": 10**8 + 10**6 * micro, "forward_seconds": forward, "update_seconds": 0.001,
                  "loss": math.log(model["vocab_size"] + math.exp(0.02 * model["n_embd"])), "canary": 0.0,
                  "burst_seconds": forward}))
"""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Use other code as the probe's child; call it again for the micro-batches tried since the last call."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))

    def use(code: str | None = None) -> list[int]:
        if code is not None:
            monkeypatch.setattr(module, "CHILD", (sys.executable, "-c", code))
            # Forecasts are of real models, in processes that import torch; they have tests of their own.
            monkeypatch.setattr(choose, "forecast_sizes", lambda config, device, seconds: {})
        tried = [int(line) for line in marks.read_text().split()] if marks.exists() else []
        marks.unlink(missing_ok=True)
        return tried

    return use


@pytest.fixture
def one_or_two(made: Trained, tmp_path: Path) -> list[str]:
    """A model so small, and a step so short, that only micro-batches of 1 and 2 can be tried."""
    preset = tmp_path / "free.toml"
    preset.write_text(made.preset.read_text().replace("micro_batch = 2\n", ""))
    return ["--preset", str(preset)]


@pytest.fixture(autouse=True)
def tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test has tests of its own, and takes seconds."""
    monkeypatch.setattr("siliconlm.tuning.verdicts.self_test", lambda device: iter(()))


def test_probing_measures_real_steps_and_shows_what_was_predicted(silicon: Silicon, one_or_two: list[str]) -> None:
    probed = silicon("probe-batch", *one_or_two, "--limit", "60s")
    assert probed.code == 0
    header, *lines, choice = probed.out.splitlines()
    assert header.split() == ["micro-batch", "tokens", "setting", "predicted", "measured", "tokens/s", "verdict"]
    assert [line.split()[:3] for line in lines] == [["1", "32", "float32"], ["2", "64", "float32"]]
    assert all(line.split()[-1] == "fits" for line in lines)
    assert choice.startswith("machine.micro_batch = 2  the largest that fits, with ")

    told = silicon("probe-batch", *one_or_two, "--limit", "60s", "--json").json()
    for row in told["probes"]:
        assert 100 * MIB < row["memory"] < psutil.virtual_memory().total and row["tokens_per_s"] > 0
        assert row["predicted"] == pytest.approx(row["memory"], rel=0.25)


@pytest.mark.slow
def test_a_profile_of_real_steps_decides_everything(silicon: Silicon, one_or_two: list[str]) -> None:
    made = silicon("profile", *one_or_two, "--limit", "90s", "--json").json()
    chosen = {item["setting"]: item for item in made["choices"]}
    names = {"device", "micro_batch", "dtype", "checkpointing", "chunked_loss", "compile"}
    assert {f"machine.{name}" for name in names} | {"model.context"} <= chosen.keys()
    assert all(item["reason"] for item in made["choices"])
    assert chosen["machine.micro_batch"]["value"] in (1, 2)


@pytest.fixture
def cached(silicon: Silicon, one_or_two: list[str], children: Any, home: Path) -> Path:
    """The file of a profile that quick children made."""
    children(QUICK)
    done = silicon("profile", *one_or_two, "--set", "machine.compile=false")
    assert done.code == 0 and set(children()) == {1, 2}
    [path] = (home / "profiles").iterdir()
    assert done.mentions(path)
    return path


@pytest.fixture
def measured(one_or_two: list[str], cached: Path) -> list[str]:
    """The words that name what `cached` is for."""
    return [*one_or_two, "--set", "machine.compile=false"]


def test_a_profile_is_found_again(silicon: Silicon, measured: list[str], children: Any, cached: Path) -> None:
    first = cached.read_bytes()
    again = silicon("profile", *measured)
    assert again.code == 0 and children() == [] and cached.read_bytes() == first
    assert "measured before" in again.told and "machine.micro_batch = 2 " in again.out

    refreshed = silicon("profile", *measured, "--refresh")
    assert refreshed.code == 0 and set(children()) == {1, 2} and "measured before" not in refreshed.told


def test_another_shape_power_source_or_torch_is_measured_anew(
    silicon: Silicon, measured: list[str], children: Any, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("optim.name=adamw", "model.n_layer=2", "train.tokens_per_step=32", "machine.checkpointing=true"):
        assert silicon("profile", *measured, "--set", change).code == 0
        assert children()[0] == 1, f"{change} must be measured"
    monkeypatch.setattr(profiles, "power", lambda mac: ("battery", 50))
    assert silicon("profile", *measured).code == 0 and children()[0] == 1
    facts = profiles.torch_facts()
    monkeypatch.setattr(profiles, "torch_facts", lambda: replace(facts, version="9.9.9"))
    assert silicon("profile", *measured).code == 0 and children()[0] == 1
    assert len(list(cached.parent.iterdir())) == 7


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no TOML": lambda text: "\0\0" + text,
    "another machine's": lambda text: text.replace('system = "', 'system = "Other '),
    "an unknown setting": lambda text: text.replace("\nmicro_batch = 2\ndtype", "\nmicro_btch = 2\ndtype"),
    "a value that cannot be": lambda text: text.replace("\nmicro_batch = 2\ndtype", "\nmicro_batch = 7\ndtype"),
    "no speed": lambda text: text.replace("\ntokens_per_s = ", "\ntokens_per_h = ", 1),
    "a table turned number": lambda text: "about = 3\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_profile_is_announced_and_measured_again(
    silicon: Silicon, measured: list[str], children: Any, cached: Path, damage: str
) -> None:
    good = cached.read_text()
    bad = DAMAGES[damage](good)
    assert bad != good
    cached.write_text(bad)
    listed = silicon("profile", "--list")
    assert listed.code == 0 and cached.name in listed.out
    done = silicon("profile", *measured)
    assert done.code == 0 and "damaged" in done.told and set(children()) == {1, 2}
    assert silicon("profile", *measured).code == 0 and children() == [], "the file is whole again"


def test_all_that_was_measured_is_listed(silicon: Silicon, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = silicon("profile", "--list", "--json").json()["profiles"]
    assert row["state"] == "current" and row["file"] == str(cached) and row["shape"] == "1x32, context 32"
    assert row["settings"]["machine.micro_batch"] == 2 and row["tokens_per_s"] > 0
    monkeypatch.setattr(profiles, "processor_name", lambda kind: "Another Chip")
    assert "stale: another chip" in silicon("profile", "--list").out
    cached.unlink()
    assert silicon("profile", "--list").out == "nothing is measured yet: silicon profile\n"


def test_an_exported_profile_is_one_that_training_takes(
    silicon: Silicon, own: Trained, one_or_two: list[str], children: Any, tmp_path: Path
) -> None:
    children(QUICK)
    words = ["--data", "plays", *one_or_two, "--set", "machine.compile=false"]
    early = silicon("profile", *words, "--export", "mine.toml")
    assert early.code == 1 and "nothing is measured yet" in early.err and "silicon profile" in early.err
    assert silicon("profile", *words).code == 0
    children()
    assert silicon("profile", *words, "--export", "mine.toml").code == 0
    for name, complaint in (("mine.toml", "there is a file already"), ("mine.txt", "must end with .toml")):
        refused = silicon("profile", *words, "--export", name)
        assert refused.code == 1 and complaint in refused.err
    dry = silicon("train", *words, "--steps", "1", "--profile", "mine.toml", "--dry-run", "--json").json()
    assert dry["settings"]["machine.micro_batch"] == {"value": 2, "source": "profile mine.toml"}
    done = silicon("train", *words, "--steps", "1", "--profile", "mine.toml", "--name", "third")
    assert done.code == 0 and children() == []


def test_training_measures_once(silicon: Silicon, own: Trained, one_or_two: list[str], children: Any) -> None:
    children(QUICK)
    command = ["train", "--data", "plays", *one_or_two, "--set", "machine.compile=false", "--steps", "1"]
    first = silicon(*command, "--name", "first")
    assert first.code == 0 and set(children()) == {1, 2} and "measuring this machine once" in first.told
    second = silicon(*command, "--name", "second", "--json")
    assert second.code == 0 and children() == []
    [started] = [json.loads(line) for line in second.out.splitlines() if '"event": "started"' in line]
    assert started["micro_batch"] == 2 and started["choices"]
    dry = silicon(*command, "--dry-run", "--json").json()
    assert dry["settings"]["machine.micro_batch"] == {"value": 2, "source": "profile auto"}


def test_nothing_that_fits_is_an_error_with_a_remedy(
    silicon: Silicon, one_or_two: list[str], children: Any, home: Path
) -> None:
    children('print(\'{"error": "out of memory", "out_of_memory": true}\')')
    for command in ("probe-batch", "profile"):
        done = silicon(command, *one_or_two, "--json")
        assert done.code == 1 and done.json()["kind"] == "out_of_memory" and "--preset" in done.json()["fix"]
        if command == "profile":
            assert "--device" not in done.json()["fix"]  # it was measured on the CPU already
    assert not (home / "profiles").exists()


# --- what the self-test found broken ---------------------------------------------------------------------------------


def test_a_profile_around_a_broken_kernel_is_found_again(
    silicon: Silicon, own: Trained, one_or_two: list[str], children: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Verdict("fused AdamW", False, 3.0, 1.0, "fused_adamw", "off by 3")
    monkeypatch.setattr(verdicts, "self_test", lambda device: iter([broken]))
    children(QUICK)
    words = ["--data", "plays", *one_or_two, "--set", "machine.compile=false"]
    first = silicon("profile", *words)
    assert first.code == 0 and "fused_adamw is avoided: fused AdamW: off by 3" in first.told
    children()
    assert "measured before" in silicon("profile", *words).told and children() == []
    dry = silicon("train", *words, "--steps", "1", "--dry-run", "--json").json()
    assert dry["settings"]["machine.fused"] == {"value": False, "source": "self-test"}
    assert dry["settings"]["machine.micro_batch"] == {"value": 2, "source": "profile auto"}


def test_sampling_passes_a_device_over_that_cannot_decode(
    silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Apple GPU as far as opening it goes: it is never used."""
    apple = Device("mps", torch.float32, 1)
    real = verdicts.open_device
    monkeypatch.setattr(profiles, "processor_name", lambda kind: f"chip of {kind}")
    monkeypatch.setattr(verdicts, "available", lambda: ["mps", "cpu"])
    monkeypatch.setattr(verdicts, "open_device", lambda machine: real(machine) if machine.device == "cpu" else apple)
    verdicts.remember(apple, [Verdict("a refilled cache", False, 3.0, 1.0, "cached_decoding", "off by 3")])
    sample = ["sample", "Enter", "--run", "whole", "--max-tokens", "5"]
    done = silicon(*sample)
    assert done.code == 0 and "device mps fails the self-test (a refilled cache: off by 3)" in done.told
    refused = silicon(*sample, "--device", "mps")
    assert refused.code == 1 and "mps computes wrongly here" in refused.told and "--device" in refused.told


# --- a model for a time ----------------------------------------------------------------------------------------------


def test_the_plan_is_a_table_with_a_choice(silicon: Silicon, own: Trained, children: Any) -> None:
    children(QUICK)
    told = silicon("plan", "--time", "2m", "--data", "plays", "--json").json()
    [chosen] = [row for row in told["plan"] if row["chosen"]]
    assert chosen["measured"] and chosen["val_loss"] == min(row["val_loss"] for row in told["plan"])
    assert [item["setting"] for item in told["choices"]] == ["model"]
    assert len(children()) >= 3
    shown = silicon("plan", "--time", "2m", "--data", "plays")
    assert children() == [], "measured before"
    assert f"→ {chosen['rung']} " in shown.out and len(shown.out.splitlines()) == len(told["plan"]) + 2


def test_a_time_without_a_preset_asks_the_plan(silicon: Silicon, own: Trained, children: Any) -> None:
    children(QUICK)
    command = ["train", "--data", "plays", "--time", "3s"]
    dry = silicon(*command, "--dry-run", "--json").json()
    source = dry["settings"]["model.n_layer"]["source"]
    assert source.startswith("plan ") and dry["settings"]["machine.micro_batch"]["source"] == source
    named = silicon(*command, "--preset", str(own.preset), "--dry-run", "--json").json()
    assert named["settings"]["model.n_embd"]["value"] == 32
    by_hand = silicon(*command, "--set", "model.n_layer=1", "--dry-run", "--json").json()
    assert by_hand["settings"]["model.n_layer"]["source"] == "--set"
    refused = silicon(*command, "--set", "machine.micro_batch=1")
    assert refused.code == 1 and "a plan chooses the micro-batch itself" in refused.err
    run = silicon(*command, "--name", "planned")
    assert run.code == 0 and "predicted val_loss" in run.told


def test_a_plan_without_a_time_says_what_to_type(silicon: Silicon, own: Trained) -> None:
    done = silicon("plan", "--data", "plays")
    assert done.code == 1 and "--time 30m" in done.err


@pytest.mark.parametrize("command", [["profile"], ["probe-batch"], ["plan", "--time", "1m"]])
def test_what_is_measured_cannot_be_set(silicon: Silicon, own: Trained, children: Any, command: list[str]) -> None:
    children(QUICK)
    done = silicon(*command, "--data", "plays", "--set", "machine.micro_batch=2")
    assert done.code == 1 and "micro" in done.err and "out" in done.err and children() == []


def test_a_probe_that_fails_is_not_called_a_lack_of_memory(
    silicon: Silicon, own: Trained, children: Any, one_or_two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    children("raise SystemExit('no such kernel')")
    monkeypatch.setattr("siliconlm.engine.measuring.searching", choose.searching)
    done = silicon("probe-batch", "--data", "plays", *one_or_two, "--json")
    told = json.loads(done.out.splitlines()[-1])
    assert done.code == 1 and told["kind"] == "training_failed" and "no such kernel" in told["error"]


def test_compiling_without_a_compiler_is_refused_before_a_run_is_made(
    silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siliconlm.engine.setup.lacks_compiler", lambda device: True)
    words = ["--data", "plays", "--preset", str(own.preset), "--profile", "none", "--steps", "1", "--name", "never"]
    done = silicon("train", *words, "--set", "machine.compile=true")
    assert done.code == 1 and "needs a C++ compiler" in done.err and "--set" in done.err
    assert not (own.home / "runs" / "never").exists()


def test_a_run_does_not_go_on_where_the_self_test_found_something(
    silicon: Silicon, own: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Device("cpu", torch.float32, 1)
    verdicts.remember(place, [Verdict("Muon", False, 3.0, 1.0, "muon", "off by 3")])
    refused = silicon("resume", "whole")
    assert refused.code == 1 and "muon fails the self-test" in refused.err
    verdicts.remember(place, [Verdict("matmul", False, 3.0, 1.0, "always", "off by 3")])
    for words in (["resume", "whole"], ["eval", "whole"], ["sample", "Enter", "--run", "whole"]):
        refused = silicon(*words)
        assert refused.code == 1 and "cpu computes wrongly here: matmul: off by 3" in refused.err
    verdicts.remember(place, [])
    assert silicon("resume", "whole").code == 0


def test_a_plan_leaves_out_models_that_need_what_is_broken(silicon: Silicon, own: Trained, children: Any) -> None:
    children(QUICK)
    broken = Verdict("attention, grouped", False, 3.0, 1.0, "grouped_queries", "off by 3")
    verdicts.remember(Device("cpu", torch.float32, 1), [broken])
    rows = silicon("plan", "--time", "2m", "--data", "plays", "--json").json()["plan"]
    assert [row["rung"] for row in rows] == ["2x32", "2x64", "4x64"], "those with as many key heads as query heads"
