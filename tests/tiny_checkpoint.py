"""A checkpoint of a tiny model with random weights, for the tests of whatever reads checkpoints."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from litgpt import GPT, Config

from litmoe import checkpoints


def tiny_gpt(fields: dict[str, Any], seed: int = 0) -> GPT:
    """LitGPT's own model, in evaluation mode. Its norms are random too, so that a test notices a lost one."""
    torch.manual_seed(seed)
    gpt = GPT(Config(**fields))
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    return gpt.eval()


def wordy_gpt(fields: dict[str, Any]) -> GPT:
    """A tiny model whose likeliest tokens are words of the tests' vocabularies, never special tokens or lone bytes."""
    gpt = tiny_gpt(fields)
    with torch.no_grad():
        gpt.lm_head.weight[:260] = 0
        gpt.lm_head.weight[360:] = 0
    return gpt


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


def mark_anew(folder: Path) -> Path:
    """The checksums of the files as they lie there now: a stranger's checkpoint has right ones."""
    mark = checkpoints.read_metadata(folder)
    (folder / checkpoints.COMPLETE_FILE).unlink()
    checkpoints._write_metadata(folder, mark.step, mark.tokens, {})
    return folder


def load_script(name: str) -> ModuleType:
    """A script of the project as a module, by its path: packages of the same name exist (``evaluate``)."""
    path = Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"door_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def litgpts_finetuning(folder: Path) -> list[str]:
    """Flags of `litgpt finetune_full` for two steps on a few pairs, all of it in ``folder``."""
    pairs = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("fox", "dog", "cat", "sea")] * 3
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    options = {
        "--data": "JSON",
        "--data.json_path": str(folder / "pairs.json"),
        "--data.val_split_fraction": "0.3",
        "--data.num_workers": "0",
        "--train.max_seq_length": "256",
        "--train.epochs": "1",
        "--train.max_steps": "2",
        "--train.global_batch_size": "2",
        "--train.micro_batch_size": "1",
        "--train.lr_warmup_steps": "1",
        "--eval.max_new_tokens": "4",
        "--precision": "32-true",
        "--out_dir": str(folder / "finetuned"),
    }
    return [part for item in options.items() for part in item]
