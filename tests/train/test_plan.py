"""``run_train.py --plan`` as a user sees it."""

import os
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

import run_train
from litmoe.cli import exit_with_message
from litmoe.config import parse_run
from litmoe.train.gpus import named_card
from litmoe.train.memory import training_memory
from litmoe.train.plan import describe_needs
from tests.train.test_memory import ADA, KINDS, parsed


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, moe_fields: dict):
    """``shown("--flag")``: what ``run_train.py`` prints for a run without data, which must leave nothing behind."""
    settings = {
        "model": moe_fields,
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
        with patch.dict(os.environ):  # a plan for another card hides this machine's from its process
            exit_with_message(run_train.main)
        assert list(tmp_path.iterdir()) == [run_file]
        return capsys.readouterr().out

    return call


def test_a_run_that_fits(shown) -> None:
    text = shown("--plan", "RTX 3060")
    assert "10 steps of 512 tokens, 5,120 tokens in all" in text
    assert "On rtx3060 (12 GiB) in bf16-mixed" in text
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "peak", "room"):
        assert f"\n  {part} " in text
    assert "It fits. Estimated: " in text
    assert "22% of 25.5 TFLOP/s" in text


def test_devices_of_another_machine(shown) -> None:
    """A machine with fewer GPUs refused them."""
    assert "tokens/s on 8 cards" in shown("--plan", "h100", "--devices", "8", "--global-batch-size", "32")


def test_this_machine(shown) -> None:
    """The flag may stand last, or before another."""
    assert "tokens/s" in shown("--plan")
    assert "9 steps" in shown("--plan", "--train.max_steps", "9")


def test_muons_update_is_part_of_the_time(shown) -> None:
    def plan(*flags: str) -> tuple[float, float]:
        """Muon's share of a step, and tokens/s."""
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
    # Each device does the whole update, so that devices help its part of the time less.
    assert plan("--devices", "2")[0] > share
    assert "no estimate of the time for this optimizer" in shown("--plan", "t4", *muon)


def test_the_estimate_says_what_it_counts(shown) -> None:
    text = shown("--plan", "h100", "--activation_checkpointing", "block")
    assert "Counted: forward, backward, recomputed activations;" in text
    assert "not counted: validation, HellaSwag, samples, saving, compiling" in text


def test_a_run_whose_length_the_data_decide(shown) -> None:
    assert "3 epochs in steps of 512 tokens; how many steps, the data decide." in shown(
        "--plan=t4", "--train.max_tokens=null", "--train.epochs=3"
    )


def test_it_says_what_to_change(shown, tmp_path: Path) -> None:
    """The command at the end is one that fits; what it fits without is left away again."""
    large = ("--model.n_embd=1024", "--model.n_layer=2", "--model.padded_vocab_size=50257", "--model.vocab_size=50257")
    text = shown(*large, "--model.moe_intermediate_size=4096", "--plan", "rtx3050-laptop")
    before, after = text.split("The least of it that fits, with ")
    assert "It does not fit." in before
    changes = [line.split("GiB   ")[1] for line in before.split("\n\n")[3].splitlines() if "GiB   --" in line]
    assert changes[0] == "--micro_batch_size 1"
    assert "--activation_checkpointing block" in changes
    command = next(line for line in after.splitlines() if "run_train.py" in line)
    run = parse_run(command.split("run_train.py ")[1].split())
    peak = training_memory(run, run.settings.precision or "bf16-mixed", ADA).peak
    assert peak < 2.8 * 2**30
    assert after.startswith(f"{peak / 2**30:.2f} GiB")
    assert "Estimated" in after


def test_a_run_by_muon_becomes_one_by_adam_at_the_rate_of_its_adam(shown) -> None:
    large = ("--model.n_embd=1024", "--model.n_layer=1", "--model.padded_vocab_size=50257", "--model.vocab_size=50257")
    muon = ("--optimizer=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.02", "--micro-batch-size=3")
    text = shown(*large, *muon, "--global-batch-size=6", "--model.moe_intermediate_size=8192", "--plan=rtx3050-laptop")
    command = next(line for line in text.splitlines() if "uv run" in line)
    run = parse_run(command.split("run_train.py ")[1].split())
    assert run.optimizer["class_path"] == "torchao.optim.AdamW8bit"
    assert run.optimizer["init_args"]["lr"] == 2.0e-3
    assert "  --micro_batch_size 1\n" in text, "3 has no half, but a divisor"


def test_nothing_is_enough(shown) -> None:
    text = shown("--model.n_embd=32768", "--model.n_head=64", "--model.n_layer=1", "--plan=rtx3050-laptop")
    assert "Nothing of this is enough" in text


def test_an_unknown_card(shown, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        shown("--plan", "rtx4061")
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no card 'rtx4061' is known; the nearest is rtx406")
    assert "h200" in message


def test_settings_are_checked_first(shown) -> None:
    with pytest.raises(SystemExit):
        shown("--plan", "--global-batch-size", "7")


def test_the_lines_at_a_runs_start() -> None:
    """They leave the random numbers of the run as they are."""
    run = parsed(*KINDS["moe"])
    before = torch.get_rng_state()
    (line,) = describe_needs(run, "bf16-mixed", ADA)
    assert line.startswith("Memory by plan, without torch.compile: ")
    assert torch.equal(torch.get_rng_state(), before)
    odd = parsed(*KINDS["moe"], "--optimizer=torch.optim.LBFGS")  # wants a closure
    (line,) = describe_needs(odd, "bf16-mixed", ADA)
    assert "can't be worked out beforehand" in line


def test_a_start_on_a_card_says_how_long_and_whether_it_fits() -> None:
    run, card = parsed(*KINDS["moe"]), named_card("rtx4060")
    assert card is not None
    _, duration = describe_needs(run, "bf16-mixed", ADA, card)
    assert duration.startswith("Estimated: ")
    _, too_much, _ = describe_needs(run, "bf16-mixed", ADA, card._replace(taken=card.memory))
    assert "That is more than the 0.0 MiB which are left on this card: --plan says what to change" in too_much


def test_an_optimizer_without_a_plan_is_one_message(shown, capsys) -> None:
    """A traceback."""
    with pytest.raises(SystemExit):
        shown("--plan", "rtx4060", "--optimizer", "torch.optim.LBFGS")
    assert "torch.optim.LBFGS needs can't be worked out beforehand" in capsys.readouterr().err


def test_the_command_that_fits_can_be_pasted(shown) -> None:
    """As JSON or a sentence in a flag could not."""
    flags = ("--sample.prompt", "Once upon a time", "--micro-batch-size", "4096", "--global-batch-size", "4096")
    flags = (*flags, "--train.max_tokens", "100000000")
    text = shown("--plan", "rtx3050-laptop", *flags, "--model.n_embd", "1024")
    (command,) = [line.strip() for line in text.splitlines() if line.startswith("  uv run python run_train.py")]
    assert "Once upon a time" in shlex.split(command)
