"""Stop training by a signal or by ``max_time``: it saves its step, and the resumed run equals an uninterrupted one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litmoe import checkpoints
from litmoe.config import PROJECT
from tests.chaos.helpers import assert_same_end, begin, last_step, run_uninterrupted, saved_step, wait_for

pytestmark = pytest.mark.slow
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (getattr(signal, "SIGHUP", None), 129)]


@needs_posix
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_saves_after_the_step(
    tmp_path: Path, command: tuple[str, ...], number: int, code: int, workers: str
) -> None:
    command = (*command, "--data.init_args.num_workers", workers)
    full = run_uninterrupted(tmp_path / "full", *command)
    out = tmp_path / "out"
    life = begin(tmp_path / "life", out, command)
    wait_for(life, 17)
    life.signal(number)
    life.signal(number)  # by the launcher, say
    assert life.end() == code, life.said
    assert saved_step(out) == last_step(life) >= 17 and "Traceback" not in life.said
    assert not (out / "final").exists() and not checkpoints.leftovers(out)
    again = begin(tmp_path / "again", out, command, "--resume", "auto")
    assert again.end() == 0, again.said
    assert_same_end(full.out, out)


@needs_posix
def test_signal_saves_with_closed_stdout(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Ctrl-C at `run_train.py | tee log` ends tee first. The run used to end with exit code 1 and saved nothing."""
    full, out = run_uninterrupted(tmp_path / "full", *command), tmp_path / "out"
    start = [sys.executable, "-u", *command, "--out_dir", str(out)]
    with subprocess.Popen(start, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        assert any(line.startswith("step 5/") for line in run.stdout)
        run.stdout.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    assert saved_step(out) >= 5 and not (out / "final").exists() and not checkpoints.leftovers(out)
    again = begin(tmp_path / "again", out, command, "--resume", "auto")
    assert again.end() == 0, again.said
    assert_same_end(full.out, out)


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_immediately(tmp_path: Path, command: tuple[str, ...], number: int) -> None:
    """At least a second later: signals of a terminal and a launcher at the same time count once."""
    steps_of_seconds = ("--train.global_batch_size", "4096", "--train.max_steps", "3", "--train.save_interval", "1")
    out = tmp_path / "out"
    life = begin(tmp_path / "life", out, (*command, *steps_of_seconds))
    wait_for(life, 1)
    while not (out / "step-00000001").exists():
        time.sleep(0.01)
    life.signal(number)
    time.sleep(1.1)
    life.signal(number)
    assert life.end() == -number, life.said
    assert last_step(life) == saved_step(out) == 1
    checkpoints.verify(out / "step-00000001")


def test_max_time_sessions_equal_one_run(tmp_path: Path, command: tuple[str, ...]) -> None:
    full = run_uninterrupted(tmp_path / "full", *command)
    out, lives = tmp_path / "out", 0
    while not (out / "final").exists():
        lives += 1
        life = begin(
            tmp_path / f"life-{lives}", out, command, "--resume", "auto", "--train.max_time", str(20 * full.step)
        )
        assert life.end() == 0, life.said
        if not (out / "final").exists():
            assert saved_step(out) == last_step(life)
    assert lives > 1
    assert_same_end(full.out, out)
