"""LoRA: LitGPT's model, from a checkpoint's weights, and back to them."""

from dataclasses import asdict

import litgpt.lora
import torch
from litgpt import GPT
from torch import Tensor, nn

from custom_moe.litgpt import LoRAExperts, LoRARouter
from litmoe.config import LORA_FIELDS, FinetuneSettings


def lora_config(settings: FinetuneSettings) -> litgpt.lora.Config:
    """The checkpoint's config with the run's LoRA fields."""
    fields = {name: getattr(settings, name) for name in LORA_FIELDS}
    return litgpt.lora.Config(**asdict(settings.model) | fields)


def load_base_weights(gpt: GPT, weights: dict[str, Tensor]) -> None:
    """Loads a checkpoint's weights into a model with or without LoRA; its LoRA parameters begin as no update.

    Raises:
        RuntimeError: the weights are another model's.
    """
    if not isinstance(gpt, litgpt.lora.GPT):
        gpt.load_state_dict(weights)
        return
    missing, unexpected = gpt.load_state_dict(weights, strict=False)
    if wrong := [key for key in missing if not litgpt.lora.lora_filter(key, None)] + unexpected:
        raise RuntimeError(f"the checkpoint's weights do not fit the model: {', '.join(wrong[:5])}")
    for module in gpt.modules():
        if isinstance(module, litgpt.lora.LoRALinear):
            module.reset_parameters()
        elif isinstance(module, (LoRAExperts, LoRARouter)):
            module.reset_lora()
    litgpt.lora.mark_only_lora_as_trainable(gpt)


def load_lora_weights(gpt: GPT, lora_weights: dict[str, Tensor]) -> None:
    """Loads what ``divide_weights`` gave second.

    Raises:
        RuntimeError: they are those of other LoRA settings.
    """
    missing, unexpected = gpt.load_state_dict(lora_weights, strict=False)
    if wrong := [key for key in missing if litgpt.lora.lora_filter(key, None)] + unexpected:
        raise RuntimeError(f"the LoRA weights do not fit the model: {', '.join(wrong[:5])}")


@torch.no_grad()
def divide_weights(gpt: GPT) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(the weights of the plain model, updates added in; the LoRA parameters by LitGPT's keys, or None without LoRA).

    The model stays as it is. As ``litgpt merge_lora``, from a model in memory.
    """
    state = gpt.state_dict()
    if not isinstance(gpt, litgpt.lora.GPT):
        return state, None
    modules = dict(gpt.named_modules())
    lora = {key: value for key, value in state.items() if litgpt.lora.lora_filter(key, value)}
    weights = {key.replace(".linear.", "."): value for key, value in state.items() if key not in lora}
    for key in lora:
        name, _, last = key.rpartition(".")
        if last != "lora_B":
            continue
        module = modules.get(name)
        if isinstance(module, litgpt.lora.LoRALinear):
            update = module.get_lora_AB()
        else:  # a router, or one layer of one expert
            owner: nn.Module = module or modules[name.rsplit(".", 2)[0]]
            update = owner.scaling * (lora[key] @ lora[f"{name}.lora_A"])
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + update
    return weights, lora
