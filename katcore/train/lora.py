"""Low-rank adapters beside a model's linear layers, by peft.

The model stays the class it is, so trees, objectives and the embedded engine know nothing of adapters. What
is trained is written twice: the adapter, as peft and vLLM read it, and the model with the adapter added in.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from katcore.errors import StageError
from katcore.settings import LoraSettings

_NAME = "default"
_BEFORE = "base_model.model."
"""What peft and vLLM put before the name of a layer."""


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> None:
    """Freeze all weights and put adapters beside them, which change nothing yet.

    Raises:
        StageError: there is no linear layer of a name in `targets`, or experts or routers have it.
    """
    targets = settings.targets
    config = LoraConfig(
        r=settings.rank,
        # One that is no whole number peft takes as it is, whatever its annotation says.
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # Its own `all-linear` would have experts and routers, too.
        target_modules=_linear(model) if targets == "all-linear" else list(targets),
    )
    try:
        inject_adapter_in_model(config, model, _NAME)
    except ValueError as error:
        raise StageError(f"lora.targets does not fit {type(model).__name__}: {error}") from error
    if others := config.target_parameters:
        raise StageError(
            f"lora.targets does not fit {type(model).__name__}: its {', '.join(sorted(others))} are of"
            " experts or routers, which take no adapters; name layers that only others have, such as"
            " [q_proj, k_proj, v_proj, o_proj]"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_A" in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    model.eval()


def _linear(model: Any) -> list[str]:
    """All linear layers but the output projection."""
    last = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not last
    ]


@contextmanager
def dropping(model: Any) -> Iterator[None]:
    """Inside, adapters drop what `dropout` says; elsewhere nothing does."""
    layers = [module.lora_dropout for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def save_adapter(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, of the model or of `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[_NAME]
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    content = json.loads(path.read_bytes())
    # vLLM knows layers by the last part of their names, and no `all-linear`.
    content["target_modules"] = sorted({name.rpartition(".")[2] for name in config.target_modules})
    content |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    path.write_text(json.dumps(content, indent=1, sort_keys=True))
    state = get_peft_model_state_dict(model, weights and dict(weights), adapter_name=_NAME)
    save_file(
        {f"{_BEFORE}{name}": tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def merge(model: Any) -> None:
    """Add the adapters to the weights and take them away: a plain model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, module.get_base_layer())
    del model.peft_config
