"""What several test files share: metric tables, comparisons of runs, tiny models and their checkpoints."""

import copy
import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from litgpt import GPT, Config
from litgpt.model import LLaMAMoE
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import copy_config_files
from torch import Tensor, nn

from custom_moe import MoE
from litmoe import checkpoints
from litmoe.config import PROJECT, parse_run
from litmoe.finetune_config import parse_finetuning
from litmoe.train.finetune import finetune, ready_to_finetune
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain
from litmoe.validation import check

CPU_FP32 = {"device": "cpu", "precision": "32-true"}
"""Arguments of everything that loads a model"""

# --- configs

MOE_200M = dict(
    name="MoE-200M",
    block_size=2048,
    vocab_size=50257,
    padded_vocab_size=50257,
    n_layer=12,
    n_embd=768,
    n_head=12,
    n_query_groups=4,
    mlp_class_name="LLaMAMoE",
    moe_intermediate_size=2048,
    n_expert=8,
    n_expert_per_token=2,
    norm_class_name="RMSNorm",
    norm_eps=1.0e-5,
    bias=False,
    parallel_residual=False,
    rope_base=10000,
    rotary_percentage=1.0,
)
"""Fields of the default model"""
DENSE_FIELDS = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "n_expert": 0, "n_expert_per_token": 0}
"""Fields that make the tiny model of ``moe_fields`` dense"""
NEOX_FIELDS = {
    **DENSE_FIELDS,
    **{"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "n_query_groups": 4},
}
"""Fields that make it a model like GPT-2"""
SIGMOID_FIELDS = dict(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
"""Fields of a sigmoid router"""
SIGMOID_FLAGS = (
    *("--model.n_expert_groups", "2", "--model.n_topk_groups", "2", "--model.n_topk_scores_per_group", "2"),
    *("--model.norm_topk_prob", "true"),
)
"""Flags that give the run file's model a sigmoid router with a selection bias"""


# --- files and metrics


def load_script(name: str) -> ModuleType:
    """Import a script of the project by its path, because packages of the same name exist (``evaluate``)."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", PROJECT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below ``folder`` by its path. Lock files and empty folders do not count."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def metric_rows(out_dir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's ``metrics.csv``."""
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untimed_rows(out_dir: Path) -> list[dict[str, str]]:
    """Return the rows of ``metrics.csv`` without the columns that depend on the clock."""
    timed = ("time", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in timed} for row in metric_rows(out_dir)]


def column(out_dir: Path, name: str) -> list[float]:
    """Return the values of a column of ``metrics.csv``, without empty cells."""
    return [float(row[name]) for row in metric_rows(out_dir) if row[name]]


def training_steps(out_dir: Path) -> list[int]:
    """Return the steps with a training row. Evaluations are rows of their own."""
    return [int(row["step"]) for row in metric_rows(out_dir) if row["train_loss"]]


# --- comparisons


def assert_equal(found: Any, expected: Any, place: str = "state") -> None:
    """Compare nested values exactly, tensors included. ``place`` is named in the message."""
    assert type(found) is type(expected), place
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert list(found) == list(expected), place
        for name in expected:
            assert_equal(found[name], expected[name], f"{place}[{name!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{place}[{index}]")
    else:
        assert found == expected, place


def assert_same_state(found: Path, expected: Path) -> None:
    """Compare the training states of two checkpoints exactly, except for the seconds that training took."""
    states = [checkpoints.load_training_state(folder) for folder in (found, expected)]
    for state in states:
        del state["progress"]["seconds"], state["interval"]["seconds"]
    assert_equal(*states)


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare two runs bit by bit: every logged number except times, the final weights and the training state."""
    assert untimed_rows(found) == untimed_rows(expected)
    weights = [checkpoints.read_metadata(out / "final").files["lit_model.pth"] for out in (found, expected)]
    assert weights[0] == weights[1]
    assert_same_state(found / "final", expected / "final")
    assert checkpoints.leftovers(found) == []


# --- tiny models and their checkpoints


def write_run_file(folder: Path, prepared: Path, model: dict[str, Any]) -> Path:
    """Write a run file of 12 steps of 2 x 2 sequences of 16 tokens into ``folder/out``."""
    settings = {
        "model": model,
        "out_dir": str(folder / "out"),
        "tokenizer_dir": str(prepared / "tokenizer"),
        "data": {
            "class_path": "litmoe.data.TokenizedText",
            "init_args": {
                "train_data_path": str(prepared / "data" / "train"),
                "val_data_path": str(prepared / "data" / "val"),
                "num_workers": 0,
            },
        },
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_seq_length": 16,
            "max_steps": 12,
            "lr_warmup_steps": 2,
            "max_norm": 1.0,
            "min_lr": 1.0e-4,
            "save_interval": 4,
        },
        "eval": {"interval": 4, "max_iters": 3},
        "sample": {"max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
        "progress": False,
        # Not what this CPU would choose: the tests compare numbers.
        "precision": "32-true",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def write_tune_file(folder: Path, instructions: Path) -> Path:
    """Write a run file of ``finetune.py``: 8 steps of 2 x 2 conversations."""
    settings = {
        "data": {"class_path": "litmoe.data.InstructionData", "init_args": {"data_dir": str(instructions)}},
        "precision": "32-true",
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 8,
            "log_interval": 1,
            "lr_warmup_steps": 1,
            "max_norm": 1.0,
            "min_lr": 1.0e-4,
            "save_interval": 4,
        },
        "eval": {"interval": 4, "max_iters": 100, "initial_validation": True},
        "sample": {"prompt": None, "max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
        "progress": False,
        "compile": False,
    }
    path = folder / "finetune.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def tiny_gpt(fields: dict[str, Any], seed: int = 0) -> GPT:
    """Return LitGPT's own model in evaluation mode. Its norms are random too, so that a test notices a lost one."""
    torch.manual_seed(seed)
    gpt = GPT(Config(**fields))
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    return gpt.eval()


def wordy_gpt(fields: dict[str, Any]) -> GPT:
    """Return a tiny model that only writes words of the tests' vocabularies, no special tokens or single bytes."""
    gpt = tiny_gpt(fields)
    with torch.no_grad():
        gpt.lm_head.weight[:260] = 0
        gpt.lm_head.weight[360:] = 0
    return gpt


def save_tiny(folder: Path, gpt: GPT, tokenizer_dir: Path | None, *, step: int = 1, **kwargs: Any) -> Path:
    """Save ``gpt`` as a training run does."""
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


def renew_checksums(folder: Path) -> Path:
    """Write the metadata of a changed checkpoint again, so that its checksums are right."""
    metadata = checkpoints.read_metadata(folder)
    (folder / checkpoints.COMPLETE_FILE).unlink()
    checkpoints._write_metadata(folder, metadata.step, metadata.tokens, {})
    return folder


def convert_for_transformers(folder: Path, out: Path) -> None:
    """Convert as `litgpt.eval.evaluate.convert_and_evaluate` does before it loads the model."""
    out.mkdir()
    copy_config_files(source_dir=folder, out_dir=out)
    convert_lit_checkpoint(checkpoint_dir=folder, output_dir=out)
    torch.save(torch.load(out / "model.pth"), out / "pytorch_model.bin")
    (out / "model.pth").unlink()


def litgpt_finetuning_flags(folder: Path) -> list[str]:
    """Return flags of `litgpt finetune_full` for two steps on a few pairs; all files are in ``folder``."""
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


# --- training in this process


def train_here(run_file: Path, *flags: str) -> Path:
    """Do what ``run_train.py`` does, in this process, and return the ``out_dir``."""
    run = parse_run(["--config", str(run_file), *flags])
    check(run.settings, run.optimizer)
    run, resume_from = ready(run)
    pretrain(run, resume_from=resume_from)
    return run.settings.out_dir


def tune_here(run_file: Path, base: Path, out_dir: Path, *flags: str) -> Path:
    """Do what ``finetune.py`` does, in this process, and return the ``out_dir``."""
    run = parse_finetuning([str(base), "--config", str(run_file), "--out_dir", str(out_dir), *flags])
    check(run.settings, run.optimizer)
    finetune(run, resume_from=ready_to_finetune(run.settings))
    return run.settings.out_dir


# --- layers


def moe_config(fields: dict[str, Any]) -> Config:
    """Return the config of a small MoE layer."""
    sizes = dict(n_layer=2, n_embd=32, n_head=2, moe_intermediate_size=48, n_expert=4, n_expert_per_token=2, bias=False)
    return Config(**{**sizes, "mlp_class_name": "LLaMAMoE", "norm_class_name": "RMSNorm", **fields})


def moe_pair(config: Config, dtype: torch.dtype = torch.float32, backend: str | None = None) -> tuple[MoE, LLaMAMoE]:
    """Return our layer and LitGPT's with the same random values in every parameter and buffer, biases too."""
    torch.manual_seed(0)
    ours, stock = MoE(config, backend), LLaMAMoE(config)
    values = {key: torch.randn(value.shape) / value.shape[-1] ** 0.5 for key, value in stock.state_dict().items()}
    ours.load_state_dict(values)
    stock.load_state_dict(values)
    return ours.to(dtype), stock.to(dtype)


def layer_gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient under LitGPT's name: the state dict of a copy with gradients as its values."""
    holder = copy.deepcopy(layer)
    for parameter, source in zip(holder.parameters(), layer.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    state = holder.state_dict()
    return {name: state[name] for name in state if "e_score_correction_bias" not in name}


def run_layer(
    layer: nn.Module, x: Tensor, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return output, input gradient and parameter gradients for a fixed random gradient of the output."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad, layer_gradients(layer)
