"""A checkpoint of a tiny model with random weights, for the tests of whatever reads checkpoints."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from litgpt import GPT, Config

from recipe import checkpoints


def tiny_gpt(fields: dict[str, Any], seed: int = 0) -> GPT:
    """LitGPT's own model, in evaluation mode. Its norms are random too, so that a test notices a lost one."""
    torch.manual_seed(seed)
    gpt = GPT(Config(**fields))
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    return gpt.eval()


def save_tiny(folder: Path, gpt: GPT, tokenizer_dir: Path | None, *, step: int = 1, **kwargs: Any) -> Path:
    """Saves ``gpt`` as a training run would."""
    checkpoints.save(
        folder,
        weights=gpt.state_dict(),
        config=gpt.config,
        hyperparameters=kwargs.pop("hyperparameters", {"seed": 1}),
        step=step,
        tokens=step * 128,
        tokenizer_dir=tokenizer_dir,
        training_state=kwargs.pop("training_state", {"step": step, "moments": [torch.ones(4)]}),
        **kwargs,
    )
    return folder


def door(name: str) -> ModuleType:
    """A script of the project as a module, by its path: packages of the same name exist (``evaluate``)."""
    path = Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"door_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
