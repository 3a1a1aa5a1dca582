"""Kill training processes from the first step to the last, a third of them during a save, and resume them.

No more is lost than the steps since the last save, and the finished run equals an uninterrupted one.
"""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from litmoe import checkpoints
from tests.chaos.conftest import Moment, share
from tests.chaos.helpers import (
    INTERVAL,
    RUN,
    STEPS,
    FullRun,
    assert_same_checkpoint,
    assert_same_end,
    begin,
    last_step,
    run_uninterrupted,
    saved_step,
    saves_of,
    wait_for,
)
from tests.chaos.processes import Death, Life
from tests.helpers import SIGMOID_FLAGS, write_tune_file

MUON = ("--optimizer", "litmoe.train.muon.Muon")
A_ROUND = 20
"""How often a run is killed before it may finish and is compared"""


def chaos(full: FullRun, folder: Path, kills: int, note: Callable[[Moment], None]) -> None:
    """Kill runs ``kills`` times, evenly from the first step to the last, and let each finish."""
    draw, done = random.Random(f"{folder.name} {kills}"), 0
    helpers: list[psutil.Process] = []
    while done < kills:
        a_round, planned = folder / f"from-kill-{done}", min(A_ROUND, kills - done)
        out = a_round / "out"
        for number in range(planned):
            saved = saved_step(out)
            step = max(int(STEPS * (number + draw.random()) / planned), saved)
            what = ("step", "save", "step", "start", "save", "step")[number % 6]
            life = kill(full, a_round / f"life-{number}", out, what, step, draw)
            if not life.was_killed:  # it came to its end first
                break
            done += 1
            note(moment(full, life, saved))
            check_what_is_left(out, life, saved)
            assert last_step(life) - saved_step(out) <= 2 * INTERVAL, "a save waits for the one before it"
            helpers += life.helpers
        last = begin(a_round / "last", out, full.command, "--resume", "auto")
        assert last.end() == 0, last.said
        assert_same_run(full.out, out)
    assert not psutil.wait_procs(helpers, timeout=60)[1], "data workers outlived their process"


def kill(full: FullRun, folder: Path, out: Path, what: str, step: int, draw: random.Random) -> Life:
    """Start a process and kill it: within the step after ``step``, during the next save, or while it starts."""
    death = None
    if what == "save":
        save = min((step // INTERVAL + 1) * INTERVAL, STEPS)
        death = even_moment("final" if save == STEPS else f"step-{save:08d}", full, draw)
    life = begin(folder, out, full.command, "--resume", "auto", death=death)
    if what == "step":
        wait_for(life, step + 1)
        time.sleep(draw.random() * full.step)
    elif what == "start":
        wait_for(life, 1, draw.random() * full.start)
    if what != "save":
        life.kill()
    return life


def even_moment(save: str, full: FullRun, draw: random.Random) -> Death:
    """Choose a time within a save, or equally often one of its file operations, because some take no time."""
    operations = full.saves[save]
    if draw.random() < 0.5:
        last = draw.choice(operations)
        return Death(last.group, last.number)
    seconds = draw.uniform(operations[0].seconds, operations[-1].seconds)
    last = max((one for one in operations if one.seconds <= seconds), key=lambda one: one.seconds)
    return Death(last.group, last.number, seconds - last.seconds)


def moment(full: FullRun, life: Life, saved: int) -> Moment:
    """Return what a process did when it was killed."""
    step, saves = last_step(life), saves_of(life.operations)
    if saves:
        name, operations = saves.popitem()
        done, count = len(operations), len(full.saves.get(name, next(iter(full.saves.values()))))
        if done < count and any(operation.what.startswith("os.mkdir") for operation in operations):
            what = re.sub(r"step-\d+|final", "NAME", operations[-1].what)
            return Moment("training", step / STEPS, "inside a save", done / count, what)
    return Moment("training", (step or saved) / STEPS, "in or between steps" if step else "as it started or resumed")


def check_what_is_left(out: Path, life: Life, saved: int) -> None:
    """Check what a kill leaves: only complete checkpoints have final names."""
    for folder in out.glob("[!.]*/"):
        checkpoints.verify(folder)
    moved = [one.group.removesuffix(" removed") for one in life.operations[:-1] if one.what.startswith("os.rename .")]
    now = saved_step(out)
    assert now >= max([saved, *(STEPS if name == "final" else int(name.removeprefix("step-")) for name in moved)])
    if last_step(life) and saved:
        assert f"step {saved} of {STEPS}" in life.said


def assert_same_run(one: Path, other: Path) -> None:
    """Compare files, weights, training state and metrics, except for times."""
    files = [sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) for out in (one, other)]
    assert files[0] == files[1]
    assert_same_end(one, other)
    for folder in one.glob("*/"):
        assert_same_checkpoint(folder, other / folder.name)


def test_killed_run_equals_uninterrupted_run(run_file: Path, tmp_path: Path, moments: Callable[[Moment], None]) -> None:
    """Quick: one kill within a step, one during a save, one within the next step."""
    full = run_uninterrupted(tmp_path / "full", "run_train.py", "--config", str(run_file), *RUN)
    chaos(full, tmp_path / "killed", 3, moments)


STORIES = {
    "AdamW": (5, ()),
    "sigmoid router, Muon": (2, (*MUON, *SIGMOID_FLAGS, "--moe.bias_update_rate", "0.01")),
    "2 workers, Muon": (2, (*MUON, "--data.init_args.num_workers", "2")),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("story", STORIES)
def test_killed_pretraining(run_file: Path, tmp_path: Path, moments: Callable[[Moment], None], story: str) -> None:
    kills, flags = STORIES[story]
    full = run_uninterrupted(tmp_path / "full", "run_train.py", "--config", str(run_file), *RUN, *flags)
    chaos(full, tmp_path / story, share(kills), moments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_with_timed_saves(run_file: Path, tmp_path: Path, moments: Callable[[Moment], None]) -> None:
    """``checkpoint.every_minutes`` is so short that a save is always running during the steps."""
    command = ("run_train.py", "--config", str(run_file), *RUN)
    full = run_uninterrupted(tmp_path / "full", *command)
    by_clock = (*command, "--train.save_interval", "null", "--checkpoint.every_minutes", "0.0001")
    draw, done = random.Random(share(2)), 0
    while done < share(2):
        out = tmp_path / f"from-kill-{done}" / "out"
        for at in list(range(5, STEPS - 5, 11))[: share(2) - done]:
            saved = saved_step(out)
            life = begin(out.with_name(f"life-{at}"), out, by_clock, "--resume", "auto")
            wait_for(life, max(at, saved + 15))
            time.sleep(draw.random() * full.step)
            life.kill()
            if not life.was_killed:
                break
            done += 1
            moments(moment(full, life, saved))
            check_what_is_left(out, life, saved)
            begun = re.findall(r"^Saving .*step-(\d+)$", life.said, re.MULTILINE)
            assert len(begun) > 1 and saved_step(out) >= int(begun[-2]), "saves do not overlap"
        last = begin(out.with_name("last"), out, by_clock, "--resume", "auto")
        assert last.end() == 0, last.said
        assert_same_end(full.out, out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tuned", "kills"), [("all weights", 2), ("LoRA", 2)])
def test_killed_finetuning(
    tmp_path: Path,
    base: Path,
    instructions: Path,
    moments: Callable[[Moment], None],
    tuned: str,
    kills: int,
) -> None:
    run_file = write_tune_file(tmp_path, instructions)
    lora = ("--lora_r", "4", "--lora_dropout", "0.1") if tuned == "LoRA" else ()
    more = ("--train.epochs", "null", "--eval.max_iters", "3", "--sample.prompt", "Where is Mia?")
    full = run_uninterrupted(tmp_path / "full", "finetune.py", str(base), "--config", str(run_file), *RUN, *more, *lora)
    chaos(full, tmp_path / tuned, share(kills), moments)
