"""A prepared tiny corpus, tiny conversations, and real training in this process on them."""

import csv
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jsonargparse._optionals
import pytest
import yaml

from litmoe.config import parse_run
from litmoe.data.instructions import InstructArgs, prepare_instructions
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.finetune_config import parse_finetuning
from litmoe.train.finetune import finetune, ready_to_finetune
from litmoe.train.preflight import ready
from litmoe.train.pretrain import pretrain
from litmoe.validation import check
from tests.tiny_checkpoint import save_tiny, tiny_gpt

# Half of what parsing takes is reading the same classes' sources anew for their help texts.
jsonargparse._optionals.parse_docstring = cache(jsonargparse._optionals.parse_docstring)

SIGMOID_ROUTER = (
    *("--model.n_expert_groups", "2", "--model.n_topk_groups", "2", "--model.n_topk_scores_per_group", "2"),
    *("--model.norm_topk_prob", "true"),
)
"""Flags that give the run file's model a sigmoid router with a selection bias"""


def rows(out_dir: Path) -> list[dict[str, str]]:
    """Of its metrics file."""
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir: Path, name: str) -> list[float]:
    """The numbers of a column that stand there."""
    return [float(row[name]) for row in rows(out_dir) if row[name]]


def training_steps(out_dir: Path) -> list[int]:
    """Steps that have a training row; evaluations are rows of their own."""
    return [int(row["step"]) for row in rows(out_dir) if row["train_loss"]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A folder with data/ (tokens of the tiny stories) and tokenizer/; don't write there."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    for split, texts in (("train", stories[:120]), ("val", stories[120:])):
        (folder / "data" / split).mkdir(parents=True)
        text = "\n<|endoftext|>\n".join(texts)
        (folder / "data" / split / "stories.txt").write_text(text, encoding="utf-8", newline="\n")
    prepare(PrepareArgs(data_dir=folder / "data", tokenizer_dir=folder / "tokenizer", num_workers=0))
    return folder


@pytest.fixture
def run_file(tmp_path: Path, prepared: Path, moe_fields: dict) -> Path:
    """A run file of a tiny model: 12 steps of 2 x 2 sequences of 16 tokens into ``tmp_path/out``."""
    settings = {
        "model": moe_fields,
        "out_dir": str(tmp_path / "out"),
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
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def train(run_file: Path) -> Callable[..., Path]:
    """``train("--flag", "value")`` does what ``run_train.py`` does and returns the ``out_dir``."""

    def call(*flags: str) -> Path:
        run = parse_run(["--config", str(run_file), *flags])
        check(run.settings, run.optimizer)
        run, resume_from = ready(run)
        pretrain(run, resume_from=resume_from)
        return run.settings.out_dir

    return call


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions, of long and short answers, prepared; don't write there."""
    folder = tmp_path_factory.mktemp("instructions")
    rows = [
        {"instruction": f"Where is {name} {day}?", "output": f"{name} went to the {place}." * times}
        for name in ("Mia", "Tom", "Lily", "Ben")
        for day in ("now", "today", "at noon")
        for place, times in (("sea", 1), ("wood", 3), ("hill", 1), ("sea again", 2), ("wood again", 1))
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_instructions(InstructArgs(str(folder / "rows.json"), folder / "data", val_fraction=0.2))
    return folder / "data"


@pytest.fixture
def base(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    return save_tiny(tmp_path / "base", tiny_gpt({**moe_fields, "block_size": 48}), tokenizer_dir)


@pytest.fixture
def tune(tmp_path: Path, base: Path, instructions: Path) -> Callable[..., Path]:
    """``tune("--flag", "value")`` does what ``finetune.py`` does and returns the ``out_dir``."""
    settings = {
        "data": {"class_path": "litmoe.data.InstructionData", "init_args": {"data_dir": str(instructions)}},
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
    run_file = tmp_path / "finetune.yaml"
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def call(*flags: str) -> Path:
        run = parse_finetuning([str(base), "--config", str(run_file), "--out_dir", str(tmp_path / "out"), *flags])
        check(run.settings, run.optimizer)
        finetune(run, resume_from=ready_to_finetune(run.settings))
        return run.settings.out_dir

    return call
