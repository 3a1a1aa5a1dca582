"""The length of a run and its learning rates."""

import math
from itertools import pairwise

import pytest
from litgpt.args import TrainArgs

from litmoe.cli import UserError
from litmoe.config import ScheduleSettings
from litmoe.train.schedule import learning_rate, plan_run


def plan(step=0, tokens=0, position=(0, 0), **train):
    defaults = dict(global_batch_size=8, micro_batch_size=2, lr_warmup_steps=3)
    done = dict(step=step, tokens=tokens, position=position)
    return plan_run(TrainArgs(**{**defaults, **train}), devices=1, seq_length=10, epoch_sequences=100, **done)


def test_last_step_can_be_shorter():
    # 230 tokens are 11 micro batches of 20. LitGPT would skip the three that do not fill a third step of four.
    run = plan(max_tokens=230)
    assert (run.micro_batches, run.accumulation, run.steps, run.tokens) == (11, 4, 3, 220)
    assert [run.micro_batches_in(step) for step in range(run.steps)] == [4, 4, 3]


def test_smallest_limit_wins():
    assert plan(max_tokens=10_000, max_steps=2).ended_by == "max_steps 2"
    assert plan(max_tokens=10_000, max_steps=2).micro_batches == 8
    epochs = plan(max_tokens=10_000, epochs=2)
    assert (epochs.ended_by, epochs.micro_batches) == ("epochs 2", 100)


def test_tokens_are_divided_over_devices():
    run = plan_run(
        TrainArgs(global_batch_size=8, micro_batch_size=2, max_tokens=800),
        devices=2,
        seq_length=10,
        epoch_sequences=100,
    )
    assert (run.micro_batches, run.accumulation, run.tokens) == (20, 2, 800)


@pytest.mark.parametrize("limit", [{"max_tokens": 2330}, {"max_steps": 17}, {"epochs": 3}])
@pytest.mark.parametrize("devices", [1, 2])
def test_resumed_run_keeps_its_plan(limit, devices):
    """103 sequences are 51 micro batches of 2, which neither two devices nor steps of 8 sequences divide."""
    train = TrainArgs(global_batch_size=8, micro_batch_size=2, lr_warmup_steps=3, **limit)
    shape = dict(devices=devices, seq_length=10, epoch_sequences=103)
    complete = plan_run(train, **shape)
    assert complete.epochs == pytest.approx(complete.micro_batches * devices / 51)
    for step in range(1, complete.steps):
        epoch, micro_batches = divmod(4 * step, 51)
        rest = plan_run(train, **shape, step=step, tokens=80 * step, position=(epoch, 2 * micro_batches))
        for name in ("steps", "tokens", "warmup_steps", "ended_by"):
            assert getattr(rest, name) == getattr(complete, name)
        assert rest.epochs == pytest.approx(complete.epochs)
        assert [rest.micro_batches_in(n) for n in range(step, complete.steps)] == [
            complete.micro_batches_in(n) for n in range(step, complete.steps)
        ]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_resume_with_other_micro_batch(micro_batch):
    rest = plan(max_tokens=800, micro_batch_size=micro_batch, step=3, tokens=240, position=(0, 24))
    assert (rest.steps, rest.tokens, rest.micro_batches) == (10, 800, 56 // micro_batch)


def test_resume_after_a_short_step():
    rest = plan(max_tokens=500, step=3, tokens=220, position=(0, 22))
    assert (rest.steps, rest.tokens) == (7, 500)
    assert [rest.micro_batches_in(step) for step in range(3, 7)] == [4, 4, 4, 2]


def test_resume_of_a_finished_run():
    for limit in ({"max_tokens": 230}, {"max_tokens": 100}, {"max_steps": 3}, {"epochs": 1}):
        rest = plan(**limit, step=3, tokens=220, position=(1, 10))
        assert (rest.steps, rest.micro_batches) == (3, 0)


def test_run_shorter_than_a_micro_batch():
    with pytest.raises(UserError, match="less than one micro batch of 20 tokens"):
        plan(max_tokens=19)


def test_warmup_fraction_of_an_epoch():
    assert plan(lr_warmup_steps=None, lr_warmup_fraction=0.2, max_steps=100).warmup_steps == math.ceil(0.2 * 50 / 4)


def test_warmup_ends_before_the_last_step():
    run = plan(lr_warmup_steps=100, max_steps=5)
    assert run.warmup_steps == 4


PEAK, MINIMUM = 6.1e-4, 6.0e-5


def rates(schedule: ScheduleSettings, *, warmup: int, steps: int) -> list[float]:
    return [
        learning_rate(step, peak=PEAK, minimum=MINIMUM, warmup_steps=warmup, steps=steps, schedule=schedule)
        for step in range(steps)
    ]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 7), (6, 7), (100, 1000)])
def test_first_and_last_learning_rate(warmup, steps, name):
    lr = rates(ScheduleSettings(name), warmup=warmup, steps=steps)
    assert all(rate > 0 for rate in lr)
    assert lr[-1] == MINIMUM
    if warmup:
        assert lr[0] == pytest.approx(PEAK / warmup, rel=1e-15)
        assert lr[warmup - 1] == PEAK
    assert lr[warmup:] == sorted(lr[warmup:], reverse=True)


def test_middle_of_the_cosine():
    assert rates(ScheduleSettings(), warmup=10, steps=20)[14] == pytest.approx((PEAK + MINIMUM) / 2)


@pytest.mark.parametrize(
    ("fraction", "steps", "stable"), [(0.2, 50, 30), (0.25, 50, 28), (1.0, 50, 0), (0.001, 50, 39)]
)
def test_warmup_stable_decay(fraction, steps, stable):
    """10 updates of warm-up, then a constant rate, then a linear decrease until the last update."""
    lr = rates(ScheduleSettings("wsd", fraction), warmup=10, steps=steps)
    assert lr[9 : 10 + stable] == [PEAK] * (1 + stable)
    falling = lr[9 + stable :]
    differences = [a - b for a, b in pairwise(falling)]
    assert differences == pytest.approx([(PEAK - MINIMUM) / (40 - stable)] * (40 - stable))
    assert lr[-1] == MINIMUM
