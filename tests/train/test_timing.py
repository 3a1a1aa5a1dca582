"""Runs with a time budget: ``--hours`` and ``--minutes``."""

import signal
import time

import pytest

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import EvalArgs, ScheduleSettings
from litmoe.train import loop
from litmoe.train.schedule import UNKNOWN, learning_rate
from litmoe.train.timing import FIRST_STEPS, Timing
from tests.helpers import column, metric_rows, training_steps

# A slow machine chooses the length in step 14 of 15, and a rate that should have decayed before that can't be set back.
WSD = ("--schedule.name", "wsd", "--schedule.decay_fraction", "0.05")


@pytest.fixture(autouse=True)
def command_starts_now(monkeypatch):
    """These runs are no commands of their own: without this, the time of the other tests would count."""
    start = time.perf_counter()
    monkeypatch.setattr(loop, "seconds_since_start", lambda: time.perf_counter() - start)


def chosen_steps(folder):
    return checkpoints.load_training_state(folder)["progress"]["chosen_steps"]


def test_run_with_a_budget_equals_one_of_the_chosen_length(train, capsys):
    out = train("--minutes", "0.03", *WSD)
    steps = len(training_steps(out))
    said = capsys.readouterr().out
    assert "Steps of 64 tokens for 0.03 minutes" in said and "/? |" in said
    assert f"{steps:,} steps ({64 * steps:,} tokens, " in said and "fit into 0.03 minutes" in said
    assert chosen_steps(out / "final") == steps > 12, "not the 12 of the run file"
    same_length = train("--train.max_steps", str(steps), "--out_dir", str(out.with_name("same")), *WSD)
    for name in ("train_loss", "learning_rate", "grad_norm"):
        assert column(out, name) == column(same_length, name)


def test_resumed_run_keeps_its_length(train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    choose_length = loop._choose_length

    def choose_and_stop(*run):
        assert choose_length(*run)
        signal.raise_signal(signal.SIGTERM)
        return False

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "_choose_length", choose_and_stop)
        train("--minutes", "0.05", *WSD)
    last = checkpoints.newest(out)
    steps = chosen_steps(last)
    assert steps > checkpoints.read_metadata(last).step
    train("--minutes", "0.05", *WSD, "--resume", "auto")
    assert training_steps(out) == list(range(1, steps + 1))


def test_more_time_is_a_new_choice(train):
    out = train("--minutes", "0.03", *WSD)
    steps = chosen_steps(out / "final")
    train("--minutes", "0.06", *WSD, "--resume", "auto")
    assert chosen_steps(out / "final") == training_steps(out)[-1] > steps


@pytest.mark.slow
def test_compiled_run_logs_each_evaluation_once(train):
    out = train("--minutes", "0.5", *WSD, "--compile", "true")
    steps = [row["step"] for row in metric_rows(out) if row["val_loss"]]
    assert len(steps) == len(set(steps)) > 1


def test_budget_of_tuning(tune):
    out = tune("--minutes", "0.05")
    assert chosen_steps(out / "final") == training_steps(out)[-1] != 8


@pytest.mark.parametrize("name", ["wsd", "cosine"])
def test_rate_does_not_decay_while_the_length_is_unknown(name):
    schedule = ScheduleSettings(name=name)
    rates = [
        learning_rate(step, peak=1.0, minimum=0.1, warmup_steps=4, steps=UNKNOWN, schedule=schedule)
        for step in range(1000)
    ]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0] * 996, abs=1e-12)


def test_seconds_of_the_rest():
    timing = Timing()
    for _ in range(FIRST_STEPS):
        timing.add_step(60.0)
    assert timing.seconds_per_step is None and not timing.is_measured(100, elapsed=60)
    for seconds in (1.0, 2.0) * 5:
        timing.add_step(seconds)
    assert timing.seconds_per_step == 1.5
    assert timing.is_measured(100, elapsed=10) and not timing.is_measured(100, elapsed=9)
    timing.evaluation = {"validation": 10.0, "hellaswag": 30.0}
    settings = EvalArgs(interval=100, hellaswag_interval=300)
    assert timing.per_step(settings) == pytest.approx(1.5 + 0.1 + 0.1)
    assert timing.at_the_end(settings, saved_bytes=10**9) == pytest.approx(42)
    assert timing.at_the_end(EvalArgs(final_validation=False), saved_bytes=10**9) == pytest.approx(2)


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--hours", "-1"]])
def test_impossible_budget(train, flags):
    with pytest.raises(UserError, match=f"{flags[0][2:]} is {flags[1]}.*expected more than 0"):
        train(*flags)
