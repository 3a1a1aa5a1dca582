"""Training processes are killed from the first step to the last, a third of them inside a save, and resumed: nothing is
lost beyond the last save, and in the end the run is the one that nobody killed."""

import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from litmoe import checkpoints
from litmoe.data.instructions import InstructArgs, prepare_instructions
from tests.chaos.conftest import Moment, share
from tests.chaos.lives import SAVES, Death, Life, Operation, Watched
from tests.helpers import SIGMOID_FLAGS, assert_equal, assert_same_state, save_tiny, tiny_gpt, untimed_rows

STEPS = 60
INTERVAL = 5
RUN = (
    *("--train.max_steps", str(STEPS), "--train.save_interval", str(INTERVAL)),
    *("--eval.interval", "20", "--progress", "false", "--checkpoint.every_minutes", "null"),
)
MUON = ("--optimizer", "litmoe.train.muon.Muon", "--optimizer.init_args.lr", "0.02")
A_ROUND = 20
"""As often a run is killed before it may come to its end and is compared; then another one begins"""


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed, and when it did what."""

    command: tuple[str, ...]
    """A script and its arguments"""
    out: Path
    start: float
    """Seconds until its first step was done"""
    step: float
    """Seconds a step"""
    saves: dict[str, list[Operation]]


def begin(folder: Path, out: Path, command: tuple[str, ...], *flags: str, death: Death | None = None) -> Life:
    """A process of the run in ``out``."""
    script, *arguments = command
    return Life(folder, script, [*arguments, *flags, "--out_dir", str(out)], watched=Watched(out, SAVES), death=death)


def run_whole(folder: Path, *command: str) -> Whole:
    """Trains without a kill."""
    life = begin(folder / "life", folder / "out", command)
    first, last = (wait_for(life, step) - life.started for step in (1, STEPS))
    assert life.end() == 0, life.said
    return Whole(command, folder / "out", first, (last - first) / (STEPS - 1), saves_of(life.operations))


def saves_of(operations: list[Operation]) -> dict[str, list[Operation]]:
    """For each save its operations, the removal of older checkpoints that follows among them."""
    saves: dict[str, list[Operation]] = {}
    for operation in operations:
        if not (saves and operation.group.endswith(" removed")):
            saves.setdefault(operation.group, [])
        next(reversed(saves.values())).append(operation)
    return saves


def wait_for(life: Life, step: int, seconds: float = math.inf) -> float:
    """Waits until it says that it did ``step``, or ends, or is so old; the time then."""
    while last_step(life) < step and life.is_alive and time.monotonic() - life.started < seconds:
        time.sleep(0.005)
    return time.monotonic()


def last_step(life: Life) -> int:
    """The step that it said last; 0 before its first."""
    said = re.findall(r"^step (\d+)/", life.said, re.MULTILINE)
    return int(said[-1]) if said else 0


def saved_step(out: Path) -> int:
    """The step that ``--resume auto`` goes on from."""
    newest = checkpoints.newest_undamaged(out)[0]
    return checkpoints.read_metadata(newest).step if newest else 0


def chaos(whole: Whole, folder: Path, kills: int, note: Callable[[Moment], None]) -> None:
    """Kills runs ``kills`` times, evenly from the first step to the last, and lets each come to its end."""
    draw, done = random.Random(f"{folder.name} {kills}"), 0
    helpers: list[psutil.Process] = []
    while done < kills:
        a_round, planned = folder / f"from-kill-{done}", min(A_ROUND, kills - done)
        out = a_round / "out"
        for number in range(planned):
            saved = saved_step(out)
            step = max(int(STEPS * (number + draw.random()) / planned), saved)
            what = ("step", "save", "step", "start", "save", "step")[number % 6]
            life = kill(whole, a_round / f"life-{number}", out, what, step, draw)
            if not life.was_killed:  # it came to its end first
                break
            done += 1
            note(moment(whole, life, saved))
            check_what_is_left(out, life, saved)
            assert last_step(life) - saved_step(out) <= 2 * INTERVAL, "a save waits for the one before it"
            helpers += life.helpers
        last = begin(a_round / "last", out, whole.command, "--resume", "auto")
        assert last.end() == 0, last.said
        assert_same_run(whole.out, out)
    assert not psutil.wait_procs(helpers, timeout=60)[1], "data workers outlived their process"


def kill(whole: Whole, folder: Path, out: Path, what: str, step: int, draw: random.Random) -> Life:
    """A process that is killed: within the step after ``step``, inside the save that follows it, or as it starts."""
    death = None
    if what == "save":
        save = min((step // INTERVAL + 1) * INTERVAL, STEPS)
        death = even_moment("final" if save == STEPS else f"step-{save:08d}", whole, draw)
    life = begin(folder, out, whole.command, "--resume", "auto", death=death)
    if what == "step":
        wait_for(life, step + 1)
        time.sleep(draw.random() * whole.step)
    elif what == "start":
        wait_for(life, 1, draw.random() * whole.start)
    if what != "save":
        life.kill()
    return life


def even_moment(save: str, whole: Whole, draw: random.Random) -> Death:
    """At any moment of the time that a save takes, or, as often, at any of its file operations: some take no time."""
    operations = whole.saves[save]
    if draw.random() < 0.5:
        last = draw.choice(operations)
        return Death(last.group, last.number)
    seconds = draw.uniform(operations[0].seconds, operations[-1].seconds)
    last = max((one for one in operations if one.seconds <= seconds), key=lambda one: one.seconds)
    return Death(last.group, last.number, seconds - last.seconds)


def moment(whole: Whole, life: Life, saved: int) -> Moment:
    """Where a process was when it was killed."""
    step, saves = last_step(life), saves_of(life.operations)
    if saves:
        name, operations = saves.popitem()
        done, count = len(operations), len(whole.saves.get(name, next(iter(whole.saves.values()))))
        if done < count and any(operation.what.startswith("os.mkdir") for operation in operations):
            what = re.sub(r"step-\d+|final", "NAME", operations[-1].what)
            return Moment("training", step / STEPS, "inside a save", done / count, what)
    return Moment("training", (step or saved) / STEPS, "in or between steps" if step else "as it started or resumed")


def check_what_is_left(out: Path, life: Life, saved: int) -> None:
    """What a kill may leave: whole checkpoints under their names."""
    for folder in out.glob("[!.]*/"):
        checkpoints.verify(folder)
    moved = [one.group.removesuffix(" removed") for one in life.operations[:-1] if one.what.startswith("os.rename .")]
    now = saved_step(out)
    assert now >= max([saved, *(STEPS if name == "final" else int(name.removeprefix("step-")) for name in moved)])
    if last_step(life) and saved:
        assert f"step {saved} of {STEPS}" in life.said


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, weights, state of training and metrics, but for what a clock tells."""
    files = [sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) for out in (one, other)]
    assert files[0] == files[1]
    assert_same_end(one, other)
    for folder in one.glob("*/"):
        assert_same_checkpoint(folder, other / folder.name)


def assert_same_end(one: Path, other: Path) -> None:
    """The same where other checkpoints may lie beside ``final``."""
    assert not [path for path in other.rglob("*") if re.search(r"^\.|\.(tmp|partial|old)$", path.name)]
    assert_same_checkpoint(one / "final", other / "final")
    tables = [untimed_rows(out) for out in (one, other)]
    assert [int(row["step"]) for row in tables[1] if row["train_loss"]] == list(range(1, STEPS + 1))
    assert tables[0] == tables[1]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    checkpoints.verify(other)
    assert_equal(checkpoints.load_weights(one), checkpoints.load_weights(other))
    assert_same_state(other, one)


def test_killed_run_equals_uninterrupted_run(run_file: Path, tmp_path: Path, moments: Callable[[Moment], None]) -> None:
    """The quick one of these: once in a step, once in a save, once in the step after."""
    whole = run_whole(tmp_path / "whole", "run_train.py", "--config", str(run_file), *RUN)
    chaos(whole, tmp_path / "killed", 3, moments)


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
    whole = run_whole(tmp_path / "whole", "run_train.py", "--config", str(run_file), *RUN, *flags)
    chaos(whole, tmp_path / story, share(kills), moments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_with_timed_saves(run_file: Path, tmp_path: Path, moments: Callable[[Moment], None]) -> None:
    """``checkpoint.every_minutes`` alone, so short that steps and saves run side by side all the time."""
    command = ("run_train.py", "--config", str(run_file), *RUN)
    whole = run_whole(tmp_path / "whole", *command)
    by_clock = (*command, "--train.save_interval", "null", "--checkpoint.every_minutes", "0.0001")
    draw, done = random.Random(share(2)), 0
    while done < share(2):
        out = tmp_path / f"from-kill-{done}" / "out"
        for at in list(range(5, STEPS - 5, 11))[: share(2) - done]:
            saved = saved_step(out)
            life = begin(out.with_name(f"life-{at}"), out, by_clock, "--resume", "auto")
            wait_for(life, max(at, saved + 15))
            time.sleep(draw.random() * whole.step)
            life.kill()
            if not life.was_killed:
                break
            done += 1
            moments(moment(whole, life, saved))
            check_what_is_left(out, life, saved)
            begun = re.findall(r"^Saving .*step-(\d+)$", life.said, re.MULTILINE)
            assert len(begun) > 1 and saved_step(out) >= int(begun[-2]), "none is begun before the last one is whole"
        last = begin(out.with_name("last"), out, by_clock, "--resume", "auto")
        assert last.end() == 0, last.said
        assert_same_end(whole.out, out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tuned", "kills"), [("all weights", 2), ("LoRA", 2)])
def test_killed_finetuning(
    tmp_path: Path,
    moe_fields: dict[str, Any],
    tokenizer_dir: Path,
    moments: Callable[[Moment], None],
    tuned: str,
    kills: int,
) -> None:
    base = save_tiny(tmp_path / "base", tiny_gpt({**moe_fields, "block_size": 48}), tokenizer_dir)
    questions = [
        {"instruction": f"Where is {name} {day}?", "output": f"{name} went to the {place}." * times}
        for name in ("Mia", "Tom", "Lily", "Ben")
        for day in ("now", "today", "at noon")
        for times, place in enumerate(("sea", "wood", "hill"), 1)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    prepare_instructions(InstructArgs(str(tmp_path / "questions.json"), tmp_path / "data", val_fraction=0.2))
    settings = {
        "data": {"class_path": "litmoe.data.InstructionData", "init_args": {"data_dir": str(tmp_path / "data")}},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "lr_warmup_steps": 2, "min_lr": 1.0e-4},
        "eval": {"max_iters": 3},
        "sample": {"max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
    }
    run_file = tmp_path / "finetune.yaml"
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    lora = ("--lora_r", "4", "--lora_dropout", "0.1") if tuned == "LoRA" else ()
    once = ("--train.log_interval", "1", "--train.epochs", "null")
    whole = run_whole(tmp_path / "whole", "finetune.py", str(base), "--config", str(run_file), *RUN, *once, *lora)
    chaos(whole, tmp_path / tuned, share(kills), moments)
