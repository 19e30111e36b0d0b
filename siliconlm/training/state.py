"""Everything that training changes, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from siliconlm.config import RunConfig
from siliconlm.data.tokenizer import Tokenizer
from siliconlm.errors import SiliconError
from siliconlm.events import Saved
from siliconlm.hardware.device import Device
from siliconlm.model import families
from siliconlm.model.decoder import Decoder
from siliconlm.model.weights import load_weights, model_files
from siliconlm.training import optim
from siliconlm.training.checkpoint import Checkpoint, RunFolder


@dataclass(slots=True)
class TrainState:
    """The model, its optimisers and the counters of a run. `seconds` is wall time spent training so far."""

    config: RunConfig
    device: Device
    model: Decoder
    optimisers: list[optim.Optimiser]
    scaler: GradScaler | None
    ema: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    val_loss: float | None = None  # of the weights as they are now, or None

    @classmethod
    def new(cls, config: RunConfig, device: Device, base: Decoder | None = None) -> TrainState:
        """A model with the weights of a base, or fresh ones (a pure function of the shape and `train.seed`), and its
        optimisers."""
        model = Decoder(config.model)
        if base:
            model.load_state_dict(base.state_dict())
        else:
            model.initialise(config.train.seed)
        return cls.around(config, device, model.to(device.torch_device), device.scaler())

    @classmethod
    def around(cls, config: RunConfig, device: Device, model: Decoder, scaler: GradScaler | None) -> TrainState:
        """The state of training a model that is there already, on its device."""
        model.train()
        if config.machine.checkpointing:
            model.model.checkpoint = device.checkpointed
        if config.machine.compile:
            for block in model.model.layers:
                block.compile()
        optimisers = optim.build(model, config.optim, device.orthogonalising_dtype(), config.machine.fused)
        state = cls(config, device, model, optimisers, scaler)
        state.suit(device)
        if config.train.ema:
            state.ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return state

    def suit(self, device: Device) -> None:
        """Give the model the operators that suit a device. A block that is recomputed or compiled as a whole decides
        for itself what it keeps."""
        machine = self.config.machine
        remake = not (machine.checkpointing or machine.compile)
        self.model.model.suit(device.query_block, device.own_norm, remake)

    @torch.no_grad()
    def average(self) -> None:
        """Move the weights' average towards the weights."""
        for name, weight in self.model.named_parameters():
            if name in self.ema:
                self.ema[name].lerp_(weight, 1 - self.config.train.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights in place, where there are any."""
        raw = {name: weight.detach().clone() for name, weight in self.model.named_parameters()} if self.ema else {}
        self._put(self.ema)
        try:
            yield
        finally:
            self._put(raw)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])

    def is_finite(self) -> bool:
        """Whether every weight is a number. Waits for the device once."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all())

    def save(self, run: RunFolder, tokenizer: Tokenizer, fingerprint: str, template: str | None = None) -> Saved:
        """Commit a checkpoint of this state. `template` is the chat template it is taught, if any."""
        shape = self.config.model
        raw: dict[str, Tensor] = dict(self.model.named_parameters())
        tensors = {"model.safetensors": families.to_hf_tensors(shape, self.ema or raw)}
        tensors["optimizer.safetensors"] = optim.state_tensors(self.model, self.optimisers)
        if self.ema:
            tensors["train.safetensors"] = families.to_hf_tensors(shape, raw)
        counters: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "val_loss": self.val_loss,
        }
        counters |= {"data": fingerprint, "scaler": self.scaler.state_dict() if self.scaler else None}
        texts = {**model_files(shape, tokenizer, template), "state.json": json.dumps(counters).encode()}
        return run.save(self.step, self.val_loss, texts, tensors, self.config.train.keep)

    def restore(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        """Take the state of a checkpoint exactly. SiliconError when the data is not the same as when it was saved."""
        counters: dict[str, Any] = checkpoint.state()
        if counters["data"] != fingerprint:
            raise other_data(str(checkpoint.path))
        weights = "train.safetensors" if checkpoint.has("train.safetensors") else "model.safetensors"
        load_weights(self.model, checkpoint.tensors(weights), str(checkpoint.path / weights))
        if self.ema:
            ours = families.from_hf_tensors(self.config.model, checkpoint.tensors("model.safetensors"))
            self.ema = {name: ours[name].to(self.device.torch_device) for name in self.ema}
        saved = checkpoint.tensors("optimizer.safetensors")
        try:
            optim.load_state_tensors(self.model, self.optimisers, saved)
        except KeyError as error:
            raise SiliconError(f"{error} is missing", where=str(checkpoint.path), kind="bad_data") from None
        if self.scaler and counters["scaler"]:
            self.scaler.load_state_dict(counters["scaler"])
        self.step, self.tokens, self.seconds = counters["step"], counters["tokens"], counters["seconds"]
        self.val_loss = counters["val_loss"]


def other_data(where: str) -> SiliconError:
    fix = "Prepare the same text again with the same settings, or start a new run."
    return SiliconError("the dataset is not the one this run was trained on", where=where, fix=fix, kind="bad_data")
