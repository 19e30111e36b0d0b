"""What a user gets: the wheel, in a venv of its own, used from another folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import siliconlm
from siliconlm.config import profile_names

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*words: str | Path, **options: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tree, as `pip install .` does it."""
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT)
    [built] = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh venv with the wheel installed and nothing of this tree.

    Its dependencies are those of the running tests, by a .pth file, since downloading torch again would prove nothing:
    a folder named in a .pth file has its own .pth files ignored, so an editable install in it stays unseen.
    """
    folder = tmp_path_factory.mktemp("venv") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    torch = importlib.util.find_spec("torch")
    assert torch and torch.origin
    (site / "dependencies.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    return python


def test_the_wheel_carries_the_package_presets_and_profiles(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILICON_HOME", str(tmp_path))  # without profiles measured here
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    kinds = {".py", ".toml", ".html"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "siliconlm").rglob("*") if path.suffix in kinds}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "siliconlm" / "cli" / "pages").iterdir()}
    settings = {f"siliconlm/profiles/{name}.toml" for kind in ("preset", "profile") for name in profile_names(kind)}
    assert sources <= names and settings <= names
    assert {name.split("/")[0] for name in names} == {"siliconlm", f"siliconlm-{siliconlm.__version__}.dist-info"}
    needs = {line.split()[1].split(">")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert {"torch", "typer", "rich", "pydantic", "tokenizers", "tomli-w"} <= needs


def test_the_wheel_runs_from_any_folder(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"SILICON_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    silicon = python.with_name("silicon")
    options = {"cwd": tmp_path, "env": environment}
    where = "import siliconlm, siliconlm.config as c; print(siliconlm.__file__, *c.profile_folders(), sep='\\n')"
    package, *folders = map(Path, run(python, "-c", where, **options).split())
    assert package.is_relative_to(python.parents[1]) and folders == [package.parent / "profiles"]

    assert run(silicon, "--version", **options) == f"silicon {siliconlm.__version__}\n"
    assert "Commands:" in run(silicon, "--help", **options)
    assert "train.save_every" in run(silicon, "settings", **options)
    forecast = json.loads(run(silicon, "train", "--dry-run", "--preset", "small", "--json", **options))
    assert forecast["settings"]["model.n_layer"] == {"value": 6, "source": "preset small"}
    assert (tmp_path / "home" / "data" / "builtin" / "dataset.json").is_file()
    shape = ["--set", "model.context=32", "--set", "train.tokens_per_step=32"]
    chosen = json.loads(run(silicon, "probe-batch", *shape, "--limit", "30s", "--json", **options))
    assert chosen["probes"][0]["verdict"] == "fits", "the probe's child finds the installed package too"
