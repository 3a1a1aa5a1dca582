"""Out-of-memory errors in a run: the step is repeated with less memory, and the result stays the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import PROJECT, parse_run
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.hardware import is_out_of_memory
from litmoe.train import evaluate, loop
from litmoe.train.fitting import regroup
from litmoe.train.memory import training_memory
from litmoe.train.model import Batch
from tests.helpers import column, write_run_file


def fail_above(monkeypatch, rows, *, recomputed=None, after=0):
    """Let passes over more than ``rows`` sequences fail like CUDA's allocator, from call number ``after`` on.

    Args:
        recomputed: also fail unless this is recomputed.
    """
    calls = 0
    for module, name in ((loop, "_accumulate_gradients"), (evaluate, "_validation_losses")):
        original = getattr(module, name)

        def call(*args, original=original):
            nonlocal calls
            calls += 1
            result = original(*args)
            run = next(arg for arg in args if hasattr(arg, "rows"))
            is_too_much = run.rows > rows or (recomputed and run.pretraining_model.recomputed != recomputed)
            if calls > after and is_too_much:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        monkeypatch.setattr(module, name, call)


def same_weights(found, expected):
    weights = [checkpoints.load_weights(out / "final") for out in (found, expected)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_first_step_is_repeated_with_smaller_micro_batches(train, monkeypatch, tmp_path, capsys):
    flags = ("--train.global_batch_size", "8", "--eval.max_iters", "100")
    expected = train("--micro-batch-size", "2", "--out_dir", str(tmp_path / "expected"), *flags)
    fail_above(monkeypatch, 2)
    found = train("--micro-batch-size", "8", *flags)
    said = capsys.readouterr().out
    assert "Out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): this step again" in said
    assert "with 4 instead of 8 sequences at a time" in said
    assert "with 2 instead of 4 sequences at a time" in said and "with 1 " not in said
    for name in ("train_loss", "grad_norm", "load_balancing_loss", "learning_rate", "total_tokens"):
        assert column(found, name) == column(expected, name), name
    assert same_weights(found, expected)


@pytest.mark.parametrize("after", [5, 13, 14])
def test_later_step_in_the_middle_of_a_log_interval(train, monkeypatch, tmp_path, after):
    """Also in a validation: means count all micro batches alike, whatever their size."""
    expected = train("--micro-batch-size", "4", "--train.log_interval", "3", "--out_dir", str(tmp_path / "expected"))
    fail_above(monkeypatch, 2, after=after)
    found = train("--micro-batch-size", "4", "--train.log_interval", "3")
    for name in ("train_loss", "grad_norm", "val_loss", "expert_load_max/layer_0"):
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-4), name


def test_resumed_run_keeps_the_measures(train, monkeypatch, tmp_path, capsys):
    fail_above(monkeypatch, 1, recomputed="block")
    whole = train("--out_dir", str(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert "as with --activation_checkpointing moe." in said and "as with --activation_checkpointing block." in said
    assert checkpoints.load_training_state(whole / "final")["measures"] == {"rows": 1, "recomputed": "block"}
    # Also with settings that need a part of the measures
    for flags in ((), ("--activation_checkpointing", "moe")):
        resumed = train("--resume", str(whole / "step-00000004"), "--overwrite", *flags)
        assert "Out of memory" not in capsys.readouterr().out
        assert same_weights(resumed, whole)


@pytest.mark.parametrize("size", ["2", "auto"])
def test_smaller_micro_batches_when_resumed(train, tmp_path, size):
    """The error message of several GPUs advises them: the checkpoint must not override them."""
    flags = ("--train.global_batch_size", "8")
    whole = train("--micro-batch-size", size, "--out_dir", str(tmp_path / "whole"), *flags)
    resumed = train("--micro-batch-size", "1", "--resume", str(whole / "step-00000004"), *flags)
    assert checkpoints.load_training_state(resumed / "final")["measures"]["rows"] is None
    assert column(resumed, "train_loss") == pytest.approx(column(whole, "train_loss")[4:], rel=1e-5)


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8",
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 MB, max allowed: 9.07 GB).",
    ],
)
def test_errors_without_a_class_of_their_own(message):
    """torch's messages on Linux and macOS, on Windows, and on Apple's GPUs"""
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_auto(train, tmp_path, capsys):
    """The run chooses its size, with the data of any other one. A resumed run keeps it."""
    flags = ("--train.global_batch_size", "12", "--train.max_tokens", "1200", "--train.max_steps", "null")
    expected = train("--micro-batch-size", "4", "--out_dir", str(tmp_path / "expected"), *flags)
    capsys.readouterr()
    found = train("--micro-batch-size", "auto", *flags)
    assert "All 12 sequences of a step at a time." in capsys.readouterr().out
    assert column(found, "total_tokens") == [192.0, 384.0, 576.0, 768.0, 960.0, 1152.0]
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-5), name
    assert checkpoints.load_training_state(found / "final")["measures"]["rows"] == 12
    assert checkpoints.load_hyperparameters(found / "final")["train"]["micro_batch_size"] == "auto"
    resumed = train("--micro-batch-size", "auto", "--resume", str(found / "step-00000004"), "--overwrite", *flags)
    assert "at a time" not in capsys.readouterr().out
    assert column(resumed, "train_loss")[-1] == column(found, "train_loss")[-1]


def test_error_when_nothing_is_left(train, monkeypatch):
    fail_above(monkeypatch, 0)
    with pytest.raises(UserError, match=r"(?s)out of memory.*torchao.optim.AdamW8bit.*--max_seq_length 8"):
        train()


def test_tuning(tune, monkeypatch, tmp_path, capsys):
    """Rows of conversations have different numbers of targets, and LoRA has dropout."""
    expected = tune()
    fail_above(monkeypatch, 1)
    found = tune("--out_dir", str(tmp_path / "found"))
    assert "with 1 instead of 2 sequences at a time" in capsys.readouterr().out
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-4), name


def test_sample_without_memory(train, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluate, "sample_text", fail)
    out = train()
    assert "step 4/12 | sample: (none: out of memory)" in capsys.readouterr().out
    assert len(column(out, "val_loss")) == 3


def test_conversations_are_divided():
    ids = torch.arange(10).view(5, 2)
    lengths = torch.tensor([2, 1, 2, 1, 2])
    parts = list(regroup([Batch(ids, ids + 1, lengths), Batch(ids[:1], ids[:1], lengths[:1])], 2))
    assert [part.lengths.tolist() for part in parts] == [[2, 1], [2, 1], [2], [2]]
    assert torch.equal(torch.cat([part.targets for part in parts[:3]]), ids + 1)
    assert all(part.documents is None for part in parts)


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("rows", range(1, 14))
def test_windows_are_regrouped(size, rows):
    ids = torch.arange(24).view(12, 2)
    batches = [Batch(part, part + 1) for part in ids.split(size)]
    parts = list(regroup(iter(batches), rows))
    assert torch.equal(torch.cat([part.input_ids for part in parts]), ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), ids + 1)
    assert all(len(part.input_ids) == rows for part in parts[:-1]) and len(parts[-1].input_ids) <= rows


PROGRAM = """
import json, resource, sys
from litmoe.train import run
from tests.helpers import train_here

def train(*args):
    # Not earlier: how much the imports take depends on the machine.
    size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    limit = int(size.split()[1]) * 1024 + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return train_freely(*args)

train_freely, run.train = run.train, train
train_here(*json.loads(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process by Linux's means")
def test_real_limit(stories, tokenizer_dir, moe_fields, tmp_path):
    """A run that does not fit finishes with the weights of one that was started with the smaller micro batch."""
    for split, times in (("train", 10), ("val", 5)):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "stories.txt").write_text("\n<|endoftext|>\n".join(stories * times))
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    prepare(PrepareArgs(data_dir=tmp_path / "data", tokenizer_dir=tmp_path / "tokenizer", num_workers=0))
    run_file = write_run_file(tmp_path, tmp_path, moe_fields)
    wide = ["--model.n_layer", "4", "--model.n_embd", "256", "--model.moe_intermediate_size", "256"]
    wide += ["--model.block_size", "256", "--train.max_seq_length", "256"]
    wide += ["--train.global_batch_size", "27", "--train.max_steps", "3"]
    wide += ["--eval.max_iters", "1", "--train.save_interval", "null", "--sample.prompt", "null"]

    def memory(size):
        run = parse_run(["--config", str(run_file), *wide, "--micro-batch-size", str(size)])
        planned = training_memory(run, "32-true")
        return planned.peak - planned.weights

    def run(size, name, memory):
        flags = [str(run_file), *wide, "--micro-batch-size", str(size), "--out_dir", str(tmp_path / name)]
        command = [sys.executable, "-c", PROGRAM, json.dumps(flags), str(memory)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    enough = (memory(9) + memory(27)) // 2
    assert "Out of memory" not in run(9, "small", enough)
    said = run(27, "limited", enough)
    assert "with 9 instead of 27 sequences at a time" in said and said.count("Out of memory") == 1
    assert same_weights(tmp_path / "limited", tmp_path / "small")


SHORT_RANK = """
import os
import torch
from litmoe.train import loop

def rehearsal(fabric, run, micro_batches):
    enough(fabric, run, micro_batches)
    if os.environ.get("LOCAL_RANK", "0") == "1" and run.rows > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")

enough, loop._rehearsal = loop._rehearsal, rehearsal

import run_train
run_train.main()
"""


@pytest.mark.slow
def test_one_of_two_devices_is_short_of_memory(train, run_file, tmp_path):
    """Both find it out before the first step that they do together."""
    script = tmp_path / "short_rank.py"
    script.write_text(SHORT_RANK, encoding="utf-8")
    flags = ["--train.global_batch_size", "8", "--micro-batch-size", "4"]
    out = tmp_path / "short"
    command = [sys.executable, str(script), "--config", str(run_file), *flags, "--devices", "2", "--out_dir", str(out)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Out of memory (on another device): this step again, and all others, with 2 instead of 4" in done.stdout
    whole = train(*flags, "--out_dir", str(tmp_path / "whole"))
    for name in ("train_loss", "grad_norm"):
        assert column(out, name) == pytest.approx(column(whole, name), rel=1e-4), name
