"""Settings: layers, sources, budgets, and that no profile however wrong is more than one clear error."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siliconlm import config as configs
from siliconlm.config import (
    Layer,
    RunConfig,
    divisors,
    duration,
    known_settings,
    moment,
    parse_assignments,
    profile_names,
    read_profile,
    read_run,
    resolve,
    sampling,
    seconds,
    write_run,
)
from siliconlm.errors import SiliconError

VALID: dict[str, Any] = {
    "model": {"n_layer": 2, "n_embd": 64, "context": 64, "norm": "layernorm", "tied": False},
    "train": {"time": "90s", "tokens_per_step": 512, "schedule": "cosine"},
    "optim": {"lr": 0.001},
    "machine": {"micro_batch": 4},
}
BY_HAND = ["mac-128gb", "mac-16gb", "mac-32gb", "mac-64gb"]


def refused(*layers: Layer) -> SiliconError:
    with pytest.raises(SiliconError) as caught:
        resolve(*layers)
    return caught.value


# --- layers ----------------------------------------------------------------------------------------------------------


def test_later_layers_win_and_each_value_knows_its_source() -> None:
    config = resolve(
        Layer("preset", {"model.n_layer": 2, "model.n_embd": 64, "train.seed": 5}),
        Layer("profile", {"model.n_layer": 3, "model.n_embd": 128}),
        Layer("--set", {"model.n_layer": 6}),
    )
    assert (config.model.n_layer, config.model.n_embd, config.train.seed) == (6, 128, 5)
    assert config.sources == {"model.n_layer": "--set", "model.n_embd": "profile", "train.seed": "preset"}
    assert config.model.n_head == resolve().model.n_head, "what no layer names keeps its default"


def test_a_value_that_was_not_given_changes_nothing() -> None:
    config = resolve(Layer("preset", {"train.seed": 5}), Layer("flags", {"train.seed": None}))
    assert config.train.seed == 5 and config.sources["train.seed"] == "preset"


@pytest.mark.parametrize("below", ["steps", "tokens", "time"])
@pytest.mark.parametrize("above", ["steps", "tokens", "time"])
def test_a_budget_replaces_the_one_below(below: str, above: str) -> None:
    config = resolve(Layer("preset", {f"train.{below}": 100}), Layer("flags", {f"train.{above}": 200}))
    assert config.train.model_dump(include={"steps", "tokens", "time"}, exclude_none=True) == {above: 200}
    assert config.sources == {f"train.{above}": "flags"}


def test_two_budgets_in_one_layer_contradict_each_other() -> None:
    error = refused(Layer("--steps --time", {"train.steps": 5, "train.time": "1m"}))
    assert error.what == "train.steps and train.time are both given; a run has one budget"
    assert error.where == "--steps --time"


def test_a_moment_is_a_budget_like_the_others() -> None:
    config = resolve(Layer("preset", {"train.steps": 5}), Layer("--until", {"train.until": "07:00"}))
    assert config.train.steps is None and config.train.until and config.sources == {"train.until": "--until"}
    assert config.replace("probe", **{"train.seed": 9}).train.until == config.train.until, "read once"
    timed = config.with_time("--until", 90.0)
    assert timed.train.model_dump(include={"steps", "tokens", "time", "until"}, exclude_none=True) == {"time": 90.0}
    assert timed.sources == {"train.time": "--until"}
    error = refused(Layer("--time --until", {"train.until": "07:00", "train.time": "1m"}))
    assert error.what == "train.time and train.until are both given; a run has one budget"


def test_replace_keeps_the_other_sources() -> None:
    config = resolve(Layer("preset tiny", {"model.n_layer": 2})).replace("probe", **{"train.seed": 9})
    assert config.sources == {"model.n_layer": "preset tiny", "train.seed": "probe"}
    assert config.train.seed == 9 and config.model.n_layer == 2


def test_a_resolved_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve().train.seed = 2  # type: ignore[misc]


# --- wrong names and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.save_evry", "train.save_every"),
        ("save_every", "train.save_every"),
        ("savevery", "train.save_every"),
        ("modl.n_layer", "model.n_layer"),
        ("train.learning_rate", ""),
        ("train.lr", "optim.lr"),
        ("optim.nme", "optim.name"),
        ("data.nme", "data.name"),
        ("x", ""),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, meant: str) -> None:
    error = refused(Layer("--set", {name: 1}))
    assert error.what == f"unknown setting {name}" and error.where == "--set"
    assert error.fix == (f"Did you mean {meant}?" if meant else "See silicon settings.")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("train.steps", "many", "valid integer"),
        ("train.steps", 0, "greater than or equal to 1"),
        ("train.warmup", 1.5, "less than or equal to 1"),
        ("model.head_dim", 33, "multiple of 2"),
        ("model.tied", "perhaps", "valid boolean"),
        ("model.norm", "batchnorm", "'rmsnorm' or 'layernorm'"),
        ("optim.lr", float("nan"), "finite number"),
        ("train.time", float("inf"), "finite number"),
        ("train.time", "soon", "90s, 30m, 2h or 1h30m"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("machine.device", "tpu", "'auto', 'cuda', 'mps' or 'cpu'"),
        ("model.n_embd", [64], "valid integer"),
    ],
)
def test_a_wrong_value_names_the_setting_the_value_and_the_source(name: str, value: object, says: str) -> None:
    error = refused(Layer("profile mine.toml", {name: value}))
    assert error.what.startswith(f"{name} = {value!r}: ") and says in error.what
    assert error.where == "profile mine.toml" and error.kind == "bad_setting" and error.fix
    assert "\n" not in str(error)


def test_settings_that_do_not_go_together_say_what_would() -> None:
    shape = Layer("preset", {"model.context": 64, "train.tokens_per_step": 768})
    error = refused(shape, Layer("--set", {"machine.micro_batch": 5}))
    assert "machine.micro_batch 5 does not divide the 12 sequences" in error.what
    assert error.fix == "Choose one of 1, 2, 3, 4, 6, 12."
    assert error.where.startswith("machine.micro_batch from --set, train.tokens_per_step from preset")
    error = refused(Layer("preset", {"train.tokens_per_step": 8192}), Layer("--set", {"model.context": 216}))
    assert error.what == "train.tokens_per_step 8192 is not a multiple of model.context 216"
    assert error.where == "train.tokens_per_step from preset, model.context from --set"
    assert error.fix == "Choose model.context=128 or 256, or a multiple of 216 for train.tokens_per_step."
    assert "model.context=769," in refused(shape, Layer("x", {"train.tokens_per_step": 769})).fix
    error = refused(Layer("x", {"model.n_kv_head": 3}))
    assert error.what == "n_head 4 is not a multiple of n_kv_head 3" and error.fix.endswith("from 1, 2, 4.")
    assert error.where == "model.n_head from the defaults, model.n_kv_head from x"


def test_divisors_are_all_there_are() -> None:
    for number in range(1, 200):
        assert divisors(number) == [size for size in range(1, 201) if not number % size]


def test_sampling_values_are_named_as_flags() -> None:
    assert sampling(top_k=5, temperature=None).model_dump(include={"top_k", "temperature"}) == {
        "top_k": 5,
        "temperature": 0.8,
    }
    for name, value in (("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("max_tokens", 0)):
        with pytest.raises(SiliconError) as caught:
            sampling(**{name: value})
        assert caught.value.what.startswith(f"--{name.replace('_', '-')} {value}: ")


# --- words into values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90s", 90),
        ("90", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("1d", 86400),
        ("1d2h3m4s", 93784),
        ("0.5h", 1800),
        (" 2h ", 7200),
        (15, 15),
        (0.25, 0.25),
    ],
)
def test_durations(text: str | float, value: float) -> None:
    assert seconds(text) == value
    assert resolve(Layer("x", {"train.time": text})).train.time == value


@pytest.mark.parametrize(
    "text", ["", " ", "soon", "5 minutes", "1:30", "-5s", "1.2.3s", ".", "s", "30m1h", "1e3", "inf"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"90s, 30m, 2h or 1h30m"):
        seconds(text)
    assert "90s, 30m, 2h or 1h30m" in refused(Layer("--time", {"train.time": text})).what


@given(st.integers(0, 10**9), st.floats(-0.4, 0.4))
def test_a_duration_reads_back(whole: int, more: float) -> None:
    assert seconds(duration(whole + more)) == whole


@pytest.fixture
def live_in() -> Iterator[Callable[[str], ZoneInfo]]:
    """Sets the clocks of this process to a place."""
    with pytest.MonkeyPatch.context() as patch:

        def move(zone: str) -> ZoneInfo:
            patch.setenv("TZ", zone)
            time.tzset()
            return ZoneInfo(zone)

        yield move
    time.tzset()


PLACES = ["UTC", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]  # Lord Howe's clocks change by 30 minutes
NEAR_CHANGES = st.sampled_from([(2026, 3, 7), (2026, 11, 1), (2026, 4, 4), (2026, 10, 3), (2028, 2, 29)])


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NEAR_CHANGES, st.integers(0, 48 * 60), st.integers(0, 59), st.times())
def test_a_moment_is_the_next_at_which_the_clocks_show_it(
    live_in: Callable[[str], ZoneInfo],
    place: str,
    day: tuple[int, int, int],
    minute: int,
    second: int,
    clock: datetime.time,
) -> None:
    zone = live_in(place)
    now = datetime.datetime(*day, tzinfo=UTC) + timedelta(minutes=minute, seconds=second)
    found = moment(f"{clock:%H:%M}", now)
    assert found.tzinfo and now < found <= now + timedelta(hours=26)
    if (shown := found.astimezone(zone)).strftime("%H:%M") == f"{clock:%H:%M}":
        whole = now.replace(second=0)
        minutes = (whole + timedelta(minutes=count) for count in range(1, 49 * 60))
        assert found == next(time for time in minutes if f"{time.astimezone(zone):%H:%M}" == f"{clock:%H:%M}")
    else:
        asked = datetime.datetime.combine(shown.date(), clock.replace(second=0, microsecond=0, fold=0), zone)
        assert asked.astimezone(UTC) == found, "left out as the clocks were put forward"
        assert asked.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != asked.replace(tzinfo=None)


@pytest.mark.parametrize(
    ("now", "text", "meant"),
    [
        ("2026-03-08T01:00-05:00", "07:00", "2026-03-08T07:00-04:00"),
        ("2026-03-08T01:00-05:00", "02:30", "2026-03-08T03:30-04:00"),
        ("2026-11-01T01:10-04:00", "01:30", "2026-11-01T01:30-04:00"),
        ("2026-11-01T01:40-04:00", "01:30", "2026-11-01T01:30-05:00"),
        ("2026-11-01T01:40-05:00", " 1:30 ", "2026-11-02T01:30-05:00"),
        ("2026-07-01T07:00-04:00", "7:00", "2026-07-02T07:00-04:00"),
        ("2026-10-30T07:00-04:00", "2026-11-22 07:00", "2026-11-22T07:00-05:00"),
        ("2026-11-01T01:40-04:00", "2026-11-01T01:30", "2026-11-01T01:30-05:00"),
    ],
)
def test_moments_in_new_york(live_in: Callable[[str], ZoneInfo], now: str, text: str, meant: str) -> None:
    live_in("America/New_York")
    found, expected = moment(text, datetime.datetime.fromisoformat(now)), datetime.datetime.fromisoformat(meant)
    assert (found, found.utcoffset()) == (expected, expected.utcoffset())


NO_MOMENTS = ["", "25:00", "24:00", "07:60", "7", "0700", "07:00:00", "-7:00", "7:00 pm", "tomorrow", "tomorrow 07:00"]
NO_MOMENTS += ["2026-11-22", "2026-02-30 07:00", "22.11.2026 07:00", "0001-01-01 00:00", "٠٧:٠٠"]
NOON = datetime.datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.mark.parametrize("text", [*NO_MOMENTS, None, 7, 7.5, datetime.time(7), datetime.datetime(2026, 11, 22)])
def test_what_is_no_moment_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="written like 07:00 or 2026-11-22 07:00"):
        moment(text, NOON)


def test_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="past"):
        moment("2026-11-20 07:00", NOON)
    assert refused(Layer("--until", {"train.until": "2020-01-01 07:00"})).what.endswith(
        "'2020-01-01 07:00': it is past"
    )


@given(st.text() | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}", fullmatch=True))
def test_no_text_breaks_the_reading_of_a_moment(text: str) -> None:
    try:
        assert moment(text, NOON) > NOON
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("text", ["00:10:00", "[1]", "true", "{}", "1979-05-27", "9" * 400])
def test_toml_that_is_no_duration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f"[train]\ntime = {text}")
    for layer in (parse_assignments([f"train.time={text}"]), read_profile(str(tmp_path / "mine.toml"))):
        says = "finite number" if text.isdigit() else "a time is written like 90s"
        assert says in refused(layer).what
    with pytest.raises(ValueError, match="a time is written like"):
        seconds(datetime.time(0, 10))


def test_assignments_are_toml_where_they_are_toml() -> None:
    words = ["train.save_every=100", "optim.lr = 1e-3", "model.tied=false", "data.name=plays", "train.time=1h30m"]
    layer = parse_assignments([*words, 'data.name="a=b"', "train.schedule="])
    assert layer.source == "--set"
    assert layer.values == {
        "train.save_every": 100,
        "optim.lr": 0.001,
        "model.tied": False,
        "data.name": "a=b",
        "train.time": "1h30m",
        "train.schedule": "",
    }
    with pytest.raises(SiliconError, match="has no value") as caught:
        parse_assignments(["train.save_every"])
    assert caught.value.fix == "Write --set train.save_every=100."


@given(st.text())
def test_no_assignment_breaks_the_parser(text: str) -> None:
    try:
        resolve(parse_assignments([text]))
    except SiliconError as error:
        assert error.what and error.fix


def test_a_number_of_too_many_digits_is_an_error_like_any_other(tmp_path: Path) -> None:
    assert "train.steps" in refused(parse_assignments(["train.steps=" + "9" * 5000])).what
    (tmp_path / "big.toml").write_text("[train]\nsteps = " + "9" * 5000)
    with pytest.raises(SiliconError, match="not valid TOML"):
        read_profile(str(tmp_path / "big.toml"))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_run_file_comes_back_equal_and_can_be_given_as_a_profile(tmp_path: Path) -> None:
    config = resolve(
        Layer("preset tiny", {"model.n_layer": 2, "train.steps": 500, "model.norm": "layernorm"}),
        Layer("--set", {"optim.lr": 0.1 + 0.2, "machine.micro_batch": 4, "data.name": 'quote " and \\ 🙂'}),
        Layer("--time", {"train.time": "1h30m"}),
    )
    path = tmp_path / "run.toml"
    write_run(path, config, {"dataset": "/somewhere", "preset": "tiny"})
    again, about = read_run(path)
    assert again == config and again.sources == config.sources
    assert about == {"dataset": "/somewhere", "preset": "tiny"}
    given_back = resolve(read_profile(str(path)))
    assert given_back.model_dump() == config.model_dump()
    assert set(given_back.sources.values()) == {f"profile {path}"}


def test_another_budget_leaves_the_rest_of_a_run_file_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "run.toml", resolve(Layer("--steps", {"train.steps": 500})), {})
    text = (tmp_path / "run.toml").read_text().replace("keep = 3", "keep = 7")  # as by a version of other defaults
    (tmp_path / "run.toml").write_text(text)
    config, _ = read_run(tmp_path / "run.toml")
    deadline = datetime.datetime(2026, 11, 22, 7, tzinfo=datetime.timezone(timedelta(hours=1)))
    write_run(tmp_path / "run.toml", config.with_time("--extend", 90.5), {"deadline": deadline})
    again, about = read_run(tmp_path / "run.toml")
    assert again.train == config.train.model_copy(update={"steps": None, "time": 90.5}) and again.train.keep == 7
    assert (again.model, again.sources, about["deadline"]) == (config.model, {"train.time": "--extend"}, deadline)


RUN_FILES = [
    "",
    "x",
    "[about]",
    "[sources]",
    "about = 3\n[sources]",
    "sources = 3\n[about]",
    "n_layer = 3\n[about]\n[sources]",
    "[about]\n[sources]\n[modl]\nx = 1",
    "[about]\n[sources]\n[model]\nn_layer = {}",
    "[about]\nextended_at = 'noon'\n[sources]",
    "[about]\ndeadline = 2026-11-22\n[sources]",
]


@pytest.mark.parametrize("text", RUN_FILES)
def test_a_damaged_run_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SiliconError) as caught:
        read_run(path)
    assert "\n" not in str(caught.value) and caught.value.where == str(path)


def test_presets_resolve_and_hold_whole_sequences() -> None:
    assert profile_names() == sorted(["tiny", "small", "medium", "large"])
    for name in profile_names():
        layer = read_profile(name, kind="preset")
        config = resolve(layer)
        model, train = config.model, config.train
        assert layer.source == f"preset {name}" and train.tokens_per_step % model.context == 0
        assert model.n_embd % 64 == 0 and model.head_dim in (32, 64) and model.n_head % model.n_kv_head == 0
        assert train.steps and "machine" not in "".join(layer.values), "a preset says nothing of the machine"


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("tny", "no preset named tny", "Did you mean tiny?"),
        ("gigantic", "no preset named gigantic", "There are: large, medium, small, tiny."),
        ("mac-32gb", "no preset named mac-32gb", "It is a profile: type silicon train --profile mac-32gb."),
        ("no/such.toml", "no such file", ""),
        ("missing.toml", "no such file", ""),
    ],
)
def test_a_preset_that_is_not_there(tmp_path: Path, name: str, says: str, fix: str) -> None:
    with pytest.raises(SiliconError) as caught:
        read_profile(name, kind="preset")
    assert caught.value.what == says and caught.value.fix == fix and caught.value.kind == "missing_input"


def test_profiles_in_the_home_are_found_by_name_and_are_no_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "apple-m4-0123.toml").write_text("[machine]\nmicro_batch = 4\n[model]\ncontext = 64")
    measured = {"machine.micro_batch": 4, "model.context": 64}
    assert read_profile("apple-m4-0123") == Layer("profile apple-m4-0123", measured)
    with pytest.raises(SiliconError, match="no profile named") as caught:
        read_profile("gigantic")
    assert caught.value.fix == f"There are: apple-m4-0123, {', '.join(BY_HAND)}."
    with pytest.raises(SiliconError, match="no profile named tiny") as caught:
        read_profile("tiny")
    assert caught.value.fix == "It is a preset: type silicon train --preset tiny."
    with pytest.raises(SiliconError, match="no preset named apple-m4-0123") as caught:
        read_profile("apple-m4-0123", kind="preset")
    assert caught.value.fix == "It is a profile: type silicon train --profile apple-m4-0123."


@pytest.mark.parametrize("profile", BY_HAND)
@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "large"])
def test_a_profile_made_by_hand_goes_with_every_preset(profile: str, preset: str) -> None:
    config = resolve(read_profile(preset, kind="preset"), read_profile(profile))
    by_profile = {name: value for name, value in config.sources.items() if value == f"profile {profile}"}
    assert by_profile and all(name.startswith("machine.") for name in by_profile)
    assert config.machine.device == "mps"
    size = config.unmeasured_micro_batch()
    assert size * config.model.context <= max(config.machine.micro_tokens, config.model.context)
    assert config.sequences_per_step % size == 0
    config.replace("test", **{"machine.micro_batch": size})


def test_profiles_beside_an_installed_package_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("siliconlm/profiles", "profiles"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "siliconlm" / "config.py"))
    assert configs.profile_folders() == [tmp_path / "siliconlm" / "profiles"]
    (tmp_path / "pyproject.toml").touch()
    assert configs.profile_folders() == [tmp_path / "siliconlm" / "profiles", tmp_path / "profiles"]


def test_a_profile_with_settings_outside_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flat.toml").write_text("n_layer = 3")
    with pytest.raises(SiliconError, match="n_layer stands outside a table") as caught:
        read_profile(str(tmp_path / "flat.toml"))
    assert caught.value.where == str(tmp_path / "flat.toml")


# --- anything at all -------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([*sorted({*VALID, *known_settings()}), "sources", "about"]).map(lambda name: name.split(".")[-1])
ATOMS = st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.datetimes(), st.just([]))
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
TABLES = st.dictionaries(KEYS | st.text(max_size=6), VALUES | st.dictionaries(KEYS, VALUES, max_size=4), max_size=4)
PROFILE = tomli_w.dumps(VALID)


@st.composite
def damaged_text(draw: st.DrawFn) -> bytes:
    """A valid profile with some bytes replaced by others, or cut out."""
    data = bytearray(PROFILE.encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 12)))
        data[start:end] = draw(st.binary(max_size=4) | st.text(max_size=4).map(str.encode))
    return bytes(data)


def survives(path: Path) -> RunConfig | None:
    """The config of a profile, or None where it is refused in words. Any other exception is the test's failure."""
    try:
        return resolve(read_profile(str(path)))
    except SiliconError as error:
        assert error.what
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged_text())
def test_a_profile_with_damaged_bytes_is_refused_or_valid(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.toml"
    path.write_bytes(content)
    config = survives(path)
    if config:
        assert config.train.tokens_per_step % config.model.context == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=TABLES)
def test_a_profile_with_other_tables_is_refused_or_valid(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "changed.toml"
    merged = {**VALID, **changes}
    for name in VALID.keys() & changes.keys():
        if isinstance(changes[name], dict):
            merged[name] = {**VALID[name], **changes[name]}
    path.write_text(tomli_w.dumps(merged), encoding="utf-8")
    config = survives(path)
    if config and not changes:
        assert config.model.n_layer == VALID["model"]["n_layer"]
