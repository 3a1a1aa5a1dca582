"""A disk of 8 MB fills during training: the run warns, keeps complete checkpoints, continues, and saves again when
there is space. Its metrics are kept in memory until then."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from litmoe import checkpoints
from litmoe.train.logs import MetricsCSV
from tests.chaos.helpers import (
    INTERVAL,
    STEPS,
    assert_same_end,
    begin,
    last_step,
    run_uninterrupted,
    saved_step,
    wait_for,
)
from tests.chaos.processes import Life
from tests.helpers import metric_rows
from tests.no_skips import can_mount


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 8 MB: room for some checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not can_mount():
        pytest.skip("needs the right to mount a disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk with a file. Return its path, so that it can be removed."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return ballast


def fill_until_said(disk: Path, life: Life, text: str) -> Path:
    """Call ``fill`` until the run prints ``text``: removing older checkpoints frees space in between."""
    while text not in life.said:
        assert life.is_alive, life.said
        fill(disk)
        time.sleep(0.002)
    return disk / "ballast"


@pytest.mark.slow
def test_run_saves_again_when_disk_has_space(tmp_path: Path, disk: Path, command: tuple[str, ...]) -> None:
    full = run_uninterrupted(tmp_path / "full", *command)
    out = disk / "out"
    life = begin(tmp_path / "life", out, command)
    while not (out / f"step-{INTERVAL:08d}").exists():
        assert life.is_alive, life.said
        time.sleep(0.002)
    before = saved_step(out)
    ballast = fill_until_said(disk, life, "the disk is full")
    assert saved_step(out) >= before
    ballast.unlink()
    assert life.end() == 0, life.said
    kept = [int(folder.name.removeprefix("step-")) for folder in out.glob("step-*")]
    assert max(kept) > before, "it saved again"
    assert_same_end(full.out, out)


@pytest.mark.slow
def test_resume_completes_a_failed_final_save(tmp_path: Path, disk: Path, command: tuple[str, ...]) -> None:
    full = run_uninterrupted(tmp_path / "full", *command)
    out = disk / "out"
    life = begin(tmp_path / "life", out, command)
    wait_for(life, STEPS // 2)
    ballast = fill_until_said(disk, life, "the disk is full")
    assert life.end() == 1, life.said
    assert last_step(life) == STEPS, "it trained to its end"
    message = life.said[life.said.index("error: ") :]
    assert "the disk is full" in message and "--resume auto" in message and "Traceback" not in life.said
    assert not checkpoints.leftovers(out) and not (out / "final").exists()
    assert 0 < saved_step(out) <= STEPS // 2 + INTERVAL
    ballast.unlink()
    again = begin(tmp_path / "again", out, command, "--resume", "auto")
    assert again.end() == 0, again.said
    assert_same_end(full.out, out)


def test_metrics_are_kept_until_disk_has_space(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the end every row is complete and in order, also with a new column."""
    path = disk / "metrics.csv"
    metrics = MetricsCSV(path, resume_step=None)
    metrics.log_metrics({"train_loss": 0.5}, 1)
    ballast = fill(disk)
    text = "0." + 1000 * "1"
    for step in range(2, 12):
        metrics.log_metrics({"train_loss": 0.5, "mfu": text} | ({"new": step} if step > 6 else {}), step)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "No space left" in said
    here = metric_rows(disk)
    assert [int(row["step"]) for row in here] == list(range(1, len(here) + 1)), "only complete rows"
    assert not list(disk.glob(".*"))
    metrics.finalize("success")
    assert "rows, from step" in capsys.readouterr().out
    ballast.unlink()
    metrics.save()
    assert "is written again" in capsys.readouterr().out
    assert [(int(row["step"]), row["mfu"], row["new"]) for row in metric_rows(disk)] == [
        (1, "", ""),
        *((step, text, str(step) if step > 6 else "") for step in range(2, 12)),
    ]
