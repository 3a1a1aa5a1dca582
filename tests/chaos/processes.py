"""Processes of the project's scripts that are killed at chosen times.

Starting Python with torch and LitGPT takes ten seconds, so where the system can fork, one process imports everything
once (multiprocessing's fork server), and each ``Life`` is a fork of it that can be killed.

This module imports neither torch nor huggingface_hub: a new process imports it before it sets its environment.
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

KILL = signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM  # os.kill of Windows ends a process by any

_WARM = (
    *("litmoe.config", "litmoe.train.preflight", "litmoe.train.pretrain", "litmoe.train.finetune"),
    *("litmoe.data.sft_data", "litmoe.train.muon", "tests.chaos.processes"),
)


@dataclass(frozen=True)
class Death:
    """When a process kills itself: before operation number ``operation`` of a group, or ``delay`` seconds later."""

    group: str
    operation: int
    delay: float = 0.0


@dataclass(frozen=True)
class Watched:
    """Which file operations of a process are counted and recorded."""

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
    """From ``time.monotonic``"""
    what: str


class Life:
    """A process of a script. Its output and its file operations are recorded in ``folder``.

    ``end_all`` ends it at the end of its test.

    Args:
        folder: a new folder for its records.
        script: the script in the project's folder, such as ``run_train.py``.
        argv: its arguments.
        warm: a fork of the process that has imported training; otherwise a new process that imports everything.
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
        """Kill the process by SIGKILL, or as Windows does."""
        with suppress(psutil.NoSuchProcess):
            self.helpers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self.process.is_alive()

    def end(self, timeout: float = 1500) -> int:
        """Wait for the end of the process. Return its exit code, which is negative after a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"it did not end within {timeout} s:\n{self.said}")
        return self.process.exitcode

    @property
    def was_killed(self) -> bool:
        """Whether the process was killed."""
        return abs(self.end()) == KILL  # Windows has no negative ones

    @property
    def said(self) -> str:
        """Stdout and stderr so far."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    @property
    def operations(self) -> list[Operation]:
        """Its operations on the watched files."""
        if not self._operations.exists():
            return []
        return [Operation(*json.loads(line)) for line in self._operations.read_text(encoding="utf-8").splitlines()]


_BEGUN: list[Life] = []


def end_all() -> None:
    """Kill the processes of a failed test, and their child processes."""
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
    """Run the script in the new process, as ``python script argv`` does."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}  # results are bitwise reproducible on a CPU
    sys.argv = [str(script), *argv]
    multiprocessing.set_start_method(None, force=True)  # data workers start as in any other process
    if watched is not None:
        _watch(watched, operations, death)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        # As at the end of any Python process. Multiprocessing would wait for data workers first.
        atexit._run_exitfuncs()


def _watch(watched: Watched, operations: Path, death: Death | None) -> None:
    """Record each operation on a watched file before it happens, in any thread, and kill the process at ``death``."""
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
