"""The decoder held against transformers: same logits, same names, same token ids, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from siliconlm.config import ModelConfig
from siliconlm.data.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer, char_tokenizer
from siliconlm.errors import SiliconError
from siliconlm.model.decoder import Decoder
from siliconlm.model.families import FEATURES, family_of, from_hf_config, from_hf_tensors, to_hf_config, to_hf_tensors
from siliconlm.model.weights import model_files, read_model, read_tensors, write_tensors

Random = Callable[..., Decoder]
NASTY = (
    "",
    " ",
    "\n",
    "\r\n\r\n \t\n",
    "   leading and trailing   ",
    "It's they'LL I'd 'tis don't",
    "12345 3.14 x2",
    "naïve café — “quotes” … 日本語 العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0",
    "<|endoftext|><|im_start|>user\nhi<|im_end|>",
    "\x00\x01\x7f\x1b[31m",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "a" * 300,
)


def folder_of(model: Decoder, path: Path, tokenizer: Tokenizer | None = None) -> Path:
    """What a checkpoint holds of the model, written by the same functions."""
    path.mkdir()
    for name, content in model_files(model.config, tokenizer or byte_tokenizer()).items():
        (path / name).write_bytes(content)
    write_tensors(path / "model.safetensors", to_hf_tensors(model.config, dict(model.named_parameters())))
    return path


def theirs(family: str, tied: bool, kv_heads: int) -> PreTrainedModel:
    """A random model made and initialised by transformers, in which norms and biases are random too."""
    torch.manual_seed(0)
    common = {"vocab_size": 96, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    rope = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope |= {"num_key_value_heads": kv_heads, "max_position_embeddings": 24}
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**rope, head_dim=12, rms_norm_eps=1e-5, **common))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**rope, head_dim=12, **common))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=24, **common))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def ids(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(5))


def test_transformers_computes_the_same_from_our_folder(
    shape: ModelConfig, random_model: Random, tmp_path: Path
) -> None:
    ours = random_model(shape)
    hf = AutoModelForCausalLM.from_pretrained(folder_of(ours, tmp_path / "model"))
    tokens = ids(shape.vocab_size, shape.context)
    with torch.no_grad():
        expected, got = hf.eval()(tokens).logits, ours(tokens)
    assert expected.std() > 0.1, "logits so even would agree whatever the model does"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "tied", "kv_heads"),
    [("qwen3", True, 2), ("qwen3", False, 1), ("llama", False, 2), ("llama", True, 4), ("gpt2", True, 4)],
)
def test_we_compute_the_same_from_a_folder_of_transformers(
    family: str, tied: bool, kv_heads: int, tmp_path: Path
) -> None:
    hf = theirs(family, tied, kv_heads)
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(char_tokenizer("abc").json())
    ours, _ = read_model(tmp_path)
    tokens = ids(96, 24)
    with torch.no_grad():
        expected, got = hf(tokens).logits, ours(tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_our_tensors_are_transformers_own_state_dict(shape: ModelConfig, random_model: Random, tmp_path: Path) -> None:
    ours = random_model(shape)
    folder = folder_of(ours, tmp_path / "model")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    state = hf.state_dict()
    if shape.tied:
        assert torch.equal(state.pop("lm_head.weight"), ours.model.embed_tokens.weight)
    written = read_tensors(folder / "model.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name]), name


def test_names_go_out_and_come_back(shape: ModelConfig, random_model: Random) -> None:
    ours = random_model(shape)
    back = from_hf_tensors(shape, to_hf_tensors(shape, dict(ours.named_parameters())))
    state = ours.state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_the_shape_goes_out_and_comes_back(shape: ModelConfig) -> None:
    assert from_hf_config(to_hf_config(shape, 0), "config.json") == shape


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_transformers_tokenizes_a_checkpoint_folder_alike(kind: str, random_model: Random, tmp_path: Path) -> None:
    made = {
        "byte": byte_tokenizer,
        "char": lambda: char_tokenizer("".join(NASTY)),
        "bpe": lambda: bpe_tokenizer(["the naïve café's quotes, the other quotes, 12345 日本語 "] * 20, 300),
    }[kind]()
    shape = ModelConfig(n_layer=1, n_embd=8, n_head=1, n_kv_head=1, head_dim=8, n_ff=8, vocab_size=320)
    hf = AutoTokenizer.from_pretrained(folder_of(random_model(shape), tmp_path / "model", made))
    for text in NASTY:
        expected = hf(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert made.encode(text) == expected, repr(text)
        if kind != "char" or "<|" not in text:
            assert hf.decode(expected) == made.decode(expected)
    assert hf.eos_token_id == made.eos
    assert hf(NASTY[5]).input_ids == made.encode(NASTY[5]), "transformers must add no token of its own"


@pytest.mark.parametrize("family", FEATURES)
@pytest.mark.parametrize(
    ("feature", "values"),
    [
        ("norm", ("rmsnorm", "layernorm")),
        ("position", ("rope", "learned")),
        ("mlp", ("swiglu", "gelu")),
        ("qk_norm", (True, False)),
        ("bias", (True, False)),
    ],
)
def test_a_shape_without_a_family_is_refused_by_the_name_of_the_feature(
    family: str, feature: str, values: tuple[object, object]
) -> None:
    other = next(value for value in values if value != FEATURES[family][feature])
    shape = ModelConfig(n_kv_head=4, **{**FEATURES[family], feature: other})
    if {feature, family} in ({"qk_norm", "qwen3"}, {"qk_norm", "llama"}):
        assert family_of(shape) == ("llama" if family == "qwen3" else "qwen3")  # the one feature they differ in
        return
    with pytest.raises(SiliconError, match=f"{feature}={other}"):
        family_of(shape)


def test_gpt2_heads_must_fill_the_width() -> None:
    with pytest.raises(SiliconError, match="GPT-2"):
        family_of(ModelConfig(n_embd=128, n_head=4, n_kv_head=4, head_dim=16, **FEATURES["gpt2"]))
    with pytest.raises(SiliconError, match="GPT-2"):
        family_of(ModelConfig(n_embd=128, n_head=4, n_kv_head=2, head_dim=32, **FEATURES["gpt2"]))


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("qwen3", {"use_sliding_window": True}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_a_feature_that_would_change_the_logits_is_refused(family: str, changed: dict[str, object]) -> None:
    heads = 4 if family == "gpt2" else 2
    config = to_hf_config(ModelConfig(vocab_size=64, n_kv_head=heads, **FEATURES[family]), 0)
    with pytest.raises(SiliconError) as error:
        from_hf_config({**config, **changed}, "config.json")
    assert error.value.kind == "bad_data"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": ["llama"]}, "llama"),
        ({"hidden_size": None}, "n_embd"),
        ({"hidden_size": "wide"}, "n_embd"),
        ({"num_hidden_layers": 10**9}, "n_layer"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"head_dim": -8}, "head_dim"),
        ({"rope_parameters": 7}, "wrong type"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_hostile_config_is_one_line(change: dict[str, object], words: str) -> None:
    config = to_hf_config(ModelConfig(vocab_size=64, **FEATURES["llama"]), 0)
    with pytest.raises(SiliconError, match=words) as error:
        from_hf_config({**config, **change}, "config.json")
    assert error.value.kind == "bad_data" and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_a_missing_entry_is_named(name: str) -> None:
    config = to_hf_config(ModelConfig(vocab_size=64), 0)
    del config[name]
    with pytest.raises(SiliconError, match=name):
        from_hf_config(config, "config.json")
