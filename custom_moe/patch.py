"""The one place where names in LitGPT are replaced, for as long as a ``with`` block runs."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import litgpt.lora
import litgpt.model

from custom_moe.block import MoEBlock
from custom_moe.layer import MoE
from custom_moe.lora import LoRAMoE, LoRAMoEBlock

_REPLACEMENTS = {
    litgpt.model: {"LLaMAMoE": MoE, "Block": MoEBlock},
    litgpt.lora: {"LLaMAMoE": LoRAMoE, "Block": LoRAMoEBlock},
}

# What the replacements rely on: LitGPT's names and the parameters that they take.
_EXPECTED = {
    "LLaMAMoE.__init__": ("self", "config"),
    "LLaMAMoE.forward": ("self", "x"),
    "LLaMAMLP.__init__": ("self", "config", "intermediate_size"),
    "GroupedTopkRouter.__init__": ("self", "config"),
    "Block.__init__": ("self", "config", "block_idx"),
    "Block.forward": ("self", "x", "cos", "sin", "mask", "input_pos", "input_pos_maxp1"),
}


@contextmanager
def use_custom_moe() -> Iterator[None]:
    """While open, ``litgpt.GPT(config)`` builds with ``MoE`` and ``MoEBlock``, and ``litgpt.lora.GPT(config)`` with
    their LoRA forms; afterwards LitGPT is as it was.

    ``litgpt.Config.mlp_class`` finds the layer by the name ``LLaMAMoE`` in ``litgpt.model``, so that the config (and
    the ``model_config.yaml`` of a checkpoint) can keep this name and stock LitGPT reads it. May be nested.

    Raises:
        RuntimeError: where the installed LitGPT does not have the names and signatures that this replaces.
    """
    before = [(module, name, getattr(module, name, None)) for module, names in _REPLACEMENTS.items() for name in names]
    if litgpt.model.Block is not MoEBlock:
        _check_litgpt()
    for module, replacements in _REPLACEMENTS.items():
        for name, replacement in replacements.items():
            setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, found in before:
            setattr(module, name, found)


def _check_litgpt() -> None:
    problems = []
    for name, parameters in _EXPECTED.items():
        class_name, method = name.split(".")
        owner = getattr(litgpt.model, class_name, None)
        function = None if owner is None else getattr(owner, method, None)
        if function is None:
            problems.append(f"litgpt.model.{name if owner is not None else class_name} is missing")
        elif (found := tuple(inspect.signature(function).parameters)) != parameters:
            problems.append(f"litgpt.model.{name} takes ({', '.join(found)}), expected ({', '.join(parameters)})")
    if problems:
        raise RuntimeError(
            f"custom_moe does not fit the installed litgpt {version('litgpt')}: {'; '.join(problems)}. "
            "Install the version that pyproject.toml pins."
        )
