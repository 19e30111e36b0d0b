"""What lm-evaluation-harness is told: held against log-probabilities of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from siliconlm.config import ModelConfig
from siliconlm.data.tokenizer import byte_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Measured
from siliconlm.hardware.device import Device
from siliconlm.inference.harness import _pair, _rolling, _until, measure, scores
from siliconlm.inference.session import banned_ids
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import to_hf_tensors
from siliconlm.model.weights import model_files, write_tensors

SHAPE = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_ff=48, vocab_size=320, context=48)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(SHAPE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def device() -> Device:
    return Device("cpu", torch.float32, 1)


@pytest.fixture(scope="module")
def theirs(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("model")
    for name, text in model_files(SHAPE, byte_tokenizer()).items():
        (folder / name).write_bytes(text)
    write_tensors(folder / "model.safetensors", to_hf_tensors(SHAPE, dict(model.named_parameters())))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def log_p(theirs: torch.nn.Module, ids: list[int], start: int) -> tuple[float, bool]:
    with torch.no_grad():
        rows = torch.log_softmax(theirs(torch.tensor([ids[:-1]])).logits[0].float(), -1)[start - 1 :]
    targets = torch.tensor(ids[start:])
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_scores_are_those_of_transformers(model: Decoder, device: Device, theirs: torch.nn.Module) -> None:
    questions = [("The king", " is here"), ("", "Hello"), ("A ", "b"), ("Where is the queen?", " gone")]
    pairs = [_pair(byte_tokenizer(), *question) for question in questions]
    for (found, greedy), (ids, start) in zip(scores(model, device, pairs), pairs, strict=True):
        expected, likeliest = log_p(theirs, ids, start)
        assert found == pytest.approx(expected, abs=1e-4) and greedy == likeliest


def test_the_likeliest_continuation_is_told_as_such(model: Decoder, device: Device) -> None:
    tokenizer = byte_tokenizer()
    said = _until(model, tokenizer, device, "The king", {"until": ["\x00"], "max_gen_toks": 1})
    ids = tokenizer.encode("The king")
    with torch.no_grad():
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert scores(model, device, [([*ids, best], len(ids))])[0][1]
    with torch.no_grad():
        allowed = model(torch.tensor([ids]))[0, -1].index_fill(0, banned_ids(model, tokenizer), -torch.inf)
    assert said == tokenizer.decode([int(allowed.argmax())])


def test_what_is_too_long_loses_its_beginning(model: Decoder, device: Device, theirs: torch.nn.Module) -> None:
    ids = [*byte_tokenizer().encode("word " * 20), 5, 6, 7]
    (found, _), expected = scores(model, device, [(ids, len(ids) - 3)])[0], log_p(theirs, ids[-49:], 46)[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_text_is_scored_token_by_token_once(model: Decoder, device: Device, theirs: torch.nn.Module) -> None:
    tokenizer, text = byte_tokenizer(), "To be, or not to be, that is the question: whether " * 3
    ids = [tokenizer.eos, *tokenizer.encode(text)]
    windows = [ids[first : first + 49] for first in range(0, len(ids) - 1, 48)]
    expected = math.fsum(log_p(theirs, window, 1)[0] for window in windows)
    assert _rolling(model, tokenizer, device, text) == pytest.approx(expected, abs=1e-3)


def test_white_space_at_the_seam_belongs_to_the_continuation() -> None:
    tokenizer = byte_tokenizer()
    assert _pair(tokenizer, "Yes ", "no") == (tokenizer.encode("Yes no"), 3)


@pytest.mark.slow
def test_a_local_task(model: Decoder, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    questions = [{"q": "The king", "choices": [" is here", " qqqqqqqqqqqqqqqqqqqq"], "a": 0}] * 3
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: " + str(tmp_path / "q.jsonl") + "\n"
        "output_type: multiple_choice\ntest_split: train\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: a\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = list(measure(model, byte_tokenizer(), device, [str(tmp_path / "mine.yaml")], 7, limit=2))
    pairs = [_pair(byte_tokenizer(), "The king", choice) for choice in (" is here", " qqqqqqqqqqqqqqqqqqqq")]
    right = scores(model, device, pairs)
    assert found == [Measured(7, "mine", "acc", float(right[0][0] > right[1][0]), 2)]
    with pytest.raises(SiliconError, match="no task named hellaswagg") as caught:
        list(measure(model, byte_tokenizer(), device, ["hellaswagg"], 7))
    assert "hellaswag" in caught.value.fix
