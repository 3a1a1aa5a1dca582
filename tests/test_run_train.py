"""``run_train.py`` as users call it: processes, kills, and every mistake that a user can make."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import run_train
from litmoe import checkpoints
from litmoe.cli import exit_with_message
from litmoe.config import PROJECT, parse_run
from litmoe.data.manifest import read as read_manifest
from litmoe.train.preflight import prepare_data
from tests.helpers import SIGMOID_FLAGS, assert_equal, column, file_contents, training_steps, untimed_rows


@pytest.fixture
def refusal(run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> Callable[..., str]:
    """``refusal("--flag", "value")``: stderr of ``run_train.py``, which must be one message, with exit code 1, and must
    leave everything below ``tmp_path`` as it was."""

    def call(*flags: str) -> str:
        before = file_contents(tmp_path)
        monkeypatch.setattr(sys, "argv", ["run_train.py", "--config", str(run_file), *flags])
        with pytest.raises(SystemExit) as ended:
            exit_with_message(run_train.main)
        assert ended.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert file_contents(tmp_path) == before
        return message

    return call


@pytest.fixture
def own_data(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared corpus that a test may damage."""
    shutil.copytree(prepared, tmp_path / "own")
    return tmp_path / "own"


def data_flags(folder: Path) -> list[str]:
    return [
        f"--data.init_args.train_data_path={folder / 'data' / 'train'}",
        f"--data.init_args.val_data_path={folder / 'data' / 'val'}",
        f"--tokenizer_dir={folder / 'tokenizer'}",
    ]


def test_no_data(refusal, tmp_path):
    message = refusal(*data_flags(tmp_path / "nowhere"))
    assert "no data" in message
    assert "prepare_data.py" in message


def test_empty_text(refusal, own_data):
    for path in (own_data / "data" / "train").iterdir():
        path.write_text("  \n", encoding="utf-8")
    assert "train" in refusal(*data_flags(own_data))


def test_text_is_not_utf8(refusal, own_data):
    (own_data / "data" / "train" / "stories.txt").write_bytes("Caf\u00e9 au lait.".encode("latin-1"))
    message = refusal(*data_flags(own_data))
    assert "UTF-8" in message
    assert "stories.txt" in message


def test_missing_tokenizer(refusal, own_data, tmp_path):
    shutil.rmtree(own_data / "tokenizer")
    assert "tokenizer" in refusal(*data_flags(own_data))


def test_broken_tokenizer(refusal, own_data):
    (own_data / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer.json" in refusal(*data_flags(own_data))


def test_tokenizer_exceeds_vocabulary(refusal):
    message = refusal("--model.vocab_size", "100", "--model.padded_vocab_size", "100")
    assert "the model's vocabulary holds 100" in message
    assert "--model.padded_vocab_size" in message


def test_missing_checkpoint_to_resume(refusal, tmp_path):
    assert "step-00000010" in refusal("--resume", str(tmp_path / "step-00000010"))


def test_checkpoint_of_another_model(trained_copy, refusal):
    message = refusal("--resume", str(trained_copy / "final"), "--model.n_embd", "64")
    assert "n_embd: 32 there, 64 here" in message


def test_damaged_checkpoint(trained_copy, refusal):
    weights = trained_copy / "step-00000008" / "lit_model.pth"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10] + b"?" + data[-9:])
    assert "lit_model.pth" in refusal("--resume", str(weights.parent))


def test_text_shorter_than_a_batch(refusal):
    message = refusal("--micro-batch-size", "50", "--global-batch-size", "50", "--max-seq-length", "64")
    assert ": train has" in message
    assert "--micro-batch-size" in message


def test_validation_text_shorter_than_a_batch(train):
    """7 windows are one batch."""
    out = train("--micro-batch-size", "20", "--global-batch-size", "20", "--max-seq-length", "64")
    assert len(column(out, "val_loss")) == 3


def test_unknown_corpus(refusal, tmp_path):
    message = refusal(*data_flags(tmp_path / "new"), "--prepare.source", "tinystoriez")
    assert "'tinystories'" in message or "tinystories" in message


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/a-checkpoint.txt"])
def test_system_files_are_ignored(run_file, tmp_path, name):
    """With such a file in train/, the run file's source was ignored and TinyStories downloaded."""
    (tmp_path / "new/data/train" / name).parent.mkdir(parents=True)
    (tmp_path / "new/data/train" / name).write_text("x", encoding="utf-8")
    (tmp_path / "own.jsonl").write_text("".join(f'{{"text": "Text {i}."}}\n' for i in range(200)), encoding="utf-8")
    tokenizer = ["--prepare.tokenizer", "train", "--prepare.vocab_size", "300"]
    source = ["--prepare.source", str(tmp_path / "own.jsonl")]
    run = parse_run(["--config", str(run_file), *data_flags(tmp_path / "new"), *source, *tokenizer])
    prepare_data(run.settings)
    found = read_manifest(tmp_path / "new/data")
    assert found.source.name == "files" and found.splits["train"].documents > 100


def test_unreadable_text_is_not_replaced(refusal, tmp_path):
    (tmp_path / "new/data/train").mkdir(parents=True)
    (tmp_path / "new/data/train/book.pdf").write_bytes(b"x")
    message = refusal(*data_flags(tmp_path / "new"), "--prepare.source", "sample")
    assert "can be read (it has .pdf 1); expected files of .txt" in message


def test_out_dir_not_writable(refusal, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert str(tmp_path / "file") in refusal("--out_dir", str(tmp_path / "file" / "out"))


def test_invalid_wandb_dataset(refusal):
    assert "wandb" in refusal("--wandb-dataset", "nonsense").lower()


def test_killed_run_is_locked_and_resumed(train, run_file, tmp_path, refusal, monkeypatch, capsys):
    """While it is suspended its folder is refused; after a kill a resumed run ends as the uninterrupted one."""
    out = tmp_path / "killed"
    steps = ("--train.max_steps", "100", "--train.save_interval", "5", "--eval.interval", "50")
    flags = ("--config", str(run_file), *steps, "--out_dir", str(out))
    killed = subprocess.Popen([sys.executable, str(PROJECT / "run_train.py"), *flags], **PIPES)
    try:
        deadline = time.monotonic() + 120
        while not (out / "step-00000010").exists():
            assert killed.poll() is None, killed.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        psutil.Process(killed.pid).suspend()
        for how in (["--overwrite"], ["--resume", "auto"]):  # both would delete each other's checkpoints
            message = refusal(*steps, "--out_dir", str(out), *how)
            assert f"used by another run (process {killed.pid} on {socket.gethostname()}, since 2" in message
        killed.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    finally:
        killed.kill()
        killed.communicate()
    stopped_at = checkpoints.read_metadata(checkpoints.newest_undamaged(out)[0]).step
    assert 10 <= stopped_at < 100
    monkeypatch.setattr(sys, "argv", ["run_train.py", *flags, "--resume", "auto"])
    exit_with_message(run_train.main)
    printed = capsys.readouterr().out
    assert f"Taking over {out} from a run that ended without releasing it" in printed
    assert f"step {stopped_at} of 100" in printed
    assert training_steps(out) == list(range(1, 101))
    expected = train(*steps, "--out_dir", str(tmp_path / "uninterrupted"))
    assert_equal(checkpoints.load_weights(out / "final"), checkpoints.load_weights(expected / "final"))
    assert untimed_rows(out) == untimed_rows(expected)


# 12 steps of 4 micro batches, the last one of 2; the epoch of 37 ends within step 10, after one device's turn of two.
ONE_RUN = (
    *(
        "--micro-batch-size",
        "4",
        "--global-batch-size",
        "16",
        "--train.max_steps",
        "null",
        "--train.max_tokens",
        "2944",
    ),
    *("--train.save_interval", "5", "--eval.max_iters", "4", "--optimizer.init_args.lr", "3.0e-3"),
)


FSDP = ("--strategy", "fsdp")


def run_twice(launcher: str, run_file: Path, *flags: str) -> str:
    """Train in two processes on the CPU. Return their output."""
    script = [str(PROJECT / "run_train.py"), "--config", str(run_file), *flags]
    environments: list[dict[str, str]] = [{}, {}]
    if launcher == "two nodes":
        commands = two_nodes(script, script)
    elif launcher == "num_nodes":
        with socket.create_server(("127.0.0.1", 0)) as free:
            main = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environments = [main | {"NODE_RANK": rank} for rank in ("0", "1")]
        commands = [[sys.executable, *script, "--devices", "1", "--num_nodes", "2"]] * 2
    else:
        commands = [two_processes(launcher, script)]
    codes, outputs = run_together(commands, environments)
    assert not any(codes), "\n".join(outputs)
    return "\n".join(outputs)


def two_processes(launcher: str, script: list[str]) -> list[str]:
    """Return the command of a run of two processes on this machine."""
    if launcher == "torchrun":
        return [*TORCHRUN, "--standalone", "--nproc_per_node=2", *script]
    return [sys.executable, *script, "--devices", "2"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def two_nodes(*scripts: list[str]) -> list[list[str]]:
    """Return the command of each node; all nodes are this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    node = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}")
    return [[*TORCHRUN, *node, *script] for script in scripts]


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}


def run_together(
    commands: list[list[str]], environments: Sequence[dict[str, str]] = ({}, {})
) -> tuple[list[int], list[str]]:
    """Return exit codes and outputs."""
    started = [
        subprocess.Popen(command, env=os.environ | environment, **PIPES)
        for command, environment in zip(commands, environments, strict=False)
    ]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def assert_same_run(one: Path, other: Path) -> None:
    """Compare every number of every step, and the final weights, within 1e-6."""
    tables = []
    for out in (one, other):
        with open(out / "metrics.csv", encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    wanted, found = tables
    assert len(wanted) == len(found) == 12 + 3  # three evaluations
    assert all(wanted[-2][name] for name in ("train_loss", "grad_norm", "load_balancing_loss", "learning_rate"))
    assert wanted[-1]["val_loss"]
    for before, after in zip(wanted, found, strict=True):
        for name in before.keys() - {"time", "tokens_per_second"}:
            if before[name] == "":
                assert after[name] == ""
            else:
                assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-6), (name, before["step"])
    weights = [checkpoints.load_weights(out / "final") for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(float((weights[0][name] - weights[1][name]).abs().max()) < 1e-6 for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        ("torchrun", ()),
        ("two nodes", ()),
        ("num_nodes", ("--train.tie_embeddings", "true")),
        ("devices", (*SIGMOID_FLAGS, "--moe.bias_update_rate", "0.01")),
        ("devices", ("--compile", "true", "--activation_checkpointing", "block")),
        ("devices", ("--precision", "bf16-mixed", "--optimizer", "torch.optim.SGD", "--optimizer.init_args.lr", "0.1")),
        ("torchrun", FSDP),
        ("devices", (*FSDP, "--train.tie_embeddings", "true", "--activation_checkpointing", "block")),
    ],
    ids=[
        "torchrun",
        "two nodes",
        "num_nodes, tied",
        "selection biases",
        "compiled, recomputed",
        "bf16-mixed",
        "fsdp",
        "fsdp, tied, recomputed",
    ],
)
def test_two_processes_equal_one(train, run_file, tmp_path, launcher, flags):
    """Also the experts' load of each step, which the next load-balancing loss and the biases use."""
    said = run_twice(launcher, run_file, *ONE_RUN, *flags, "--out_dir", str(tmp_path / "two"))
    # fabric.print prints on each machine
    assert said.count("12 steps of 256 tokens") == (2 if "nodes" in launcher else 1)
    assert checkpoints.read_metadata(tmp_path / "two" / "final").tokens == 2944
    assert_same_run(train(*ONE_RUN, *flags, "--out_dir", str(tmp_path / "one")), tmp_path / "two")
    states = [checkpoints.load_training_state(tmp_path / name / "final") for name in ("one", "two")]
    assert torch.equal(states[0]["expert_counts"], states[1]["expert_counts"])
    assert states[0]["expert_counts"].sum(dim=1).tolist() == [2 * 2 * 4 * 16] * 2, "of the last step's 2 micro batches"
    assert_same_moments(*(state["optimizer"] for state in states))


def assert_same_moments(one: dict, other: dict) -> None:
    """Compare the optimizer state parameter by parameter, in the same layout."""
    for before, after in zip(one["param_groups"], other["param_groups"], strict=True):
        assert before["params"] == after["params"]
    assert one["state"].keys() == other["state"].keys()
    for index, moments in one["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(other["state"][index][name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [(), FSDP], ids=["ddp", "fsdp"])
def test_resume_on_other_number_of_devices(train, run_file, tmp_path, capsys, strategy):
    full = train(*ONE_RUN, "--out_dir", str(tmp_path / "full"))
    moved = shutil.copytree(full, tmp_path / "moved")
    resume = ("--out_dir", str(moved), "--overwrite", "--resume")
    said = run_twice("devices", run_file, *ONE_RUN, *strategy, *resume, str(moved / "step-00000005"))
    assert "devices was 1 and is now 2" in said
    assert_same_run(full, moved)
    train(*ONE_RUN, *resume, str(moved / "step-00000010"))  # saved by two
    assert "devices was 2 and is now 1" in capsys.readouterr().out
    assert_same_run(full, moved)


OPTIMIZER = """
import os, signal, torch

class Failing(torch.optim.AdamW):
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 8 and os.environ.get("LOCAL_RANK", "0") == os.environ["FAILS"]:
            if os.environ["HOW"] == "asked to stop":
                signal.raise_signal(signal.SIGTERM)
                return super().step(closure)
            if os.environ["HOW"] == "killed":
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            raise RuntimeError("this process alone fails")
        return super().step(closure)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_signal_to_one_process_stops_all(train, run_file, tmp_path, monkeypatch, rank):
    """After the same step, with a checkpoint. A spot machine signals only its own process."""
    (tmp_path / "failing.py").write_text(OPTIMIZER, encoding="utf-8")
    flags = ("--optimizer", "failing.Failing", *ONE_RUN, "--out_dir", str(tmp_path / "run"))
    script = [str(PROJECT / "run_train.py"), "--config", str(run_file), *flags]
    environment = {"PYTHONPATH": str(tmp_path), "FAILS": rank, "HOW": "asked to stop"}
    (code,), (said,) = run_together([two_processes("devices", script)], [environment])
    assert code == 143, said
    assert "Traceback" not in said
    step = checkpoints.newest_undamaged(tmp_path / "run")[0]
    assert step and f"--resume auto continues from {step}" in said
    assert checkpoints.read_metadata(step).step == 9
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAILS", "none")
    train(*flags, "--resume", "auto")
    assert_same_run(train(*ONE_RUN, "--out_dir", str(tmp_path / "full")), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [(), FSDP], ids=["ddp", "fsdp"])
def test_nonfinite_loss_stops_two_processes(run_file, tmp_path, strategy):
    """Earlier steps are kept, also if no single process has the complete model."""
    flags = (*strategy, "--optimizer.init_args.lr", "1.0e+30", "--train.max_norm", "null")
    script = [str(PROJECT / "run_train.py"), "--config", str(run_file), *ONE_RUN, *flags]
    (code,), (said,) = run_together([two_processes("devices", [*script, "--out_dir", str(tmp_path / "run")])])
    assert code == 1, said
    assert "is no longer finite at step 2" in said and "Traceback" not in said
    assert ("the first non-finite" in said) == (not strategy)
    assert checkpoints.newest_undamaged(tmp_path / "run")[0] == tmp_path / "run" / "step-00000001"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "error"])
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("launcher", ["torchrun", "devices"])
def test_lost_process_ends_the_run(train, run_file, tmp_path, monkeypatch, launcher, rank, how):
    """The other process used to wait for half an hour, or printed messages of c10d."""
    (tmp_path / "failing.py").write_text(OPTIMIZER, encoding="utf-8")
    flags = ("--optimizer", "failing.Failing", *ONE_RUN, "--out_dir", str(tmp_path / "run"))
    script = [str(PROJECT / "run_train.py"), "--config", str(run_file), *flags]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "FAILS": rank, "HOW": how}
    run = subprocess.Popen(two_processes(launcher, script), env=environment, **PIPES)
    try:
        lines = []
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line)
            if "step 7/12" in line:
                start = time.monotonic()
        assert run.wait(timeout=60) != 0
        assert time.monotonic() - start < 60, "all of them have closed their output by now"
    finally:
        run.kill()
    said = "".join(lines)
    assert f"rank {1 - int(rank)} of 2 lost the connection to another rank of this run" in said, said
    assert "--resume auto" in said
    assert ("this process alone fails" in said) == (how == "error")
    assert "c10d" not in said.split("lost the connection")[0].split("step 7/12")[1], said
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAILS", "none")
    train(*flags, "--resume", "auto")
    assert_same_run(train(*ONE_RUN, "--out_dir", str(tmp_path / "full")), tmp_path / "run")


@pytest.mark.slow
def test_machines_must_share_a_disk(train, run_file, tmp_path):
    """One machine resumed, the other started from scratch, and they averaged gradients of different steps."""
    train(*ONE_RUN, "--out_dir", str(tmp_path / "here"))
    (tmp_path / "here" / "final").rename(tmp_path / "final")
    script = [str(PROJECT / "run_train.py"), "--config", str(run_file), *ONE_RUN, "--resume", "auto", "--out_dir"]
    codes, outputs = run_together(two_nodes([*script, str(tmp_path / "here")], [*script, str(tmp_path / "there")]))
    assert all(codes)
    assert all("do not agree on the step that it starts from" in output for output in outputs), "\n".join(outputs)
    assert not list((tmp_path / "there").glob("step-*"))


def test_saved_settings_repeat_the_run(train, tmp_path):
    out = train("--train.max_steps", "3")
    saved = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text(encoding="utf-8"))
    again = train("--config", str(out / "final" / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "again"))
    one, other = (checkpoints.read_metadata(path / "final").files["lit_model.pth"] for path in (out, again))
    assert saved["train"]["max_steps"] == 3
    assert one == other
