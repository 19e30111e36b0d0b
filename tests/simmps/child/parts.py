"""What the pretend GPU is asked below the command line; writes one JSON object of answers."""

import json
from collections.abc import Callable

import torch

from siliconlm.config import MachineConfig, ModelConfig
from siliconlm.hardware.device import is_out_of_memory, open_device
from siliconlm.model.decoder import Cache, Decoder

SHAPE = ModelConfig(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, n_ff=96, vocab_size=50, context=48)


def error_of(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def chunked_against_whole() -> float:
    """Largest difference of logits: a cache fed in chunks (some longer than one token) there, one pass on the CPU."""
    model = Decoder(SHAPE).eval()
    model.initialise(3)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # these begin as zero, and attention would not count
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        whole = model(ids)
        model.to("mps")
        cache = Cache(SHAPE, 1, torch.device("mps"), torch.float32)
        parts = [model(part.to("mps"), cache).cpu() for part in ids.split([7, 1, 1, 12, 2, 17], dim=1)]
    return float((torch.cat(parts, dim=1) - whole).abs().max())


def out_of_memory() -> dict[str, object]:
    """Asking for twice what is recommended fails in words we know, and a smaller wish is granted afterwards."""
    recommended = torch.mps.recommended_max_memory()
    error = error_of(lambda: torch.empty(2 * recommended, dtype=torch.uint8, device="mps"))
    after = torch.ones(recommended // 2, dtype=torch.uint8, device="mps")
    facts = {"plain": type(error) is RuntimeError, "recognised": is_out_of_memory(error)}
    return {**facts, "text": str(error), "after": int(after[:1000].sum())}


device = open_device(MachineConfig(device="mps", threads=1))
values = torch.ones(4, device="mps")
answers = {
    "default": open_device(MachineConfig(threads=1)).kind,
    "chunked": chunked_against_whole(),
    "out_of_memory": out_of_memory(),
    "missing": str(error_of(lambda: torch.take(values, torch.tensor([1], device="mps")))),
    "float64": str(error_of(lambda: values.double())),
    "mixed": str(error_of(lambda: values + torch.ones(4))),
    "budget": device.memory_budget() / torch.mps.recommended_max_memory(),
}
print(json.dumps(answers))
