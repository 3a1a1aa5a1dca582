"""A prepared tiny corpus, and real training in this process on it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from recipe.data.prepare import PrepareArgs, prepare
from recipe.settings import check, parse_run
from recipe.training.pretrain import pretrain
from recipe.training.ready import ready

SIGMOID_ROUTER = (
    *("--model.n_expert_groups", "2", "--model.n_topk_groups", "2", "--model.n_topk_scores_per_group", "2"),
    *("--model.norm_topk_prob", "true"),
)
"""Flags that give the run file's model a sigmoid router with a selection bias"""


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
            "class_path": "recipe.data.TokenizedText",
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
