import csv
import os
import shutil
import signal
import sys
import threading

import lightning as L
import pytest
import torch
from litgpt import GPT, Config
from torch import nn

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.train import loop
from litmoe.train.model import Batch
from litmoe.train.nonfinite import first_not_finite, weights_not_finite
from litmoe.train.saving import StopSignals, copied
from tests.training_fixtures import rows


def steps_in(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir() and path.name.startswith(("step", "final")))


def on_step(monkeypatch, step, action):
    """Calls ``action`` in the middle of update ``step`` (counted from 1), before it changes weights."""
    real = loop.loss_shares
    taken = iter(range(1, 10_000))

    def with_action(fabric, batches):
        if next(taken) == step:
            action()
        return real(fabric, batches)

    monkeypatch.setattr(loop, "loss_shares", with_action)


# --------------------------------------------------------------------------------------------------------------- copy


def test_a_copy_is_not_changed_by_what_comes_after():
    from torchao.optim.subclass_8bit import OptimState8bit

    stacked = torch.arange(24.0).view(4, 6)
    eight_bits = OptimState8bit.zeros((4096,))
    content = {"rows": list(stacked.unbind()), "eight bits": eight_bits, "step": 3, "empty": torch.zeros(0)}
    copy = copied(content)
    stacked.zero_()
    eight_bits.codes.fill_(7)
    assert torch.equal(torch.stack(copy["rows"]), torch.arange(24.0).view(4, 6))
    assert type(copy["eight bits"]) is OptimState8bit
    assert not copy["eight bits"].codes.any()
    assert (copy["step"], copy["empty"].shape) == (3, (0,))


def test_tied_embeddings_are_one_matrix_in_the_copy():
    matrix = torch.ones(3, 2)
    copy = copied({"a": matrix, "b": matrix.detach(), "c": matrix.clone()})
    assert copy["a"].data_ptr() == copy["b"].data_ptr() != copy["c"].data_ptr()


# --------------------------------------------------------------------------------------------------- when and how many


def test_a_save_is_due_by_the_clock(train):
    out = train("--train.save_interval", "null", "--checkpoint.every_minutes", "1e-9", "--checkpoint.keep_last", "null")
    assert len(steps_in(out)) > 1, "one at least is written before the run ends"
    assert "final" in steps_in(out)
    out = train("--train.save_interval", "null", "--checkpoint.every_minutes", "null", "--overwrite")
    assert steps_in(out) == ["final"]


def test_the_newest_stay_and_the_ones_asked_for(train, tmp_path):
    flags = ("--train.save_interval", "2", "--checkpoint.keep_every", "6")
    out = train(*flags, "--checkpoint.keep_last", "2")
    assert steps_in(out) == ["final", "step-00000006", "step-00000010"]
    out = train("--train.save_interval", "1", "--checkpoint.keep_last", "5", "--out_dir", str(tmp_path / "five"))
    assert steps_in(out) == ["final", *(f"step-{step:08d}" for step in range(8, 12))]
    out = train(*flags, "--checkpoint.keep_last", "null", "--out_dir", str(tmp_path / "all"))
    assert steps_in(out) == ["final", *(f"step-{step:08d}" for step in range(2, 12, 2))]


def test_settings_that_would_keep_too_little_are_refused(train):
    with pytest.raises(UserError, match=r"keep_last is 1; expected at least 2"):
        train("--checkpoint.keep_last", "1")
    with pytest.raises(UserError, match=r"keep_every is 6, but the run saves every 4 steps"):
        train("--checkpoint.keep_every", "6")
    with pytest.raises(UserError, match=r"every_minutes is 0\.0; expected more than 0"):
        train("--checkpoint.every_minutes", "0")


def test_what_is_written_is_what_was_copied_while_training_goes_on(train, monkeypatch, tmp_path):
    """The write of step 4 is held back until update 8: it is the same as one that nothing overtook."""
    whole = train("--out_dir", str(tmp_path / "whole"))
    go, real = threading.Event(), checkpoints.save

    def held_back(folder, **content):
        if folder.name == "step-00000004":
            assert threading.current_thread() is not threading.main_thread()
            assert go.wait(60)
        real(folder, **content)

    monkeypatch.setattr(checkpoints, "save", held_back)
    on_step(monkeypatch, 8, go.set)
    out = train("--out_dir", str(tmp_path / "out"))
    for name in ("step-00000004", "step-00000008", "final"):
        one, other = (checkpoints.read_mark(folder / name).files for folder in (whole, out))
        assert one["lit_model.pth"] == other["lit_model.pth"]
    one, other = (checkpoints.load_training_state(folder / "step-00000004") for folder in (whole, out))
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], other["optimizer"]["state"][key][name]) for name in moments)
    assert one["train_dataloader"] == other["train_dataloader"]


def test_a_checkpoint_that_cannot_be_written_ends_no_run(train, tmp_path, capsys):
    """A regular file lies where the second checkpoint is to be written, and can't be cleaned away as a folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".step-00000008.partial").write_text("in the way", encoding="utf-8")
    out = train()
    assert "cannot write the checkpoint" in (said := capsys.readouterr().out)
    assert "The run goes on without this checkpoint." in said
    assert steps_in(out) == ["final", "step-00000004"]


# --------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_stops_after_the_step(train, monkeypatch, tmp_path, capsys, name, code):
    whole = train("--out_dir", str(tmp_path / "whole"))
    before = signal.getsignal(signal.SIGINT)
    on_step(monkeypatch, 6, lambda: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == code
    assert signal.getsignal(signal.SIGINT) is before
    out = tmp_path / "out"
    assert steps_in(out) == ["step-00000004", "step-00000006"]
    assert f"--resume auto goes on from {out / 'step-00000006'}" in capsys.readouterr().out
    train("--resume", "auto")
    assert_same_run(whole, out)


def test_two_signals_at_once_are_one():
    """A terminal sends Ctrl-C to the launcher and to the processes, and the launcher passes its own on."""
    said = []
    with StopSignals(said.append) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert len(said) == 1


def test_an_error_within_the_loop_keeps_the_last_step(train, monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("a bug")

    whole = train("--out_dir", str(tmp_path / "whole"))
    on_step(monkeypatch, 7, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train()
    assert steps_in(tmp_path / "out") == ["step-00000004", "step-00000006"]
    monkeypatch.undo()
    train("--resume", "auto")
    assert_same_run(whole, tmp_path / "out")


def test_an_error_within_an_update_saves_nothing_half(train, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("within the update")

    monkeypatch.setattr(loop, "balance", fail)
    with pytest.raises(RuntimeError, match="within the update"):
        train()
    assert not list((tmp_path / "out").glob("step-*"))


def test_an_error_waits_for_the_checkpoint_that_is_being_written(train, monkeypatch, tmp_path):
    """In an update that follows the save of step 4, so that nothing newer can be saved."""
    begun, real, balance = threading.Event(), checkpoints.save, loop.balance

    def slow(folder, **content):
        begun.set()
        threading.Event().wait(0.5)
        real(folder, **content)

    def fail_after_the_save(*arguments):
        balance(*arguments)
        if begun.is_set():
            raise RuntimeError("within the update")

    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr(loop, "balance", fail_after_the_save)
    with pytest.raises(RuntimeError, match="within the update"):
        train()
    assert checkpoints.newest_undamaged(tmp_path / "out")[0] == tmp_path / "out" / "step-00000004"


@pytest.mark.parametrize("moment", ["before", "between batches"])
def test_a_stop_does_not_wait_for_an_evaluation(train, monkeypatch, tmp_path, moment):
    """Which may take minutes: it was lost with its row, or with the step, where it was killed. Now the resumed run
    begins with it."""
    whole, out = train("--out_dir", str(tmp_path / "whole")), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        if moment == "before":
            on_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        else:
            evaluate = loop.evaluate
            patch.setattr(loop, "evaluate", lambda *run: signal.raise_signal(signal.SIGTERM) or evaluate(*run))
        train("--train.save_interval", "null")
    assert steps_in(out) == ["step-00000004"]
    assert rows(out)[-1]["step"] == "3"
    train("--resume", "auto")
    assert_same_run(whole, out)


def test_a_budget_of_time_does_not_wait_for_an_evaluation(train, tmp_path):
    whole = train("--out_dir", str(tmp_path / "whole"), "--eval.interval", "1")
    out = train("--eval.interval", "1", "--train.save_interval", "null", "--train.max_time", "1.0e-6")
    assert steps_in(out) == ["step-00000001"]
    assert not (out / "metrics.csv").exists()
    train("--resume", "auto", "--eval.interval", "1")
    assert_same_run(whole, out)


def test_an_evaluation_that_fails_leaves_its_step(train, monkeypatch, tmp_path):
    """Its checkpoint is there, and a resumed run evaluates it."""

    def fail(*_):
        raise RuntimeError("in the sample")

    whole, out = train("--out_dir", str(tmp_path / "whole")), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the sample"):
        patch.setattr(loop, "write_sample", fail)
        train("--train.save_interval", "null")
    assert steps_in(out) == ["step-00000004"]
    train("--resume", "auto")
    assert_same_run(whole, out)


def test_out_of_memory_is_one_message(train, monkeypatch, tmp_path):
    """It was a traceback, and the way out stood in the README alone."""
    on_step(monkeypatch, 3, lambda: torch.empty(2**50))
    with pytest.raises(UserError, match=r"(?s)out of memory: .*--plan says what to change.*--resume auto goes on"):
        train()
    assert steps_in(tmp_path / "out") == ["step-00000002"]


def test_output_that_is_gone_ends_no_run(train, monkeypatch, tmp_path):
    """`| head`, or a `tee` that died of the same Ctrl-C: rich ended the process at its next line, nothing saved."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8", buffering=1) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        on_step(patch, 3, lambda: os.close(reading))
        out = train()
        print("and after it, too")
    assert steps_in(out) == ["final", "step-00000004", "step-00000008"]
    assert len(rows(out)) == 12


def test_a_log_interval_goes_on_where_it_was(train, tmp_path):
    flags = ("--train.log_interval", "3")
    whole = train(*flags, "--out_dir", str(tmp_path / "whole"))
    cut = shutil.copytree(whole, tmp_path / "cut")
    train(*flags, "--out_dir", str(cut), "--resume", str(cut / "step-00000004"), "--overwrite")
    assert_same_run(whole, cut)


def assert_same_run(whole, other):
    one, two = (checkpoints.read_mark(out / "final").files["lit_model.pth"] for out in (whole, other))
    assert one == two
    tables = []
    for out in (whole, other):
        with open(out / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows])
    assert tables[0] == tables[1]
    assert checkpoints.leftovers(other) == []


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, capsys):
    whole = train("--out_dir", str(tmp_path / "whole"))
    out = shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(out / "final")
    weights = out / "step-00000008" / "lit_model.pth"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    train("--resume", "auto")
    said = capsys.readouterr().out
    assert f"warning: {weights} is damaged" in said
    assert f"Resuming from {out / 'step-00000004'}" in said
    assert_same_run(whole, out)
    checkpoints.verify(out / "step-00000008")


def test_nothing_but_damaged_checkpoints(train, tmp_path):
    out = train()
    for mark in out.glob("*/complete.json"):
        mark.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole\. Start anew with --overwrite"):
        train("--resume", "auto")
    assert len(steps_in(out)) == 3


def test_going_on_from_an_older_checkpoint_deletes_the_newer_ones_when_told_to(train):
    out = train()
    older = str(out / "step-00000004")
    with pytest.raises(UserError, match=r"holds checkpoints of later steps than step-00000004: final, step-00000008"):
        train("--resume", older)
    assert steps_in(out) == ["final", "step-00000004", "step-00000008"]
    train("--resume", older, "--overwrite", "--train.max_steps", "6")
    assert steps_in(out) == ["final", "step-00000004"]
    assert checkpoints.read_mark(out / "final").step == 6


def test_going_on_from_another_folder_deletes_nothing_there(train, tmp_path):
    one = train("--out_dir", str(tmp_path / "one"))
    two = train("--out_dir", str(tmp_path / "two"), "--train.max_steps", "16")
    resume = ("--out_dir", str(two), "--resume", str(one / "step-00000004"))
    train(*resume, "--overwrite", "--train.max_steps", "6")
    assert steps_in(one) == ["final", "step-00000004", "step-00000008"]
    assert steps_in(two) == ["final"]


def test_a_finished_run_is_tidied_up(train, capsys):
    """A kill between the last rename and the removal of older ones."""
    out = train("--checkpoint.keep_last", "2")
    shutil.copytree(out / "step-00000008", out / "step-00000007")
    (out / "step-00000008").rename(out / ".step-00000008.partial")
    (out / ".step-00000008.partial" / "complete.json").unlink()
    train("--checkpoint.keep_last", "2", "--resume", "auto")
    assert "This run is finished" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*step*")) == ["step-00000007"]


# ----------------------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def tiny(moe_fields):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    with use_custom_moe():
        gpt = GPT(Config(**moe_fields))
    torch.manual_seed(0)
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.05)
    tokens = torch.randint(0, 100, (2, 9))
    return fabric, gpt, [Batch(tokens[:, :-1], tokens[:, 1:])]


def test_the_layer_whose_output_went_bad_first_is_named(tiny):
    fabric, gpt, batches = tiny
    found = first_not_finite(fabric, gpt, batches, lambda losses: losses.cross_entropy)
    assert found.startswith("computed again")
    with torch.no_grad():
        gpt.transformer.h[1].norm_1.weight.fill_(1e30)  # queries times keys overflow
    found = first_not_finite(fabric, gpt, batches, lambda losses: losses.cross_entropy)
    assert found == "the first output that went bad was that of transformer.h.1.attn.proj, in micro batch 1 of 1"
    with torch.no_grad():
        gpt.transformer.h[0].norm_1.weight.fill_(float("nan"))
    assert weights_not_finite(gpt) == "transformer.h.0.norm_1.weight"


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    """Else they would be the newest checkpoint, from which nothing goes on."""
    whole = train("--train.max_steps", "8", "--out_dir", str(tmp_path / "whole"))
    weights = checkpoints.load_weights(whole / "step-00000004")
    state = checkpoints.load_training_state(whole / "step-00000004")
    weights["transformer.h.1.norm_1.weight"][0] = float("nan")
    out = tmp_path / "out"
    saved = checkpoints.read_mark(whole / "step-00000004")
    checkpoints.save(
        out / "step-00000004",
        weights=weights,
        config=checkpoints.load_config(whole / "final"),
        hyperparameters=checkpoints.load_hyperparameters(whole / "step-00000004"),
        step=4,
        tokens=saved.tokens,
        training_state=state,
    )
    with pytest.raises(UserError, match=r"step 5: the weights of transformer\.h\.1\.norm_1\.weight .*saves nothing"):
        train("--resume", "auto")
    assert steps_in(out) == ["step-00000004"]


def test_the_gradient_that_went_bad_first_is_named(tiny):
    fabric, gpt, batches = tiny

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    gpt.transformer.h[1].attn.register_forward_hook(lambda _module, _inputs, output: Explodes.apply(output))
    gpt.zero_grad()
    found = first_not_finite(fabric, gpt, batches, lambda losses: losses.cross_entropy)
    assert (
        found == "the first gradient that went bad was that of transformer.h.1.attn.proj.weight, in micro batch 1 of 1"
    )
