"""Speed, as ratios in one run on one machine: the work, a yardstick, ours.

    python benchmarks/bench.py --text input.txt [--only loss step memory sample start data] [--full] [--json FILE]

`input.txt` is tiny Shakespeare, which `silicon prepare shakespeare` downloads. Both sides of a row take turns in
processes of their own and medians are quoted. Prints a table, and writes it as JSON. `--full` adds the GPT-2 124M step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PEERS = Path(__file__).parent / "peers.py"
TURNS = 3
# nanoGPT's recipe for laptops: 2,000 steps of 12 sequences of 64 characters.
LAPTOP = {
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.n_kv_head": 4,
    "model.head_dim": 32,
    "model.n_embd": 128,
    "model.n_ff": 512,
    "model.context": 64,
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.position": "learned",
    "model.mlp": "gelu",
    "model.qk_norm": "false",
    "model.bias": "true",
    "train.tokens_per_step": 768,
    "train.schedule": "cosine",
    "train.warmup": 0.05,
    "train.final_lr": 0.1,
    "train.eval_every": 1_000_000,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.beta2": 0.99,
    "machine.micro_batch": 12,
}
GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_ff": 3072, "vocab_size": 50304, "context": 1024}
MEDIUM = {"n_layer": 12, "n_embd": 512, "n_head": 8, "n_ff": 2048, "vocab_size": 8192, "context": 512}


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is how many times better ours is; `target` what it is to be at least."""

    work: str
    yardstick: str
    ours: str
    ratio: float
    target: float


def silicon(*words: str) -> list[dict[str, Any]]:
    """Run a command; its JSON lines."""
    command = [sys.executable, "-m", "siliconlm", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def peer(*words: object) -> dict[str, Any]:
    """Run one side of a comparison out of peers.py; its answer."""
    done = subprocess.run([sys.executable, str(PEERS), *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def assignments(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def loss(text: Path, full: bool) -> Iterator[Row]:
    """Validation loss of the laptop recipe, and of ours after an eighth of its time and after all of it. nanoGPT's own
    run of it ended at 1.8857; in our loop, which starts from other weights, it ends lower."""
    silicon("prepare", str(text), "--name", "shakespeare", "--tokenizer", "char")
    base = ["train", "--data", "shakespeare", "--profile", "none"]
    recipe = silicon(*base, "--steps", "2000", *assignments(LAPTOP))[-1]
    seconds = recipe["tokens"] / recipe["tokens_per_s"]
    told = f"{recipe['val_loss']:.4f} in {seconds:.0f} s"
    for share, target in ((1 / 8, 1.8857), (1.0, 1.50)):
        ours = silicon(*base[:3], "--time", f"{share * seconds:.1f}s")[-1]
        work = f"validation loss after {share:.3g} of the laptop recipe's time"
        yield Row(work, told, f"{ours['val_loss']:.4f} in {ours['seconds']:.0f} s", target / ours["val_loss"], 1.0)


def step(text: Path, full: bool) -> Iterator[Row]:
    """A training step of GPT-2's shape against transformers with torch's AdamW: speed and peak memory."""
    for name, shape in [("medium", MEDIUM), *([("GPT-2 124M", GPT2)] if full else [])]:
        sides = in_turns({side: ("step", side, json.dumps(shape)) for side in ("theirs", "ours", "narrow")})
        speeds = {side: statistics.median(turn["tokens_per_s"] for turn in found) for side, found in sides.items()}
        peaks = {side: min(turn["peak"] for turn in found) for side, found in sides.items()}
        work = f"training step, {name} shape, 4 x 512, float32"
        words = {side: f"{speeds[side]:,.0f} tokens/s" for side in speeds}
        yield Row(work, words["theirs"], words["ours"], speeds["ours"] / speeds["theirs"], 1.5)
        words = {side: f"{peaks[side] / 1e9:.2f} GB" for side in peaks}
        for work, side in (("its peak memory", "ours"), ("its peak memory, moments in bfloat16", "narrow")):
            yield Row(work, words["theirs"], words[side], peaks["theirs"] / peaks[side], 2.0)
        yield Row(
            "its speed, moments in bfloat16",
            "float32",
            f"{speeds['narrow']:,.0f}",
            speeds["narrow"] / speeds["ours"],
            1.0,
        )


def memory(text: Path, full: bool) -> Iterator[Row]:
    """Peak memory of training the larger presets, one sequence of 1,024 tokens at a time."""
    for name, most in (("medium", 4e9), ("large", 6e9)):
        peak = peer("preset", name)["peak"]
        yield Row(
            f"peak memory, {name}, 1 x 1,024", f"at most {most / 1e9:.0f} GB", f"{peak / 1e9:.2f} GB", most / peak, 1.0
        )


def sample(text: Path, full: bool) -> Iterator[Row]:
    """500 tokens from 0.8 M parameters: without a cache, as nanoGPT; and transformers' generate."""
    found = in_turns({side: ("sample", side) for side in ("plain", "transformers", "ours", "ours16")})
    rates = {side: statistics.median(turn["tokens_per_s"] for turn in rows) for side, rows in found.items()}
    words = {side: f"{rate:,.0f} tokens/s" for side, rate in rates.items()}
    for work, other, side, target in (
        ("500 tokens, 0.8 M parameters (nanoGPT: no cache)", "plain", "ours", 10.0),
        ("500 tokens (transformers' generate)", "transformers", "ours", 2.0),
        ("16 texts at once (ours one by one)", "ours", "ours16", 1.0),
    ):
        yield Row(work, words[other], words[side], rates[side] / rates[other], target)


def start(text: Path, full: bool) -> Iterator[Row]:
    """Wall time of whole commands."""
    silicon("prepare", str(text), "--name", "start", "--tokenizer", "char")
    silicon("train", "--data", "start", "--preset", "tiny", "--profile", "none", "--steps", "1", "--name", "start")
    for words, limit in (("--help", 0.3), ("doctor", 4.0), ("sample ROMEO --run start --json", 3.0)):
        took = statistics.median(wall(words.split()) for _ in range(TURNS))
        yield Row(f"silicon {words}", f"at most {limit} s", f"{took:.2f} s", limit / took, 1.0)


def wall(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "siliconlm", *words], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - begun


def data(text: Path, full: bool) -> Iterator[Row]:
    """Tokenising 32 MB with a BPE tokenizer against the library's own rate."""
    found = in_turns({side: ("tokens", side, text) for side in ("theirs", "ours")})
    rates = {side: statistics.median(turn["mb_per_s"] for turn in rows) for side, rows in found.items()}
    words = {side: f"{rate:.1f} MB/s" for side, rate in rates.items()}
    yield Row("tokenising (encode_batch alone)", words["theirs"], words["ours"], rates["ours"] / rates["theirs"], 0.9)


PARTS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "loss": loss,
    "step": step,
    "memory": memory,
    "sample": sample,
    "start": start,
    "data": data,
}


def in_turns(sides: dict[str, tuple[object, ...]]) -> dict[str, list[dict[str, Any]]]:
    """The answers of all sides, which run one after the other, TURNS times: so the machine's drift meets them all."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(TURNS):
        for side, words in sides.items():
            found[side].append(peer(*words))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--full", action="store_true", help="GPT-2 124M too")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/bench.json"))
    given = parser.parse_args()
    rows: list[Row] = []
    print(f"{'work':58}{'yardstick':>24}{'ours':>20}{'ratio':>8}{'target':>8}")
    with tempfile.TemporaryDirectory() as home:
        os.environ["SILICON_HOME"] = home
        for name in given.only:
            for row in PARTS[name](given.text.resolve(), given.full):
                rows.append(row)
                print(f"{row.work:58}{row.yardstick:>24}{row.ours:>20}{row.ratio:>8.2f}{row.target:>8.2f}", flush=True)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    told = {**machine, **versions, "rows": [asdict(row) for row in rows]}
    given.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
