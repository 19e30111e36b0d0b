"""Hugging Face names and configs, in and out: Qwen3, Llama and GPT-2 as features of the one decoder.

Qwen3 and Llama weights carry our own names, so for them this file only writes config.json. `config.json` is written
by hand: transformers 5 leaves out the top-level `rope_theta` that mlx-lm and Ollama read.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from siliconlm.config import ModelConfig
from siliconlm.errors import SiliconError
from siliconlm.model.decoder import Decoder

FEATURES: dict[str, dict[str, Any]] = {
    "qwen3": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True, "bias": False},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": False, "bias": False},
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu", "qk_norm": False, "bias": True},
}
# What a config.json may say of features that the decoder does not have: only that they are off.
ABSENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
GPT2_NAMES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def family_of(model: ModelConfig) -> str:
    """The Hugging Face family whose features these are; SiliconError naming what differs where there is none."""
    distances = {
        family: [f"{name}={getattr(model, name)}" for name, value in features.items() if getattr(model, name) != value]
        for family, features in FEATURES.items()
    }
    family, differing = min(distances.items(), key=lambda item: len(item[1]))
    if differing:
        raise SiliconError(
            f"no known model family has this shape: it is {family} but for {', '.join(differing)}",
            where="model",
            fix="Use the features of qwen3 (the default), llama or gpt2.",
        )
    if family == "gpt2" and (model.n_head * model.head_dim != model.n_embd or model.n_kv_head != model.n_head):
        raise SiliconError("a GPT-2 shape needs n_head * head_dim = n_embd and n_kv_head = n_head", where="model")
    return family


def to_hf_config(model: ModelConfig, eos: int) -> dict[str, Any]:
    """config.json as transformers (4.57 and 5), mlx-lm, llama.cpp and Ollama all read it."""
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
        "initializer_range": 0.02,
    }
    common |= {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos, "use_cache": True}
    common |= {"torch_dtype": "float32", "dtype": "float32"}
    family = family_of(model)
    if family == "gpt2":
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **_gpt2_config(model), **common}
    shape = {
        "hidden_size": model.n_embd,
        "intermediate_size": model.n_ff,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_kv_head,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
    }
    if family == "llama":
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "mlp_bias": False, **common}
    sliding = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": model.n_layer}
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **shape, **sliding, **common}


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_inner": model.n_ff,
        "n_positions": model.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def from_hf_config(config: Any, where: str) -> ModelConfig:
    """The shape behind a config.json. SiliconError for a family or a feature that the decoder does not have."""

    def bad(why: str) -> SiliconError:
        return SiliconError(why, where=where, kind="bad_data")

    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str) or family not in FEATURES:
        raise bad(f"model type {family!r} is not one of {', '.join(FEATURES)}")
    for name, allowed in ABSENT.items():
        if config.get(name, allowed[0]) not in allowed:
            raise bad(f"{name} = {config[name]!r} is not supported")
    try:
        fields = _gpt2_fields(config) if family == "gpt2" else _llama_fields(config, where)
        fields |= {"vocab_size": config["vocab_size"], "tied": config.get("tie_word_embeddings", family == "gpt2")}
        return ModelConfig(**fields, **FEATURES[family])
    except KeyError as error:
        raise bad(f"{error.args[0]} is missing") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise bad(": ".join([*map(str, problem["loc"]), problem["msg"]])) from None
    except (TypeError, AttributeError, ValueError, ArithmeticError):
        raise bad("an entry has the wrong type") from None


def _llama_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SiliconError("scaled and partial rotary positions are not supported", where=where, kind="bad_data")
    heads = config["num_attention_heads"]
    return {
        "n_layer": config["num_hidden_layers"],
        "n_embd": config["hidden_size"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "n_ff": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
        "norm_eps": config["rms_norm_eps"],
    }


def _gpt2_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_layer": config["n_layer"],
        "n_embd": config["n_embd"],
        "n_head": config["n_head"],
        "n_kv_head": config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "n_ff": config.get("n_inner") or 4 * config["n_embd"],
        "context": config["n_positions"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def to_hf_tensors(model: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the family's names. The tied head is left out."""
    weights = {name: weight for name, weight in weights.items() if not (model.tied and name == "lm_head.weight")}
    if family_of(model) != "gpt2":
        return weights
    renamed = {}
    for name, weight in weights.items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            continue
        renamed[_gpt2_name(name)] = weight.t() if _is_conv1d(name, weight) else weight
    for layer in range(model.n_layer):
        for kind in ("weight", "bias"):
            parts = [weights[f"model.layers.{layer}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            joined = torch.cat(parts)
            renamed[f"transformer.h.{layer}.attn.c_attn.{kind}"] = joined.t() if kind == "weight" else joined
    return {name: weight.contiguous() for name, weight in renamed.items()}


def from_hf_tensors(model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A family's tensors under our names, the tied head put back. The inverse of `to_hf_tensors`."""
    if family_of(model) == "gpt2":
        tensors = _from_gpt2(model, tensors)
    if model.tied and "model.embed_tokens.weight" in tensors:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    return tensors


def _from_gpt2(model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for GPT-2's tensors. What GPT-2 does not have keeps its name, and is then found to be unknown."""
    weights, known = {}, set()
    for name in _our_names(model):
        joined = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        theirs = _joined_name(name) if joined else _gpt2_name(name)
        known.add(theirs)
        if (tensor := tensors.get(theirs)) is None:
            continue
        tensor = tensor.t() if _is_conv1d(name, tensor) else tensor
        # A tensor of the wrong shape gives thirds of the wrong shape, never an error here.
        weights[name] = tensor.reshape(tensor.shape or (1,)).tensor_split(3)[_third(name)] if joined else tensor
    return {**weights, **{name: tensor for name, tensor in tensors.items() if name not in known}}


def _joined_name(name: str) -> str:
    """GPT-2 keeps the projections of queries, keys and values in one tensor."""
    _, _, layer, _, _, kind = name.split(".")
    return f"transformer.h.{layer}.attn.c_attn.{kind}"


def _third(name: str) -> int:
    return "qkv".index(name.split(".")[4][0])


def _our_names(model: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Decoder(model).named_parameters()]


def _gpt2_name(name: str) -> str:
    fixed = {"model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe", "lm_head": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    if stem == "model.norm":
        return f"transformer.ln_f.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"transformer.h.{layer}.{GPT2_NAMES[part]}.{kind}"


def _is_conv1d(name: str, weight: Tensor) -> bool:
    """GPT-2 keeps its linear layers transposed (Conv1D)."""
    return weight.dim() == 2 and ".layers." in name
