"""What a run tells its report: how it began, expert load and memory, and the table at its end."""

import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version

import lightning as L
import psutil
import torch

from litmoe.cli import strip_control_chars
from litmoe.data import manifest
from litmoe.report.journal import Session
from litmoe.report.run_data import flatten, format_bytes, next_commands, summarize
from litmoe.run_files import METRICS_FILE
from litmoe.train.state import TrainingRun, tokens_manifest

PACKAGES = ("torch", "litgpt", "lightning", "litdata")


def describe_session(run: TrainingRun, notes: list[str]) -> Session:
    """Return what the report shows of the start of a session.

    Args:
        run: set up and resumed.
        notes: the lines about model, length and hardware that the run prints.
    """
    plan = run.plan
    return Session(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        steps=plan.steps if plan.is_known else None,
        # Conversations differ in length.
        tokens=plan.tokens if plan.is_known and not run.settings.is_finetuning else None,
        epochs=plan.epochs if plan.is_known else None,
        seconds=run.settings.time_budget,
        limited_by=plan.ended_by,
        bytes_per_token=bytes_per_token(run),
        notes=[*notes, _describe_machine()],
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    )


def _describe_machine() -> str:
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    memory = format_bytes(psutil.virtual_memory().total)
    return f"{platform.system()} {platform.machine()}, {cores} cores, {memory} of RAM."


def bytes_per_token(run: TrainingRun) -> float | None:
    """Return the bytes of a token of the validation text on average; None for conversations and foreign data."""
    path = None if run.settings.is_finetuning else tokens_manifest(run.settings)
    tokens = manifest.read_file(path) if path else None
    if tokens is None or not tokens.splits["val"].tokens:
        return None
    return tokens.splits["val"].bytes / tokens.splits["val"].tokens


def peak_memory(device: torch.device) -> int:
    """Return the bytes that CUDA's allocator reserved at its peak; on other devices the peak of this process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # Not on Windows.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


def record_state(fabric: L.Fabric, run: TrainingRun, seconds_left: float) -> None:
    """Record expert load and memory if that is due. Waits for the device, like a log line.

    Args:
        seconds_left: of the run, estimated.
    """
    progress, journal = run.progress, run.report.journal
    if not journal.is_state_due(progress.step, run.plan.steps):
        return
    # (MoE layers, n_expert), of all ranks
    counts = run.expert_counts.float()
    load = counts / counts.mean(dim=1, keepdim=True) if counts.numel() else counts
    journal.state(
        progress.step,
        tokens=progress.tokens,
        memory=peak_memory(fabric.device),
        expert_load=load.tolist(),
        expected_seconds=progress.seconds + seconds_left,
    )


def end_table(fabric: L.Fabric, run: TrainingRun, seconds: float, tokens: int) -> Iterator[str]:
    """Yield the lines of the table at the end of a run.

    Args:
        seconds: of this session.
        tokens: of this session.
    """
    out_dir = run.settings.out_dir
    is_gpu = fabric.device.type == "cuda"
    rows = summarize(
        val_loss=run.val_loss,
        train_loss=run.train_loss,
        bytes_per_token=bytes_per_token(run),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory=f"{peak_memory(fabric.device) / 2**30:.2f} GiB{'' if is_gpu else ' of RAM'}",
    )
    rows["Tokens/s"] += " with validation and saving"
    rows["Metrics"] = str(out_dir / METRICS_FILE)
    rows["Report"] = str(run.report.path)
    if run.progress.step >= run.plan.steps:
        final = out_dir / "final"
        rows |= {"Checkpoint": str(final)} | next_commands(final, flatten(run.hyperparameters))
    for name, value in rows.items():
        yield f"{name:<12}{strip_control_chars(value)}"
