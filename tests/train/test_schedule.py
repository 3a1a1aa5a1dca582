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


def test_leftover_micro_batches_make_a_shorter_last_step():
    # 230 tokens are 11 micro batches of 20; LitGPT would drop the three that do not fill a third step of four.
    run = plan(max_tokens=230)
    assert (run.micro_batches, run.accumulation, run.steps, run.tokens) == (11, 4, 3, 220)
    assert [run.micro_batches_in(step) for step in range(run.steps)] == [4, 4, 3]


def test_the_first_limit_wins_and_is_named():
    assert plan(max_tokens=10_000, max_steps=2).ended_by == "max_steps 2"
    assert plan(max_tokens=10_000, max_steps=2).micro_batches == 8
    epochs = plan(max_tokens=10_000, epochs=2)
    assert (epochs.ended_by, epochs.micro_batches) == ("epochs 2", 100)


def test_devices_share_the_tokens():
    run = plan_run(
        TrainArgs(global_batch_size=8, micro_batch_size=2, max_tokens=800),
        devices=2,
        seq_length=10,
        epoch_sequences=100,
    )
    assert (run.micro_batches, run.accumulation, run.tokens) == (20, 2, 800)


@pytest.mark.parametrize("limit", [{"max_tokens": 2330}, {"max_steps": 17}, {"epochs": 3}])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_goes_on_has_the_plan_that_it_had(limit, devices):
    """103 sequences make 51 micro batches of 2, which two devices do not divide, nor steps of 8 sequences."""
    train = TrainArgs(global_batch_size=8, micro_batch_size=2, lr_warmup_steps=3, **limit)
    shape = dict(devices=devices, seq_length=10, epoch_sequences=103)
    whole = plan_run(train, **shape)
    assert whole.epochs == pytest.approx(whole.micro_batches * devices / 51)
    for step in range(1, whole.steps):
        epoch, micro_batches = divmod(4 * step, 51)
        rest = plan_run(train, **shape, step=step, tokens=80 * step, position=(epoch, 2 * micro_batches))
        for name in ("steps", "tokens", "warmup_steps", "ended_by"):
            assert getattr(rest, name) == getattr(whole, name)
        assert rest.epochs == pytest.approx(whole.epochs)
        assert [rest.micro_batches_in(n) for n in range(step, whole.steps)] == [
            whole.micro_batches_in(n) for n in range(step, whole.steps)
        ]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_the_micro_batch_changes_no_step(micro_batch):
    rest = plan(max_tokens=800, micro_batch_size=micro_batch, step=3, tokens=240, position=(0, 24))
    assert (rest.steps, rest.tokens, rest.micro_batches) == (10, 800, 56 // micro_batch)


def test_a_short_last_step_is_followed_by_whole_ones():
    rest = plan(max_tokens=500, step=3, tokens=220, position=(0, 22))
    assert (rest.steps, rest.tokens) == (7, 500)
    assert [rest.micro_batches_in(step) for step in range(3, 7)] == [4, 4, 4, 2]


def test_nothing_is_left_of_a_run_that_is_at_its_end():
    for limit in ({"max_tokens": 230}, {"max_tokens": 100}, {"max_steps": 3}, {"epochs": 1}):
        rest = plan(**limit, step=3, tokens=220, position=(1, 10))
        assert (rest.steps, rest.micro_batches) == (3, 0)


def test_a_run_shorter_than_a_micro_batch_is_refused():
    with pytest.raises(UserError, match="less than one micro batch of 20 tokens"):
        plan(max_tokens=19)


def test_warmup_fraction_is_of_an_epoch():
    assert plan(lr_warmup_steps=None, lr_warmup_fraction=0.2, max_steps=100).warmup_steps == math.ceil(0.2 * 50 / 4)


def test_warmup_leaves_the_last_step_at_the_minimum():
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
def test_learning_rate_from_the_first_update_to_the_last(warmup, steps, name):
    found = rates(ScheduleSettings(name), warmup=warmup, steps=steps)
    assert all(rate > 0 for rate in found)
    assert found[-1] == MINIMUM
    if warmup:
        assert found[0] == pytest.approx(PEAK / warmup, rel=1e-15)
        assert found[warmup - 1] == PEAK
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_halfway_down_the_cosine():
    assert rates(ScheduleSettings(), warmup=10, steps=20)[14] == pytest.approx((PEAK + MINIMUM) / 2)


@pytest.mark.parametrize(
    ("fraction", "steps", "stable"), [(0.2, 50, 30), (0.25, 50, 28), (1.0, 50, 0), (0.001, 50, 39)]
)
def test_warmup_stable_decay(fraction, steps, stable):
    """10 of warm-up, then the same rate, then equal steps down to the last update."""
    found = rates(ScheduleSettings("wsd", fraction), warmup=10, steps=steps)
    assert found[9 : 10 + stable] == [PEAK] * (1 + stable)
    falling = found[9 + stable :]
    differences = [a - b for a, b in pairwise(falling)]
    assert differences == pytest.approx([(PEAK - MINIMUM) / (40 - stable)] * (40 - stable))
    assert found[-1] == MINIMUM
