"""A run that was interrupted and resumed equals the uninterrupted run bit by bit."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from _pytest.mark import ParameterSet

from litmoe import checkpoints
from litmoe.cli import UserError
from tests.helpers import SIGMOID_FLAGS, assert_same_run, column, renew_checksums, save_tiny, tiny_gpt

Call = Callable[..., Path]

# 12 steps of 2 x 4 windows of 32 tokens; the epoch's 19 micro batches end within step 10.
SMALL = (
    *("--global-batch-size", "8", "--micro-batch-size", "4", "--max-seq-length", "32"),
    *("--train.save_interval", "5", "--moe.load_balancing_loss", "0.1", "--checkpoint.every_minutes", "null"),
)
EVERY_STEP = ("--train.save_interval", "1", "--checkpoint.keep_last", "null")
MUON = (
    *("--optimizer", "litmoe.train.muon.Muon", "--optimizer.init_args.lr", "1.0e-3"),
    *("--schedule.name", "wsd", "--schedule.decay_fraction", "0.5"),
)
BIASES = (*SIGMOID_FLAGS, "--moe.bias_update_rate", "0.01", "--moe.load_balancing_loss", "0.0")
CASES = {
    "two workers, Muon, wsd": ("--data.init_args.num_workers", "2", *MUON),
    "log lines between saves": ("--train.log_interval", "3"),
    # fp32 on a CPU that does not multiply bf16
    "mixed precision": ("--precision", "bf16-mixed"),
}
SLOW_CASES = {
    "one worker": ("--data.init_args.num_workers", "1"),
    "two workers": ("--data.init_args.num_workers", "2"),
    "a sample at each step": ("--eval.interval", "1", "--sample.temperature", "1.5"),
    "a short last step": ("--train.max_steps", "null", "--train.max_tokens", "2900"),
    "epochs": ("--train.max_steps", "null", "--train.epochs", "2"),
    "tied embeddings, recomputed": ("--train.tie_embeddings", "true", "--activation_checkpointing", "moe"),
}
TUNING = {
    "LoRA with dropout": ("--lora_r", "4", "--lora_mlp", "true", "--lora_dropout", "0.2"),
    "several conversations per row": ("--micro-batch-size", "4"),
    "all weights": (),
    "LoRA, Muon": ("--lora_r", "4", "--lora_dropout", "0.2", *MUON),
    "selection biases": ("--moe.bias_update_rate", "0.01"),
}


def slow(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def interrupted(full: Path, step: int, folder: Path) -> Path:
    """Copy what a run leaves that is killed after it saved ``step``. Its metrics may have later rows."""
    saved = full / f"step-{step:08d}"
    shutil.copytree(saved, folder / saved.name)
    shutil.copyfile(full / "metrics.csv", folder / "metrics.csv")
    return folder


def resume(call: Call, full: Path, step: int, *flags: str) -> Path:
    folder = interrupted(full, step, full.with_name(f"{full.name}-{step}"))
    return call(*flags, "--out_dir", str(folder), "--resume", "auto")


def test_resume_equals_uninterrupted_run(train: Call, tmp_path: Path) -> None:
    """After the first step, at an evaluation and between two, before the step in which the epoch ends, and after it.

    Every step of two epochs is a slow test below.
    """
    full = train(*SMALL, *EVERY_STEP, "--out_dir", str(tmp_path / "full"))
    epochs = column(full, "epoch")
    assert len(epochs) == 12 and epochs[0] == 0 and epochs[-1] == 1
    for step in (1, 4, 6, 9, 10):
        assert_same_run(resume(train, full, step, *SMALL, "--train.save_interval", "100"), full)


def resumed_twice(call: Call, tmp_path: Path, *flags: str, stops: tuple[int, int] = (5, 10)) -> None:
    """Resume from a step of the full run, and from a later step of the resumed run."""
    flags += ("--checkpoint.keep_last", "null")
    full = call(*flags, "--out_dir", str(tmp_path / "full"))
    once = resume(call, full, stops[0], *flags)
    assert_same_run(once, full)
    assert_same_run(resume(call, once, stops[1], *flags), full)


@pytest.mark.parametrize("case", [*CASES, *slow(SLOW_CASES)])
def test_resume_twice(train: Call, tmp_path: Path, case: str) -> None:
    """In the first epoch and in the second."""
    resumed_twice(train, tmp_path, *SMALL, *(CASES | SLOW_CASES)[case])


@pytest.fixture
def tune_case(
    tune: Call, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, request: pytest.FixtureRequest
) -> Call:
    """``tune`` as one of ``TUNING``."""
    flags = TUNING[request.param]
    if request.param == "several conversations per row":
        roomy = tiny_gpt(moe_fields | {"block_size": 144})
        flags += ("--checkpoint_dir", str(save_tiny(tmp_path / "other", roomy, tokenizer_dir)))
    if request.param == "selection biases":
        sigmoid = {"n_expert_groups": 2, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "norm_topk_prob": True}
        gpt = tiny_gpt(moe_fields | {"block_size": 48} | sigmoid)
        flags += ("--checkpoint_dir", str(save_tiny(tmp_path / "other", gpt, tokenizer_dir)))
    return lambda *more: tune(*flags, *more)


@pytest.mark.parametrize("tune_case", [*list(TUNING)[:2], *slow(list(TUNING)[2:])], indirect=True)
def test_resume_finetuning_twice(tune_case: Call, tmp_path: Path) -> None:
    resumed_twice(tune_case, tmp_path, "--train.save_interval", "3", stops=(3, 6))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_resume_with_deterministic_algorithms(train: Call, tmp_path: Path) -> None:
    resumed_twice(train, tmp_path, *SMALL, *BIASES)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1", "2"])
@pytest.mark.parametrize("flags", [(), BIASES, MUON, (*MUON, *BIASES)], ids=["plain", "biases", "Muon", "Muon, biases"])
def test_resume_at_every_step_of_two_epochs(train: Call, tmp_path: Path, workers: str, flags: tuple[str, ...]) -> None:
    flags = (*SMALL, *flags, "--data.init_args.num_workers", workers, "--train.log_interval", "4")
    flags += ("--eval.interval", "3", "--train.max_steps", "null", "--train.epochs", "2")
    full = train(*flags, *EVERY_STEP, "--out_dir", str(tmp_path / "full"))
    for step in range(1, checkpoints.read_metadata(full / "final").step):
        assert_same_run(resume(train, full, step, *flags), full)


@pytest.mark.slow
@pytest.mark.parametrize("tune_case", TUNING, indirect=True)
def test_resume_finetuning_at_every_step(tune_case: Call, tmp_path: Path) -> None:
    flags = ("--train.max_steps", "null", "--train.epochs", "2")
    full = tune_case(*flags, *EVERY_STEP, "--out_dir", str(tmp_path / "full"))
    for step in range(1, checkpoints.read_metadata(full / "final").step):
        assert_same_run(resume(tune_case, full, step, *flags), full)


# --- not to the bit ---


@pytest.mark.parametrize("micro_batch", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_resume_with_other_micro_batch_size(train: Call, tmp_path: Path, micro_batch: int) -> None:
    """The same steps train on the same windows, so the numbers are equal except for rounding. Then back again."""
    flags = (*SMALL, "--train.max_steps", "6", "--train.save_interval", "2", "--eval.interval", "100")
    flags += ("--train.log_interval", "3")
    full = train(*flags, "--out_dir", str(tmp_path / "full"))
    other = resume(train, full, 2, *flags, "--micro-batch-size", str(micro_batch))
    for out in (other, resume(train, other, 4, *flags)):
        for name in ("step", "learning_rate", "iter_tokens", "total_tokens", "epoch"):
            assert column(out, name) == column(full, name)
        for name in ("train_loss", "grad_norm", "load_balancing_loss", "expert_load_max/layer_1"):
            assert column(out, name) == pytest.approx(column(full, name), rel=1e-4)


def test_message_about_other_micro_batch_size(train: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows that did not fill a batch of the old size may be used, and the last step may differ."""
    # 75 windows of 76
    flags = (*SMALL, "--train.max_steps", "null", "--train.max_tokens", "2400", "--eval.final_validation", "false")
    full = train(*flags, "--out_dir", str(tmp_path / "full"))
    assert column(full, "total_tokens")[-1] == 72 * 32
    for micro_batch, differs, steps, tokens in (
        (1, "the run ends at step 10, 2,400 tokens instead of step 9, 2,304 tokens", 10, 2400),
        (8, "4 of an epoch's 76 sequences fill no micro batch and are dropped (0 before)", 9, 2304),
    ):
        shutil.rmtree(tmp_path / "full-5", ignore_errors=True)
        capsys.readouterr()
        out = resume(train, full, 5, *flags, "--micro-batch-size", str(micro_batch))
        said = re.search(rf"micro_batch_size was 4 and is now {micro_batch}: .*", capsys.readouterr().out)
        assert said is not None and differs in said[0]
        assert "training continues on the same tokens; sums differ in their last digits by their order" in said[0]
        assert "validation reads other windows" in said[0]
        assert (column(out, "step")[-1], column(out, "total_tokens")[-1]) == (steps, tokens)


def test_resume_rejects_other_batches(train: Call) -> None:
    out = train("--train.max_steps", "1")
    for flag, value, message in (
        ("--global-batch-size", "8", "global_batch_size was 4 and is now 8"),
        ("--max-seq-length", "8", "max_seq_length was 16 and is now 8"),
        ("--data.init_args.seed", "1", "data_seed was 42 and is now 1"),
    ):
        with pytest.raises(UserError, match=rf"{message}\. Resume with the old values, or start a new run"):
            train("--resume", str(out / "final"), flag, value)


def test_resume_rejects_another_optimizer(train: Call) -> None:
    out = train("--train.max_steps", "1")
    with pytest.raises(
        UserError, match=r"was trained with torch\.optim\.AdamW, and torch\.optim\.SGD can't use its state"
    ):
        train("--resume", str(out / "final"), "--optimizer", "torch.optim.SGD", "--optimizer.init_args.lr", "0.1")


def test_resume_rejects_imported_checkpoints(train: Call, tmp_path: Path) -> None:
    """An imported checkpoint has other hyperparameters, which raised a KeyError."""
    out = train("--train.max_steps", "1")
    settings = out / "final" / "hyperparameters.yaml"
    settings.write_text("imported_from: a folder\n", encoding="utf-8")
    renew_checksums(out / "final")
    with pytest.raises(UserError, match=r"has no training state.*--initial_checkpoint_dir"):
        train("--resume", str(out / "final"))


def test_resume_auto_overwrites_nothing(train: Call) -> None:
    """A checkpoint that can't be resumed used to be replaced."""
    out = train("--train.max_steps", "1")
    (out / "final" / "training_state.pth").unlink()
    renew_checksums(out / "final")
    with pytest.raises(UserError, match="holds final, which can't be resumed"):
        train("--resume", "auto")


def test_resume_after_a_short_last_step(train: Call) -> None:
    """With more tokens the resumed run ended one micro batch early, because the short step counted as complete."""
    flags = ("--train.max_steps", "null", "--train.max_tokens")
    out = train(*flags, "240")  # 7 micro batches of 32 tokens, two a step
    assert column(out, "iter_tokens") == [64, 64, 64, 32]
    train(*flags, "512", "--resume", "auto")
    assert column(out, "iter_tokens") == [64, 64, 64, 32, 64, 64, 64, 64, 32]
    assert column(out, "total_tokens")[-1] == 512


def test_resume_state_of_another_version(train: Call, tmp_path: Path) -> None:
    """The state has an unknown counter, and lacks a value that this version compares."""
    full = train(*SMALL, "--out_dir", str(tmp_path / "full"))
    other = interrupted(full, 10, tmp_path / "other")
    folder = other / "step-00000010"
    state = checkpoints.load_training_state(folder)
    state["progress"]["samples"] = 20
    del state["layout"]["data_seed"]
    torch.save(state, folder / "training_state.pth")
    renew_checksums(folder)
    assert_same_run(train(*SMALL, "--out_dir", str(other), "--resume", "auto"), full)


def test_resume_finetuning_of_an_older_version(tune: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint lacks a setting that was added later, and fingerprints."""
    out = tune("--lora_r", "2", "--train.max_steps", "1")
    state = checkpoints.load_training_state(out / "final")
    del state["made_from"]
    torch.save(state, out / "final" / "training_state.pth")
    settings = checkpoints.load_hyperparameters(out / "final")
    del settings["lora_head"], settings["data"]["init_args"]["prompt_style"]
    (out / "final" / checkpoints.HYPERPARAMETERS).write_text(yaml.safe_dump(settings), encoding="utf-8")
    renew_checksums(out / "final")
    tune("--lora_r", "2", "--train.max_steps", "2", "--resume", "auto")
    said = capsys.readouterr().out
    assert "has no record of the conversations" in said and "Resuming from" in said
    assert column(out, "step")[-1] == 2


# --- moved data ---


@pytest.fixture
def moving(tmp_path: Path, prepared: Path, train: Call) -> tuple[Path, Call]:
    """A folder that contains corpora/stories with its tokenizer, and a function that trains on it."""
    place = tmp_path / "place"
    data_dir = shutil.copytree(prepared / "data", place / "corpora" / "stories")
    shutil.copytree(prepared / "tokenizer", data_dir / "tokenizer")
    paths = [f"--data.init_args.{split}_data_path={data_dir / split}" for split in ("train", "val")]
    flags = (*paths, f"--tokenizer_dir={data_dir / 'tokenizer'}", "--train.max_steps", "4")
    return place, lambda *more: train(*flags, *more)


def test_moved_data_is_found(
    moving: tuple[Path, Call], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with other tokens next to it is not used."""
    place, train = moving
    out = train("--train.save_interval", "2")
    before = (out / "final" / "lit_model.pth").read_bytes()
    data_dir = place / "corpora" / "stories"
    other = shutil.copytree(data_dir, place / "corpora" / "other")
    manifest = json.loads((other / "tokens" / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"]["train"]["text"][0]["sha256"] = "0" * 64
    (other / "tokens" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (place / "work").mkdir()
    monkeypatch.chdir(place / "work")
    for there in ("corpora/renamed", "stories", "elsewhere/stories", "work/data/any"):
        (place / there).parent.mkdir(exist_ok=True)
        shutil.move(data_dir, place / there)
        data_dir = place / there
        train("--resume", str(out / "step-00000002"), "--overwrite")
        found = Path("data", "any") if there == "work/data/any" else data_dir
        assert f"is in {found} now and is used from there" in capsys.readouterr().out
        assert (out / "final" / "lit_model.pth").read_bytes() == before
        settings = checkpoints.load_hyperparameters(out / "final")
        assert Path(settings["tokenizer_dir"]) == found / "tokenizer"
        assert Path(settings["data"]["init_args"]["val_data_path"]) == found / "val"


def test_missing_data_is_reported(moving: tuple[Path, Call]) -> None:
    place, train = moving
    out = train("--train.save_interval", "2")
    for path in (place / "corpora" / "stories" / "tokens" / "train").glob("*.bin"):
        os.truncate(path, 8)  # an incomplete copy must not be used
    shutil.move(place / "corpora" / "stories", place / "corpora" / "renamed")
    with pytest.raises(UserError, match=r"which does not exist.* Give their place: --data\.init_args\.train_data"):
        train("--resume", str(out / "step-00000002"), "--overwrite")


def test_moved_conversations_are_found(
    tune: Call, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = shutil.copytree(instructions, tmp_path / "place" / "data")
    flags = ("--data_dir", str(data_dir), "--train.max_steps", "4", "--train.save_interval", "2")
    out = tune(*flags)
    before = (out / "final" / "lit_model.pth").read_bytes()
    shutil.move(data_dir, tmp_path / "place" / "moved")
    tune(*flags, "--resume", str(out / "step-00000002"), "--overwrite")
    assert f"is in {tmp_path / 'place' / 'moved'} now" in capsys.readouterr().out
    assert (out / "final" / "lit_model.pth").read_bytes() == before
