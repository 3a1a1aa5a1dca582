"""LoRA: loads a checkpoint's weights into LitGPT's LoRA model, and merges the updates for saving."""

from dataclasses import asdict

import litgpt.lora
import torch
from litgpt import GPT
from torch import Tensor, nn

from custom_moe.litgpt import LoRAExperts, LoRARouter
from litmoe.config import LORA_FIELDS, FinetuneSettings


def lora_config(settings: FinetuneSettings) -> litgpt.lora.Config:
    """Return the checkpoint's config with the LoRA fields of the run."""
    fields = {name: getattr(settings, name) for name in LORA_FIELDS}
    return litgpt.lora.Config(**asdict(settings.model) | fields)


def load_base_weights(gpt: GPT, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights into a model with or without LoRA. The LoRA updates start at zero.

    Raises:
        RuntimeError: the weights belong to another model.
    """
    if not isinstance(gpt, litgpt.lora.GPT):
        gpt.load_state_dict(weights)
        return
    # Only the LoRA parameters may be missing in the checkpoint.
    missing, unexpected = gpt.load_state_dict(weights, strict=False)
    wrong = [key for key in missing if not litgpt.lora.lora_filter(key, None)] + unexpected
    if wrong:
        raise RuntimeError(f"the checkpoint's weights do not fit the model: {', '.join(wrong[:5])}")
    # The model was built without initial values.
    for module in gpt.modules():
        if isinstance(module, litgpt.lora.LoRALinear):
            module.reset_parameters()
        elif isinstance(module, (LoRAExperts, LoRARouter)):
            module.reset_lora()
    litgpt.lora.mark_only_lora_as_trainable(gpt)


def load_lora_weights(gpt: GPT, lora_weights: dict[str, Tensor]) -> None:
    """Load the LoRA parameters that ``divide_weights`` returned.

    Raises:
        RuntimeError: they belong to other LoRA settings.
    """
    missing, unexpected = gpt.load_state_dict(lora_weights, strict=False)
    wrong = [key for key in missing if litgpt.lora.lora_filter(key, None)] + unexpected
    if wrong:
        raise RuntimeError(f"the LoRA weights do not fit the model: {', '.join(wrong[:5])}")


@torch.no_grad()
def divide_weights(gpt: GPT) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the weights of the model without LoRA, with the updates merged, and the LoRA parameters or None.

    Both have LitGPT's keys. Like ``litgpt merge_lora``, but from a model in memory, which does not change.
    """
    state = gpt.state_dict()
    if not isinstance(gpt, litgpt.lora.GPT):
        return state, None
    modules = dict(gpt.named_modules())
    lora = {key: value for key, value in state.items() if litgpt.lora.lora_filter(key, value)}
    # LoRALinear wraps the original layer as its attribute `linear`.
    weights = {key.replace(".linear.", "."): value for key, value in state.items() if key not in lora}
    for key in lora:
        name, _, attribute = key.rpartition(".")
        if attribute != "lora_B":  # one update for each pair of A and B
            continue
        module = modules.get(name)
        if isinstance(module, litgpt.lora.LoRALinear):
            update = module.get_lora_AB()
        else:
            # A router, or one layer of one expert. The state dict names the experts' layers one by one, but the
            # parameters belong to the stacked experts, two levels above.
            owner: nn.Module = module or modules[name.rsplit(".", 2)[0]]
            update = owner.scaling * (lora[key] @ lora[f"{name}.lora_A"])
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + update
    return weights, lora
