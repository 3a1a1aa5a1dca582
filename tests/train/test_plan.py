"""``run_train.py --plan`` from the command line."""

import os
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

import run_train
from litmoe.cli import exit_with_message
from litmoe.config import parse_run
from litmoe.train.memory import training_memory
from litmoe.train.plan import show_plan
from tests.helpers import column
from tests.train.test_memory import ADA


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, moe_fields: dict):
    """Return ``shown("--flag")``: the output of ``run_train.py`` without data. It must not write any file."""
    settings = {
        # Simulating a step takes most of the time, and grows with layers and experts.
        "model": {**moe_fields, "n_layer": 1, "n_expert": 2},
        "out_dir": str(tmp_path / "out"),
        "tokenizer_dir": str(tmp_path / "nowhere"),
        "data": {
            "class_path": "litmoe.data.TokenizedText",
            "init_args": {"train_data_path": str(tmp_path / "train"), "val_data_path": str(tmp_path / "val")},
        },
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_tokens": 5120, "tie_embeddings": False},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run_train.py", "--config", str(run_file), *flags])
        with patch.dict(os.environ):  # a plan for another GPU hides those of this machine
            exit_with_message(run_train.main)
        assert list(tmp_path.iterdir()) == [run_file]
        return capsys.readouterr().out

    return call


def test_run_that_fits(shown) -> None:
    text = shown("--plan", "RTX 3060")
    assert "10 steps of 512 tokens, 5,120 tokens in all" in text
    assert "On rtx3060 (12 GiB) in bf16-mixed" in text
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "peak", "available"):
        assert f"\n  {part} " in text
    assert "It fits. Estimated: " in text
    assert "22% of 25.5 TFLOP/s" in text


def test_more_devices_than_this_machine_has(shown) -> None:
    assert "tokens/s on 8 GPUs" in shown("--plan", "h100", "--devices", "8", "--global-batch-size", "32")


def test_plan_for_this_machine(shown) -> None:
    """The flag may be the last one, or before another one."""
    assert "tokens/s" in shown("--plan")
    assert "9 steps" in shown("--plan", "--train.max_steps", "9")


def test_time_includes_the_update_of_muon(shown) -> None:
    def plan(*flags: str) -> tuple[float, float]:
        """Return Muon's share of a step, and tokens/s."""
        text = shown("--plan", "h100", *muon, *flags)
        share = re.search(r"Muon's update adds [\d.]+ MFLOP to each step.*, (\d+)% of the step's operations", text)
        rate = re.search(r"Estimated: ([\d,]+) tokens/s", text)
        assert share and rate and "backward, the optimizer's update;" in text
        return int(share[1]) / 100, float(rate[1].replace(",", ""))

    muon = ("--optimizer=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.02")
    text = shown("--plan", "h100")
    assert "Muon" not in text
    without = float(re.search(r"Estimated: ([\d,]+)", text)[1].replace(",", ""))
    share, rate = plan()
    assert rate == pytest.approx(without * (1 - share), rel=0.01)
    large_batch, faster = plan("--global-batch-size", "64")
    assert large_batch < share and faster > rate
    # The devices divide the update among themselves.
    two_devices, faster = plan("--devices", "2")
    assert two_devices == share and faster == pytest.approx(2 * rate, rel=0.01)
    assert "no estimate of the time for this optimizer" in shown("--plan", "t4", *muon)


def test_estimate_lists_what_it_counts(shown) -> None:
    text = shown("--plan", "h100", "--activation_checkpointing", "block")
    assert "Counted: forward, backward, recomputed activations;" in text
    assert "not counted: validation, HellaSwag, samples, saving, compiling" in text


def test_length_in_epochs(shown) -> None:
    assert "3 epochs of steps of 512 tokens." in shown("--plan=t4", "--train.max_tokens=null", "--train.epochs=3")


def test_what_a_time_budget_buys(trained: Path, capsys) -> None:
    """With the result of an earlier run of the same model on the same tokens."""
    flags = ["--config", str(trained / "run_config.yaml"), "--out_dir", str(trained.with_name("next"))]
    show_plan([*flags, "--plan", "rtx3060", "--precision", "bf16-mixed", "--minutes", "90"])
    said = capsys.readouterr().out
    assert "\nSteps of 64 tokens for 90 minutes.\n" in said
    assert re.search(r"tokens/s, [\d,.]+ M tokens \([\d,.]+ per active parameter\) in 90 minutes\.", said)
    loss = column(trained, "val_loss")[-1]
    assert f"Earlier: {trained}, validation loss {loss:.4f} after 768 tokens" in said
    show_plan([*flags, "--plan", "rtx3060", "--model.n_layer", "1"])
    assert "Earlier" not in capsys.readouterr().out


def test_auto_takes_what_fits(shown) -> None:
    """More on a larger GPU, and never more than a step has."""
    flags = ["--micro-batch-size", "auto", "--train.global_batch_size", "192", "--model.block_size", "512"]
    flags += ["--train.max_tokens", "1000000"]
    wide = ["--model.n_embd", "1024", "--model.moe_intermediate_size", "4096", "--plan"]
    sizes = []
    for gpu in ("rtx3050-laptop", "rtx3060", "h100"):
        text = shown(*flags, *wide, gpu)
        assert "It fits." in text
        sizes.append(int(re.search(r"kept for the backward of (\d+) x 512 tokens", text)[1]))
    assert sizes[0] < sizes[1] < sizes[2] == 192 and all(192 % size == 0 for size in sizes)
    # Not even one sequence: then the other changes are listed.
    assert "--activation_checkpointing moe" in shown(*flags, *wide, "rtx3050-laptop", "--model.n_layer", "8")


def test_changes_to_fit(shown) -> None:
    """The last command fits, and has only the changes that are needed."""
    large = ("--model.n_embd=1024", "--model.padded_vocab_size=50257", "--model.vocab_size=50257")
    text = shown(*large, "--model.moe_intermediate_size=16384", "--plan", "rtx3050-laptop")
    tried, result = text.split("The changes needed to fit, with ")
    assert "It does not fit." in tried
    changes = re.findall(r"GiB   (--.*)", tried)
    assert changes[:2] == ["--micro_batch_size 2", "--micro_batch_size 1"]
    assert "--activation_checkpointing block" in changes
    command = next(line for line in result.splitlines() if "run_train.py" in line)
    run = parse_run(command.split("run_train.py ")[1].split())
    peak = training_memory(run, run.settings.precision or "bf16-mixed", ADA).peak
    assert peak < 2.8 * 2**30
    assert result.startswith(f"{peak / 2**30:.2f} GiB")
    assert "Estimated" in result


@pytest.mark.slow
def test_8_bit_adam_replaces_muon(shown) -> None:
    """It gets the learning rate of Muon, which is Adam's."""
    large = ("--model.n_embd=1024", "--model.padded_vocab_size=50257", "--model.vocab_size=50257")
    muon = ("--optimizer=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.003", "--micro-batch-size=3")
    text = shown(*large, *muon, "--global-batch-size=6", "--model.moe_intermediate_size=16384", "--plan=rtx3050-laptop")
    command = next(line for line in text.splitlines() if "uv run" in line)
    run = parse_run(command.split("run_train.py ")[1].split())
    assert run.optimizer["class_path"] == "torchao.optim.AdamW8bit"
    assert run.optimizer["init_args"]["lr"] == 3.0e-3
    assert "  --micro_batch_size 1\n" in text, "a divisor of 3"


def test_changes_are_not_enough(shown) -> None:
    text = shown("--model.n_embd=32768", "--model.n_head=64", "--plan=rtx3050-laptop")
    assert "These changes are not enough" in text


def test_unknown_gpu(shown, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        shown("--plan", "rtx4061")
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no GPU 'rtx4061' is known. The nearest name is rtx406")
    assert "h200" in message


def test_plan_checks_the_settings(shown) -> None:
    with pytest.raises(SystemExit):
        shown("--plan", "--global-batch-size", "7")


def test_optimizer_that_cannot_be_planned(shown, capsys) -> None:
    with pytest.raises(SystemExit):
        shown("--plan", "rtx4060", "--optimizer", "torch.optim.LBFGS")
    assert "torch.optim.LBFGS needs can't be computed in advance" in capsys.readouterr().err


def test_command_is_quoted_for_the_shell(shown) -> None:
    flags = ("--sample.prompt", "Once upon a time", "--micro-batch-size", "4096", "--global-batch-size", "4096")
    flags = (*flags, "--train.max_tokens", "100000000")
    text = shown("--plan", "rtx3050-laptop", *flags, "--model.n_embd", "1024")
    (command,) = [line.strip() for line in text.splitlines() if line.startswith("  uv run python run_train.py")]
    assert "Once upon a time" in shlex.split(command)
