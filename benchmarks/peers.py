"""One side of a comparison, in a process of its own: a JSON line on stdout. See bench.py."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siliconlm.config import Layer, MachineConfig, ModelConfig, SampleConfig, read_profile, resolve
from siliconlm.data.prepare import prepare
from siliconlm.data.tokenizer import bpe_tokenizer, byte_tokenizer
from siliconlm.hardware.device import open_device, peak_resident
from siliconlm.inference.session import generate
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES, to_hf_tensors
from siliconlm.model.weights import model_files, write_tensors
from siliconlm.training.loop import train_step
from siliconlm.training.state import TrainState

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read when it is imported

SEQUENCES, LENGTH = 4, 512
STEPS = 3  # measured, after one that warms up
SAMPLED = 500  # tokens
TEXT_BYTES = 32 << 20


# --- training step ---------------------------------------------------------------------------------------------------


def step(side: str, words: str) -> dict[str, float]:
    """Tokens/s and peak resident bytes of training GPT-2's shape, 4 sequences of 512 tokens a step."""
    shape: dict[str, int] = json.loads(words)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, shape["vocab_size"], (SEQUENCES, LENGTH + 1)))
    once = theirs(shape, ids) if side == "theirs" else ours(shape, ids, "bfloat16" if side == "narrow" else "float32")
    once()
    begun = time.perf_counter()
    for _ in range(STEPS):
        once()
    seconds = time.perf_counter() - begun
    return {"tokens_per_s": STEPS * SEQUENCES * LENGTH / seconds, "peak": peak_resident()}


def theirs(shape: dict[str, int], ids: torch.Tensor) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["context"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_inner=shape["n_ff"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def once() -> None:
        model(ids[:, :-1], labels=ids[:, :-1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return once


def ours(shape: dict[str, int], ids: torch.Tensor, moments: str) -> Callable[[], None]:
    heads = shape["n_head"]
    gpt2: dict[str, Any] = {f"model.{name}": value for name, value in shape.items() if name != "context"}
    gpt2 |= {"model.n_kv_head": heads, "model.head_dim": shape["n_embd"] // heads, "model.context": LENGTH}
    gpt2 |= {"model.norm": "layernorm", "model.position": "learned", "model.mlp": "gelu", "model.qk_norm": False}
    gpt2 |= {
        "model.bias": True,
        "optim.name": "adamw",
        "optim.state_dtype": moments,
        "train.tokens_per_step": SEQUENCES * LENGTH,
    }
    machine = {"machine.micro_batch": SEQUENCES, "machine.chunked_loss": True}
    config = resolve(Layer("benchmark", {"machine.device": "cpu", **gpt2, **machine}))
    state = TrainState.new(config, open_device(config.machine))
    return lambda: train_step(state, ids.numpy(), 0.01) and None


def preset(name: str) -> dict[str, float]:
    """Peak resident bytes of training a preset, one sequence of 1,024 tokens at a time."""
    shape = {"model.context": 1024, "model.vocab_size": 32_000, "train.tokens_per_step": 2048}
    machine = {"machine.device": "cpu", "machine.micro_batch": 1, "machine.chunked_loss": True}
    config = resolve(read_profile(name, kind="preset"), Layer("benchmark", shape | machine))
    state = TrainState.new(config, open_device(config.machine))
    sequences = np.random.default_rng(1).integers(0, 32_000, (2, 1025))
    for _ in range(2):
        train_step(state, sequences, 0.01)
    return {"peak": peak_resident(), "parameters": state.model.count_parameters()}


# --- sampling --------------------------------------------------------------------------------------------------------

SMALL = {"n_layer": 4, "n_embd": 128, "context": 512, "vocab_size": 320}
QWEN3 = {**SMALL, "n_head": 4, "n_kv_head": 2, "head_dim": 32, "n_ff": 384}
GPT2 = {**SMALL, "n_head": 4, "n_kv_head": 4, "head_dim": 32, "n_ff": 512, **FEATURES["gpt2"]}


def sample(side: str) -> dict[str, float]:
    """Tokens/s of drawing 500 tokens from a fresh model of 0.8 M parameters."""
    model = Decoder(ModelConfig(**(GPT2 if side == "plain" else QWEN3))).eval()
    model.initialise(1)
    draw = {"plain": plain, "transformers": generated, "ours": streamed, "ours16": together}[side](model)
    draw(8)
    begun = time.perf_counter()
    made = draw(SAMPLED)
    return {"tokens_per_s": made / (time.perf_counter() - begun), "parameters": model.count_parameters()}


def plain(model: Decoder) -> Callable[[int], int]:
    """All tokens so far through the model for each new one, as nanoGPT samples, from nanoGPT's shape."""

    @torch.inference_mode()
    def draw(count: int) -> int:
        ids = torch.tensor([[10]])
        for _ in range(count):
            logits = model(ids[:, -model.config.context :])[:, -1]
            ids = torch.cat((ids, torch.multinomial(torch.softmax(logits, -1), 1)), dim=1)
        return count

    return draw


def generated(model: Decoder) -> Callable[[int], int]:
    """The same weights by transformers' generate."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in model_files(model.config, byte_tokenizer()).items():
            (folder / file).write_bytes(text)
        write_tensors(folder / "model.safetensors", to_hf_tensors(model.config, dict(model.named_parameters())))
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other.generation_config.eos_token_id = None

    def draw(count: int) -> int:
        made = other.generate(torch.tensor([[10]]), max_new_tokens=count, do_sample=True, pad_token_id=0)
        return int(made.size(1)) - 1

    return draw


def streamed(model: Decoder, texts: int = 1) -> Callable[[int], int]:
    endless = replace(byte_tokenizer(), eos=-1)  # then the end of text is a special token, which is never drawn
    device = open_device(MachineConfig(device="cpu"))

    def draw(count: int) -> int:
        settings = SampleConfig(max_tokens=count, temperature=1.0, num_samples=texts)
        return sum(piece.tokens for piece in generate(model, endless, device, "\n", settings, seed=1))

    return draw


def together(model: Decoder) -> Callable[[int], int]:
    return streamed(model, texts=16)


# --- tokenising ------------------------------------------------------------------------------------------------------


def tokens(side: str, text: str) -> dict[str, float]:
    """MB/s of 32 MB through a BPE tokenizer of 4,096 entries: the library alone, or our whole `prepare`."""
    sample = Path(text).read_text()
    tokenizer = bpe_tokenizer([sample], 4096)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(tokenizer.json())
        large = sample * (TEXT_BYTES // len(sample.encode()))
        (folder / "large.txt").write_text(large)
        begun = time.perf_counter()
        if side == "theirs":
            pieces = [large[start : start + (1 << 16)] for start in range(0, len(large), 1 << 16)]
            tokenizer.encode_batch(pieces)
        else:
            for _ in prepare([str(folder / "large.txt")], "benchmark", str(folder / "tokenizer.json"), force=True):
                pass
        return {"mb_per_s": len(large.encode()) / 1e6 / (time.perf_counter() - begun)}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, float]]] = {
        "step": step,
        "preset": preset,
        "sample": sample,
        "tokens": tokens,
    }
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))
