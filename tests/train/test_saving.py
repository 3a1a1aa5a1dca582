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
from litmoe.train import evaluate as evaluation
from litmoe.train import loop
from litmoe.train.model import Batch, PretrainingModel, find_first_nonfinite, find_nonfinite_weights
from litmoe.train.saving import StopSignals, copy_to_cpu
from tests.helpers import assert_same_run, column, metric_rows


def steps_in(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir() and path.name.startswith(("step", "final")))


def on_step(monkeypatch, step, action):
    """Call ``action`` during step ``step`` (counted from 1), before its update."""
    real = loop.micro_batch_weights
    taken = iter(range(1, 10_000))

    def with_action(fabric, batches):
        if next(taken) == step:
            action()
        return real(fabric, batches)

    monkeypatch.setattr(loop, "micro_batch_weights", with_action)


# --------------------------------------------------------------------------------------------------------------- copy


def test_copy_has_memory_of_its_own():
    from torchao.optim.subclass_8bit import OptimState8bit

    stacked = torch.arange(24.0).view(4, 6)
    eight_bits = OptimState8bit.zeros((4096,))
    content = {"rows": list(stacked.unbind()), "eight bits": eight_bits, "step": 3, "empty": torch.zeros(0)}
    copy = copy_to_cpu(content)
    stacked.zero_()
    eight_bits.codes.fill_(7)
    assert torch.equal(torch.stack(copy["rows"]), torch.arange(24.0).view(4, 6))
    assert type(copy["eight bits"]) is OptimState8bit
    assert not copy["eight bits"].codes.any()
    assert (copy["step"], copy["empty"].shape) == (3, (0,))


def test_copy_keeps_tied_embeddings():
    matrix = torch.ones(3, 2)
    copy = copy_to_cpu({"a": matrix, "b": matrix.detach(), "c": matrix.clone()})
    assert copy["a"].data_ptr() == copy["b"].data_ptr() != copy["c"].data_ptr()


# --------------------------------------------------------------------------------------------------- when and how many


def test_saves_every_minutes(train):
    out = train("--train.save_interval", "null", "--checkpoint.every_minutes", "1e-9", "--checkpoint.keep_last", "null")
    assert len(steps_in(out)) > 1, "one at least is written before the run ends"
    assert "final" in steps_in(out)
    out = train("--train.save_interval", "null", "--checkpoint.every_minutes", "null", "--overwrite")
    assert steps_in(out) == ["final"]


def test_keep_last_and_keep_every(train, tmp_path):
    flags = ("--train.save_interval", "2", "--checkpoint.keep_every", "6")
    out = train(*flags, "--checkpoint.keep_last", "2")
    assert steps_in(out) == ["final", "step-00000006", "step-00000010"]
    out = train("--train.save_interval", "1", "--checkpoint.keep_last", "5", "--out_dir", str(tmp_path / "five"))
    assert steps_in(out) == ["final", *(f"step-{step:08d}" for step in range(8, 12))]
    out = train(*flags, "--checkpoint.keep_last", "null", "--out_dir", str(tmp_path / "all"))
    assert steps_in(out) == ["final", *(f"step-{step:08d}" for step in range(2, 12, 2))]


def test_rejects_settings_that_keep_too_little(train):
    with pytest.raises(UserError, match=r"keep_last is 1; expected at least 2"):
        train("--checkpoint.keep_last", "1")
    with pytest.raises(UserError, match=r"keep_every is 6, but the run saves every 4 steps"):
        train("--checkpoint.keep_every", "6")
    with pytest.raises(UserError, match=r"every_minutes is 0\.0; expected more than 0"):
        train("--checkpoint.every_minutes", "0")


def test_background_save_is_not_changed_by_training(train, trained, monkeypatch, tmp_path):
    """The save of step 4 is delayed until update 8, and equals one that was not delayed."""
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
        one, other = (checkpoints.read_metadata(folder / name).files for folder in (trained, out))
        assert one["lit_model.pth"] == other["lit_model.pth"]
    one, other = (checkpoints.load_training_state(folder / "step-00000004") for folder in (trained, out))
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], other["optimizer"]["state"][key][name]) for name in moments)
    assert one["train_dataloader"] == other["train_dataloader"]


def test_run_continues_after_failed_save(train, tmp_path, capsys):
    """A file blocks the temporary folder of the second checkpoint."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".step-00000008.partial").write_text("in the way", encoding="utf-8")
    out = train()
    assert "cannot write the checkpoint" in (said := capsys.readouterr().out)
    assert "The run continues without this checkpoint." in said
    assert steps_in(out) == ["final", "step-00000004"]


# --------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_saves_and_stops(train, trained, monkeypatch, tmp_path, capsys, name, code):
    before = signal.getsignal(signal.SIGINT)
    on_step(monkeypatch, 6, lambda: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == code
    assert signal.getsignal(signal.SIGINT) is before
    out = tmp_path / "out"
    assert steps_in(out) == ["step-00000004", "step-00000006"]
    assert f"--resume auto continues from {out / 'step-00000006'}" in capsys.readouterr().out
    train("--resume", "auto")
    assert_same_run(out, trained)


def test_two_signals_at_once_count_once():
    """A terminal sends Ctrl-C to the launcher and its processes, and the launcher forwards it."""
    messages = []
    with StopSignals(messages.append) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert len(messages) == 1


def test_error_in_loop_saves_last_step(train, trained, monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("a bug")

    on_step(monkeypatch, 7, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train()
    assert steps_in(tmp_path / "out") == ["step-00000004", "step-00000006"]
    monkeypatch.undo()
    train("--resume", "auto")
    assert_same_run(tmp_path / "out", trained)


def test_error_during_update_saves_nothing(train, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("within the update")

    monkeypatch.setattr(loop, "update_expert_balance", fail)
    with pytest.raises(RuntimeError, match="within the update"):
        train()
    assert not list((tmp_path / "out").glob("step-*"))


def test_error_waits_for_background_save(train, monkeypatch, tmp_path):
    """The error comes during an update after the save of step 4, so nothing newer can be saved."""
    begun, real, update = threading.Event(), checkpoints.save, loop.update_expert_balance

    def slow(folder, **content):
        begun.set()
        threading.Event().wait(0.5)
        real(folder, **content)

    def fail_after_the_save(*arguments):
        update(*arguments)
        if begun.is_set():
            raise RuntimeError("within the update")

    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr(loop, "update_expert_balance", fail_after_the_save)
    with pytest.raises(RuntimeError, match="within the update"):
        train()
    assert checkpoints.newest_undamaged(tmp_path / "out")[0] == tmp_path / "out" / "step-00000004"


@pytest.mark.parametrize("moment", ["before", "between batches"])
def test_stop_skips_evaluation_until_resume(train, trained, monkeypatch, tmp_path, moment):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        if moment == "before":
            on_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        else:
            evaluate = evaluation.evaluate
            patch.setattr(evaluation, "evaluate", lambda *run: signal.raise_signal(signal.SIGTERM) or evaluate(*run))
        train("--train.save_interval", "null")
    assert steps_in(out) == ["step-00000004"]
    assert metric_rows(out)[-1]["step"] == "4"
    assert metric_rows(out)[-1]["val_loss"] == ""
    train("--resume", "auto")
    assert_same_run(out, trained)


def test_signal_does_not_stop_initial_validation(train, monkeypatch, tmp_path):
    """A resumed run would not repeat it."""
    evaluate = evaluation.evaluate
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(evaluation, "evaluate", lambda *run: signal.raise_signal(signal.SIGTERM) or evaluate(*run))
        train("--eval.initial_validation", "true")
    first = metric_rows(tmp_path / "out")[0]
    assert first["step"] == "0" and float(first["val_loss"]) > 0
    assert steps_in(tmp_path / "out") == ["step-00000001"]


def test_max_time_skips_evaluation_until_resume(train, tmp_path):
    flags = ("--eval.interval", "1", "--train.max_steps", "4")
    full = train("--out_dir", str(tmp_path / "full"), *flags)
    out = train(*flags, "--train.save_interval", "null", "--train.max_time", "1.0e-6")
    assert steps_in(out) == ["step-00000001"]
    assert column(out, "val_loss") == []
    train("--resume", "auto", *flags)
    assert_same_run(out, full)


def test_failed_evaluation_keeps_its_step(train, trained, monkeypatch, tmp_path):

    def fail(*_):
        raise RuntimeError("in the sample")

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the sample"):
        patch.setattr(evaluation, "write_sample", fail)
        train("--train.save_interval", "null")
    assert steps_in(out) == ["step-00000004"]
    train("--resume", "auto")
    assert_same_run(out, trained)


def test_out_of_memory(train, monkeypatch, tmp_path, capsys):
    """The step is repeated with less, as long as there is something to do without."""
    on_step(monkeypatch, 3, lambda: torch.empty(2**50))
    train()
    assert "can't allocate memory" in capsys.readouterr().out
    assert steps_in(tmp_path / "out") == ["final", "step-00000004", "step-00000008"]
    on_step(monkeypatch, 3, lambda: torch.empty(2**50))
    flags = ("--micro-batch-size", "1", "--activation_checkpointing", "block", "--out_dir", str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"(?s)out of memory: .*needs less, see --plan:\n.*AdamW8bit"):
        train(*flags)
    assert steps_in(tmp_path / "small") == ["step-00000002"]


def test_run_survives_closed_stdout(train, monkeypatch, tmp_path):
    """As with `| head`, or with a `tee` that was ended by Ctrl-C: rich would exit at its next line."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8", buffering=1) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        on_step(patch, 3, lambda: os.close(reading))
        out = train()
        print("and after it, too")
    assert steps_in(out) == ["final", "step-00000004", "step-00000008"]
    assert len(column(out, "train_loss")) == 12


# -------------------------------------------------------------------------------------------------------------- damage


def test_damaged_checkpoint_is_skipped(train, trained, trained_copy, capsys):
    out = trained_copy
    shutil.rmtree(out / "final")
    weights = out / "step-00000008" / "lit_model.pth"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    train("--resume", "auto")
    said = capsys.readouterr().out
    assert f"warning: {weights} is damaged" in said
    assert f"Resuming from {out / 'step-00000004'}" in said
    assert_same_run(out, trained)
    checkpoints.verify(out / "step-00000008")


def test_only_damaged_checkpoints(train, trained_copy):
    for mark in trained_copy.glob("*/complete.json"):
        mark.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete\. Start again with --overwrite"):
        train("--resume", "auto")
    assert len(steps_in(trained_copy)) == 3


def test_overwrite_deletes_newer_checkpoints(train, trained_copy):
    out = trained_copy
    older = str(out / "step-00000004")
    with pytest.raises(UserError, match=r"holds checkpoints of later steps than step-00000004: final, step-00000008"):
        train("--resume", older)
    assert steps_in(out) == ["final", "step-00000004", "step-00000008"]
    train("--resume", older, "--overwrite", "--train.max_steps", "6")
    assert steps_in(out) == ["final", "step-00000004"]
    assert checkpoints.read_metadata(out / "final").step == 6


def test_resume_from_other_folder_keeps_it(train, trained, tmp_path):
    one, two = (shutil.copytree(trained, tmp_path / name) for name in ("one", "two"))
    resume = ("--out_dir", str(two), "--resume", str(one / "step-00000004"))
    train(*resume, "--overwrite", "--train.max_steps", "6")
    assert steps_in(one) == ["final", "step-00000004", "step-00000008"]
    assert steps_in(two) == ["final"]


def test_finished_run_is_cleaned_up(train, capsys):
    """After a kill between the last rename and the removal of older checkpoints."""
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


def test_names_first_layer_with_nan(tiny):
    fabric, gpt, batches = tiny
    found = find_first_nonfinite(fabric, PretrainingModel(gpt), batches, lambda losses: losses.cross_entropy)
    assert found.startswith("every micro batch, and their sum on each device, is finite")
    with torch.no_grad():
        gpt.transformer.h[1].norm_1.weight.fill_(1e30)  # queries times keys overflow
    found = find_first_nonfinite(fabric, PretrainingModel(gpt), batches, lambda losses: losses.cross_entropy)
    assert found == "the first non-finite output was that of transformer.h.1.attn.proj, in micro batch 1 of 1"
    with torch.no_grad():
        gpt.transformer.h[0].norm_1.weight.fill_(float("nan"))
    assert find_nonfinite_weights(gpt) == "transformer.h.0.norm_1.weight"


def test_search_for_nan_masks_documents(tiny):
    fabric, gpt, batches = tiny
    model = PretrainingModel(gpt, document_end=int(batches[0].input_ids[0, 3]))
    computed = []

    def loss_of(losses):
        computed.append(losses.cross_entropy)
        return losses.cross_entropy

    find_first_nonfinite(fabric, model, batches, loss_of)
    assert torch.equal(computed[0], model(*batches[0]).cross_entropy)
    assert not torch.equal(computed[0], PretrainingModel(gpt)(*batches[0]).cross_entropy)


def test_nan_weights_are_not_saved(train, trained, tmp_path):
    weights = checkpoints.load_weights(trained / "step-00000004")
    state = checkpoints.load_training_state(trained / "step-00000004")
    weights["transformer.h.1.norm_1.weight"][0] = float("nan")
    out = tmp_path / "out"
    saved = checkpoints.read_metadata(trained / "step-00000004")
    checkpoints.save(
        out / "step-00000004",
        weights=weights,
        config=checkpoints.load_config(trained / "final"),
        hyperparameters=checkpoints.load_hyperparameters(trained / "step-00000004"),
        step=4,
        tokens=saved.tokens,
        training_state=state,
    )
    with pytest.raises(UserError, match=r"step 5: the weights of transformer\.h\.1\.norm_1\.weight .*saves nothing"):
        train("--resume", "auto")
    assert steps_in(out) == ["step-00000004"]


def test_names_first_gradient_with_nan(tiny):
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
    found = find_first_nonfinite(fabric, PretrainingModel(gpt), batches, lambda losses: losses.cross_entropy)
    assert found == "the first non-finite gradient was that of transformer.h.1.attn.proj.weight, in micro batch 1 of 1"
