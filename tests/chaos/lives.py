"""Whole processes of the project's scripts that are killed at chosen moments: the life and death of one of them.

Starting Python with torch and LitGPT takes ten seconds, so where the system can fork, one process imports everything
once (multiprocessing's fork server) and each life is a fork of it: a process of its own, which the system kills.
"""

import atexit
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from litmoe.config import PROJECT

SAVES = r"\.(step-\d+|final)\.(?:partial|old)(?:/|$)"
"""What is written below an ``out_dir`` while a checkpoint is on its way: ``Watched.pattern``"""
KILL = signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM  # os.kill of Windows ends a process by any

_WARM = (
    *("litmoe.config", "litmoe.train.preflight", "litmoe.train.pretrain", "litmoe.train.finetune"),
    *("litmoe.data.sft_data", "litmoe.train.muon", "tests.chaos.lives"),
)


@dataclass(frozen=True)
class Death:
    """A moment at which a process kills itself: before its ``operation``-th of a group, or ``delay`` seconds later."""

    group: str
    operation: int
    delay: float = 0.0


@dataclass(frozen=True)
class Watched:
    """Which file operations of a life are counted and noted."""

    folder: Path
    pattern: str
    """Of paths below the folder, with forward slashes; its first group names what the operation belongs to. What was
    moved to such a path from elsewhere is being removed."""


@dataclass(frozen=True)
class Operation:
    """A file operation that a process was about to do."""

    group: str
    number: int
    """Within its group, from 0"""
    seconds: float
    """By the clock of the machine"""
    what: str


class Life:
    """One process of a script, from its start on; its output and its file operations lie in ``folder``.

    It ends with its test at the latest (``end_all``).

    Args:
        folder: new; for what the life leaves.
        script: the script in the project's folder, such as ``run_train.py``.
        argv: its arguments.
        warm: a fork of the process that has imported training; else everything is imported anew.
    """

    def __init__(
        self,
        folder: Path,
        script: str,
        argv: list[str],
        *,
        watched: Watched | None = None,
        death: Death | None = None,
        environment: dict[str, str] | None = None,
        warm: bool = True,
    ) -> None:
        folder.mkdir(parents=True)
        self._output, self._operations = folder / "output.txt", folder / "operations.jsonl"
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if warm and can_fork else "spawn")
        context.set_forkserver_preload(list(_WARM))
        self.process = context.Process(
            target=_live,
            args=(PROJECT / script, argv, self._output, watched, self._operations, death, environment or {}),
        )
        self.helpers: list[psutil.Process] = []
        """Data workers and others that it had when it was killed"""
        self.started = time.monotonic()
        self.process.start()
        _BEGUN.append(self)

    def kill(self) -> None:
        """SIGKILL, or what Windows has for it."""
        with suppress(psutil.NoSuchProcess):
            self.helpers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()

    def signal(self, number: int) -> None:
        """Sends a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self.process.is_alive()

    def end(self, timeout: float = 1500) -> int:
        """Waits for the process's end; its exit code, negative after a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"it did not end within {timeout} s:\n{self.said}")
        return self.process.exitcode

    @property
    def was_killed(self) -> bool:
        """Whether it has ended by a kill."""
        return abs(self.end()) == KILL  # Windows has no negative ones

    @property
    def said(self) -> str:
        """Its output and errors so far."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    @property
    def operations(self) -> list[Operation]:
        """What it did with the files that were watched."""
        if not self._operations.exists():
            return []
        return [Operation(*json.loads(line)) for line in self._operations.read_text(encoding="utf-8").splitlines()]


_BEGUN: list[Life] = []


def end_all() -> None:
    """Kills what a failed test has left running, and what that had started."""
    for life in _BEGUN:
        if life.is_alive:
            life.kill()
            for helper in life.helpers:
                with suppress(psutil.NoSuchProcess):
                    helper.kill()
            life.process.join()
    _BEGUN.clear()


def _live(
    script: Path,
    argv: list[str],
    output: Path,
    watched: Watched | None,
    operations: Path,
    death: Death | None,
    environment: dict[str, str],
) -> None:
    """In the new process: runs the script as ``python script argv`` does."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}  # to the last bit the same: on a CPU
    sys.argv = [str(script), *argv]
    multiprocessing.set_start_method(None, force=True)  # its data workers start as in any process, not as this one did
    if watched is not None:
        _watch(watched, operations, death)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        # As at the end of any Python; multiprocessing's own end of a process would wait for data workers first.
        atexit._run_exitfuncs()


def _watch(watched: Watched, operations: Path, death: Death | None) -> None:
    """Notes each operation on a watched file before it is done, whichever thread does it, and dies at the one named."""
    pattern, counts, removed = re.compile(watched.pattern), dict[str, int](), set[str]()
    root = os.path.abspath(watched.folder) + os.sep
    log = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    files = ("open", "os.", "shutil.")
    reading = ("os.listdir", "os.scandir")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith(files) or event in reading:
            return
        for argument in arguments[:2]:
            if not isinstance(argument, str | os.PathLike):
                continue
            path = os.path.abspath(os.fspath(argument))
            below = path.removeprefix(root).replace(os.sep, "/") if path.startswith(root) else None
            if below is None or not (found := pattern.search(below)):
                continue
            group = found.group(1)
            if event == "os.rename":
                other = os.path.abspath(os.fspath(arguments[1])).removeprefix(root).replace(os.sep, "/")
                below = f"{below} to {other}" if argument is arguments[0] else "an older one"
                if argument is not arguments[0]:
                    removed.add(group)
            group = f"{group} removed" if group in removed else group
            number = counts.get(group, 0)
            counts[group] = number + 1
            mode = f" {arguments[1]}" if event == "open" and isinstance(arguments[1], str) else ""
            line = json.dumps([group, number, time.monotonic(), f"{event} {below}{mode}"])
            os.write(log, line.encode() + b"\n")
            if death and (group, number) == (death.group, death.operation):
                _die(death.delay)
            return

    sys.addaudithook(hook)


def _die(delay: float) -> None:
    def now() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), KILL)

    if delay:
        threading.Thread(target=now, daemon=True).start()
    else:
        now()
