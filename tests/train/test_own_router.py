"""A router of the user's own, named by ``moe.router``: training, resuming and every script that reads its checkpoints.

No checkpoint can make a script import code: each needs the class path from the user again.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT

from custom_moe import use_custom_moe
from litmoe import checkpoints, load
from litmoe.cli import UserError
from litmoe.config import parse_run
from litmoe.evaluation import experts, loss
from litmoe.export.huggingface import export
from litmoe.finetune_config import parse_finetuning
from litmoe.inference.chat_cli import main as chat
from litmoe.inference.generate_cli import main as generate
from litmoe.train.finetune import finetune, ready_to_finetune
from litmoe.train.plan import show_plan
from litmoe.train.saving import locked
from litmoe.validation import check
from tests.custom_moe.test_extension import ExpertChoice
from tests.helpers import column

ROUTER = "tests.custom_moe.test_extension.ExpertChoice"
NAMED = rf"was trained with the router {ROUTER}\..*add (--moe\.router|--router) {ROUTER}"
CPU = {"device": "cpu", "precision": "32-true"}


@pytest.fixture
def trained(train: Callable[..., Path]) -> Path:
    """The ``out_dir`` of 8 steps with an expert-choice router."""
    return train("--moe.router", ROUTER, "--train.max_steps", "8", "--moe.bias_update_rate", "0.1")


def test_train_resume_and_use(trained: Path, train: Callable[..., Path], tmp_path: Path, capsys) -> None:
    assert column(trained, "train_loss")[-1] < column(trained, "train_loss")[0]
    assert yaml.safe_load((trained / "run_config.yaml").read_text())["moe"]["router"] == ROUTER
    assert not (trained / "final" / "config.json").exists(), "transformers has no such model"

    uninterrupted = checkpoints.load_weights(trained / "final")
    shutil.rmtree(trained / "final")  # as if the run was killed after step 4
    resume = ("--train.max_steps", "8", "--resume", "auto")
    with pytest.raises(UserError, match=NAMED):
        train(*resume)
    train(*resume, "--moe.router", ROUTER, "--moe.bias_update_rate", "0.1")
    resumed = checkpoints.load_weights(trained / "final")
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)

    folder = trained / "final"
    for use in (
        lambda: load(folder, device="cpu"),
        lambda: loss.evaluate(folder, **CPU),
        lambda: generate(folder, device="cpu"),
        lambda: chat(folder, device="cpu"),
        lambda: experts.evaluate(folder, router="tests.custom_moe.test_extension.Other", **CPU),
    ):
        with pytest.raises(UserError, match=NAMED):
            use()
    model = load(folder, device="cpu", router=ROUTER)
    with use_custom_moe(router=ExpertChoice):
        by_hand = GPT(model.config)
    by_hand.load_state_dict(resumed)
    ids = torch.randint(0, 384, (2, 16))
    torch.testing.assert_close(model.gpt(ids), by_hand(ids))
    text = model.generate("Once", max_new_tokens=5, temperature=0.0, num_samples=3)
    assert all(sample.startswith("Once") for sample in text)
    evaluated = loss.evaluate(folder, max_iters=3, batch_size=2, router=ROUTER, **CPU)
    assert evaluated.loss == pytest.approx(column(trained, "val_loss")[-1], rel=0.05), "on other windows"
    statistics = experts.evaluate(folder, router=ROUTER, **CPU)
    assert all(layer.load == pytest.approx([1] * 4, abs=0.05) for layer in statistics.layers), "each takes as many"
    assert all(token.share <= 1 for layer in statistics.layers for tokens in layer.tokens for token in tokens)
    capsys.readouterr()
    generate(folder, prompt="Once", max_new_tokens=3, num_samples=1, router=ROUTER, device="cpu")
    assert capsys.readouterr().out.startswith("Once"), "one token has fewer than one expert here"
    with pytest.raises(UserError, match=rf"no counterpart of: the router {ROUTER}"):
        export(folder, tmp_path / "exported")


def test_finetune_and_start_from_its_weights(
    trained: Path, train: Callable[..., Path], instructions: Path, tmp_path: Path
) -> None:
    folder = trained / "final"
    flags = ("--train.max_steps", "4", "--out_dir", str(tmp_path / "new"), "--initial_checkpoint_dir", str(folder))
    with pytest.raises(UserError, match=NAMED):
        train(*flags)
    train(*flags, "--moe.router", ROUTER)

    settings = {
        "data": {"class_path": "litmoe.data.InstructionData", "init_args": {"data_dir": str(instructions)}},
        "train": {"global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2, "max_seq_length": 48},
        "sample": {"prompt": None, "max_new_tokens": 4},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        "progress": False,
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def tune(*flags: str) -> Path:
        run = parse_finetuning([str(folder), "--config", str(tmp_path / "tune.yaml"), *flags])
        check(run.settings, run.optimizer)
        with locked(run.settings.out_dir):
            finetune(run, resume_from=ready_to_finetune(run.settings))
        return run.settings.out_dir / "final"

    with pytest.raises(UserError, match=NAMED):
        tune("--out_dir", str(tmp_path / "tuned"))
    for rank in ("0", "4"):
        tuned = tune("--out_dir", str(tmp_path / f"tuned-{rank}"), "--moe.router", ROUTER, "--lora_r", rank)
        assert checkpoints.recorded_router(tuned) == ROUTER


def test_resume_rejects_a_new_router(train: Callable[..., Path]) -> None:
    train("--train.max_steps", "4")
    with pytest.raises(UserError, match=r"Resume without --moe\.router, or start a new run from its weights"):
        train("--train.max_steps", "8", "--resume", "auto", "--moe.router", ROUTER)


def test_plan_counts_with_the_router(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(["--config", str(run_file), "--moe.router", ROUTER, "--plan", "rtx3060"])
    assert "rtx3060" in capsys.readouterr().out.lower().replace(" ", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--moe.router", "no_such_module.Mine"),
            r"the router no_such_module\.Mine can't be imported \(No module named",
        ),
        (("--moe.router", "Mine"), r"the router Mine can't be imported \(it is only one name\)"),
        (("--moe.router", "custom_moe.router.Missing"), r"can't be imported \(module .* has no attribute 'Missing'\)"),
        (("--moe.router", "torch.nn.Linear"), r"expected the class path of a subclass of custom_moe\.Router, such as"),
        (
            ("--moe.router", ROUTER, "--model.mlp_class_name", "GptNeoxMLP", "--model.n_expert", "0"),
            r"but this model has no experts; --moe\.router null",
        ),
    ],
)
def test_a_wrong_router_is_one_message(run_file: Path, flags: tuple[str, ...], message: str) -> None:
    run = parse_run(["--config", str(run_file), *flags])
    with pytest.raises(UserError, match=message):
        check(run.settings, run.optimizer)


def test_no_checkpoint_imports_a_router(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of somebody else may name any module on the path."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = trained / "final"
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text(encoding="utf-8"))
    settings["moe"]["router"] = "evil.Router"
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "complete.json").write_text(
        json.dumps({"step": 8, "tokens": 1, "time": "2026-01-01T00:00:00+00:00", "versions": {}, "files": {}}),
        encoding="utf-8",
    )
    for use in (lambda: load(folder), lambda: export(folder, tmp_path / "out"), lambda: loss.evaluate(folder)):
        with pytest.raises(UserError):
            use()
