"""Checkpoints, token folders and conversations that 0.1.0 wrote are read. ``tests/golden/0.1.0`` holds small ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from litmoe import load
from litmoe.data import InstructionData
from tests.helpers import column

OLD = Path(__file__).parent / "golden" / "0.1.0"
MODEL = ("--model.n_embd=16", "--model.n_layer=1", "--model.moe_intermediate_size=16")


@pytest.fixture
def old(tmp_path: Path, prepared: Path) -> Path:
    """A copy of the old folders, next to the tokenizer."""
    shutil.copytree(OLD / "data", tmp_path / "old" / "data")
    shutil.copytree(OLD / "instructions", tmp_path / "old" / "instructions")
    shutil.copytree(OLD / "run", tmp_path / "out")
    shutil.copytree(prepared / "tokenizer", tmp_path / "old" / "tokenizer")
    return tmp_path / "old"


def chunks(folder: Path) -> dict[Path, bytes]:
    """Contents of the token files. (The metadata records when texts changed, which a checkout does.)"""
    return {path: path.read_bytes() for path in folder.rglob("*.bin")}


def test_resumes_a_run(old: Path, train: Callable[..., Path]) -> None:
    tokens = chunks(old / "data")
    out = train(
        *MODEL,
        "--train.max_steps=20",
        "--train.save_interval=10",
        "--train.log_interval=1",
        "--eval.interval=10",
        "--resume=auto",
        f"--tokenizer_dir={old / 'tokenizer'}",
        f"--data.init_args.train_data_path={old / 'data' / 'train'}",
        f"--data.init_args.val_data_path={old / 'data' / 'val'}",
    )
    expected = json.loads((OLD / "losses.json").read_text(encoding="utf-8"))
    assert column(out, "train_loss") == pytest.approx(expected["train_loss"], rel=1e-3)
    assert column(out, "val_loss") == pytest.approx(expected["val_loss"], rel=1e-3)
    assert chunks(old / "data") == tokens  # nothing was prepared again


def test_loads_a_checkpoint(old: Path) -> None:
    text = load(old.parent / "out" / "step-00000010").generate("Once upon a time", max_new_tokens=4, temperature=0.0)
    assert len(str(text)) > len("Once upon a time")


def test_reads_instructions(old: Path) -> None:
    from litgpt.tokenizer import Tokenizer

    data = InstructionData(data_dir=old / "instructions")
    data.connect(Tokenizer(old / "tokenizer"), batch_size=2, max_seq_length=64)
    data.prepare_data()
    data.setup()
    assert len(data.train_dataloader()) > 0
