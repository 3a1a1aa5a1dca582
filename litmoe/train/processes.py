"""Several processes of one run: how they share the work, and what is said where one of them is gone."""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only

from litmoe.cli import UserError
from litmoe.config import RunSettings, is_sharded, processes
from litmoe.train.sharding import shard


def make_strategy(settings: RunSettings, precision: str) -> DDPStrategy | ModelParallelStrategy:
    """Fabric's strategy for a run of several processes.

    Args:
        precision: Fabric's, as ``bf16-mixed``.
    """
    backend = None
    if torch.cuda.is_available() and not torch.distributed.is_nccl_available():  # Windows
        rank_zero_info("This torch has no NCCL, so the GPUs talk to each other by gloo, which is slower.")
        backend = "gloo"
    if is_sharded(settings):
        devices, num_nodes = processes(settings)
        return ModelParallelStrategy(
            partial(shard, precision=precision),
            data_parallel_size=devices * num_nodes,
            tensor_parallel_size=1,
            process_group_backend=backend,
        )
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is not in torch 2.10
    # Buffers are the same everywhere.
    return DDPStrategy(process_group_backend=backend, broadcast_buffers=False)


@contextmanager
def watch_others() -> Iterator[None]:
    """While open, a process that is gone ends the others with one message and not with torch's inner workings.

    A closed connection shows itself in the next exchange; that error is translated. For what shows nothing (a GPU waits
    for the others for ever): torchrun ends all processes of its machine, as Fabric's launcher does where one of its
    children fails; children whose launcher is gone find that out here.

    Raises:
        UserError: in the processes that are left.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise UserError(f"{_another_is_gone()}\n(torch says: {str(error).splitlines()[0]})") from None


def _is_lost_connection(error: RuntimeError) -> bool:
    """Torch has classes for NCCL's errors and the store's; gloo's are known by their text alone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "by peer" in str(error)


def _another_is_gone() -> str:
    me = f"process {rank_zero_only.rank} of {os.environ.get('WORLD_SIZE', 1)}"  # type: ignore[attr-defined]
    return (
        f"{me} lost another one of this run: it ended, or its machine can't be reached. What ended it may stand above."
        " The same command with --resume auto goes on from the newest checkpoint, also on another number of devices."
    )


def _end_without(launcher: int) -> None:
    """Ends this process soon after its launcher, which waits for nobody."""
    while os.getppid() == launcher and psutil.pid_exists(launcher):  # the first tells on POSIX, the second on Windows
        time.sleep(5)
    time.sleep(10)  # the run is over, or a closed connection says so
    print(f"error: {_another_is_gone()}", file=sys.stderr, flush=True)
    os._exit(1)
