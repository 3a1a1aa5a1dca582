"""Messages after a lost rank. (Runs that lose one: tests/test_run_train.py.)"""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.train.distributed import report_lost_ranks


def test_closed_connection_message():
    """Gloo's own error, between two members in this process of which one leaves."""
    store, left = distributed.HashStore(), threading.Event()

    def join(rank: int) -> distributed.ProcessGroup:
        return distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))

    def leave() -> None:
        join(1).allreduce([torch.ones(1)]).wait()
        left.set()

    other = threading.Thread(target=leave)
    other.start()
    group = join(0)
    group.allreduce([torch.ones(1)]).wait()
    other.join()
    assert left.is_set()
    with (
        pytest.raises(UserError, match=r"rank 0 of .* lost the connection to another rank.*--resume auto"),
        report_lost_ranks(),
    ):
        group.allreduce([torch.ones(1)]).wait()


def test_other_errors_are_not_translated():
    with pytest.raises(RuntimeError, match="size of tensor"), report_lost_ranks():
        torch.ones(2) + torch.ones(3)


def test_nccl_error_message():
    with pytest.raises(UserError, match="--resume auto"), report_lost_ranks():
        raise distributed.DistBackendError("NCCL error: remote process exited")  # there is none here to make one


@pytest.mark.slow
def test_a_process_whose_launcher_is_gone_ends():
    """One that hears nothing of it by its connections: here it sleeps, as it would wait for a GPU."""
    waits = (
        "import time; from litmoe.train.distributed import report_lost_ranks\n"
        "with report_lost_ranks(): print('waiting', flush=True); time.sleep(300)"
    )
    starts = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {waits!r}], env=os.environ | {{'LOCAL_RANK': '1'}})\n"
        "print(child.pid, flush=True); time.sleep(300)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", starts],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert launcher.stdout is not None
    while "waiting" not in launcher.stdout.readline():
        assert launcher.poll() is None
    start = time.monotonic()
    launcher.kill()
    said = launcher.stdout.read()  # until the child closes it
    launcher.wait()
    assert "lost the connection to another rank of this run" in said
    assert time.monotonic() - start < 60
