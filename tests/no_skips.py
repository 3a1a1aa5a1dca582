"""A test that does not run is not green: an unexpected skip fails.

A skip is expected only for one of the reasons below, and only where that reason is true on this machine.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import pytest


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_two_gpus() -> bool:
    import torch

    return torch.cuda.device_count() < 2


def find_browser() -> str | None:
    """The path of a Chromium that is there."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    return next((path for name in names if (path := shutil.which(name))), None)


@cache
def can_mount() -> bool:
    """Whether this user may mount a disk in memory: tried, and taken away again."""
    if shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        return mounted and subprocess.run(["umount", folder]).returncode == 0


EXPECTED: dict[str, Callable[[], bool]] = {
    "needs a CUDA GPU": _no_gpu,
    "needs two CUDA GPUs": _no_two_gpus,
    "needs Windows": lambda: os.name != "nt",
    "needs Triton": lambda: importlib.util.find_spec("triton") is None,
    "needs a Chromium browser": lambda: find_browser() is None,
    "needs glibc": lambda: platform.libc_ver()[0] != "glibc",
    "needs git": lambda: shutil.which("git") is None,
    "needs make": lambda: shutil.which("make") is None,
    "needs uv": lambda: (
        shutil.which("uv") is None and not Path(__file__).parent.parent.joinpath(".uv/bin/uv").is_file()
    ),
    "needs a POSIX system": lambda: os.name == "nt",
    "needs the right to mount a disk": lambda: not can_mount(),
    "needs a user other than root": lambda: hasattr(os, "geteuid") and os.geteuid() == 0,
}
"""Reasons that a test may give for its skip, and the check that each is true."""


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns an unexpected skip into a failure, in the process that ran the test, so that it holds under xdist too."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason not in EXPECTED or not EXPECTED[reason]():
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {reason!r}; the expected reasons stand in tests/no_skips.py"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse(report)
    return report
