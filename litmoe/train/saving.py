"""What protects the results of a run: background saves, stop signals, a closed stdout, and the lock on ``out_dir``."""

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import Tensor
from torch.utils._pytree import tree_map_only

from litmoe import checkpoints
from litmoe.checksummed_json import known_fields, read_json, write_json
from litmoe.cli import UserError, strip_control_chars
from litmoe.config import CheckpointSettings
from litmoe.data.loader import STOP_SIGNALS

LOCK = ".run.lock"
HOLDER = ".run.json"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Only rank 0 uses it.

    Args:
        settings: how many checkpoints are kept, and how often one is due.
        warn: shows a line to the user.
    """

    def __init__(self, settings: CheckpointSettings, warn: Callable[[str], None]) -> None:
        self._settings = settings
        self._warn = warn
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._save: Future[None] | None = None
        self._last_save = time.monotonic()
        self.saved: Path | None = None
        """The last checkpoint that was written completely"""

    def is_due(self) -> bool:
        """Return whether the last save is written and began ``every_minutes`` ago or earlier."""
        minutes = self._settings.every_minutes
        is_writing = self._save is not None and not self._save.done()
        if minutes is None or is_writing:
            return False
        return time.monotonic() - self._last_save >= 60 * minutes

    def write(self, folder: Path, content: dict[str, Any], *, copy: bool = True) -> None:
        """Write ``content`` (the arguments of ``checkpoints.save``) in the background.

        Waits for the checkpoint before it. The next call reports a failed save; training continues.

        Args:
            copy: False if nothing changes the content any more.
        """
        self.report_failure(wait=True)
        # From the beginning of the save, so that a slow disk does not delay the next one.
        self._last_save = time.monotonic()
        # Training changes the tensors while they are written.
        if copy:
            content = copy_to_cpu(content)
        self._save = self._thread.submit(self._write, folder, content)

    def write_now(self, folder: Path, content: dict[str, Any]) -> None:
        """Write ``content`` before returning, without a copy.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        self.report_failure(wait=True)
        self._write(folder, content)

    def report_failure(self, *, wait: bool = False) -> None:
        """Warn if the last save failed because of the disk; raise any other error.

        Args:
            wait: for a save in progress. Without it, a save in progress counts as successful.
        """
        if self._save is None or not (wait or self._save.done()):
            return
        save, self._save = self._save, None
        try:
            save.result()
        except UserError as error:
            # A full disk; there may be space for the next checkpoint.
            self._warn(f"warning: {error} The run continues without this checkpoint.")

    def remove_old(self, newest: Path) -> None:
        """Remove the checkpoints that need not be kept next to ``newest``, which is complete."""
        try:
            checkpoints.remove_old(newest, keep_last=self._settings.keep_last, keep_every=self._settings.keep_every)
        except OSError as error:
            # Another process has one of its files open (Windows, NFS).
            self._warn(f"warning: an old checkpoint in {newest.parent} could not be removed: {error}")

    def _write(self, folder: Path, content: dict[str, Any]) -> None:
        checkpoints.save(folder, **content)
        self.saved = folder
        # Last: nothing is deleted before its successor is complete.
        self.remove_old(folder)


def copy_to_cpu(value: Any) -> Any:
    """Copy a nested structure, with every tensor in new CPU memory. Tied tensors stay tied."""
    copies: dict[tuple[int, ...], Tensor] = {}

    def copy_tensor(tensor: Tensor) -> Tensor:
        # A tensor subclass around others, such as torchao's 8-bit state, shares their memory when it is copied.
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            inner = {name: copy_tensor(getattr(tensor, name)) for name in names}
            return cast(Any, type(tensor)).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
        # Tied tensors share an address. Tensors without memory all have the address 0, so they are known by id.
        key = (tensor.data_ptr() or id(tensor), *tensor.shape, *tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map_only(Tensor, copy_tensor, value)


# --- Signals and stdout


class StopSignals:
    """Turns the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (closed terminal) into a request to stop.

    ``received`` is the signal that was received, or None. A second signal ends the process at once. It counts as second
    if it comes at least a second later, because a terminal and a launcher both forward the first one.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            # nohup ignores SIGHUP, so that the run survives a closed terminal.
            if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._received_at = time.monotonic()
            # The signal interrupted another print.
            with suppress(RuntimeError, ValueError):
                self._warn(f"{self.received.name}: finishing this step, then saving. A second one exits immediately.")
        elif time.monotonic() - self._received_at >= 1:
            # The default handler ends the process without clean-up, which could take long. A partial save is ignored
            # by the next run.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def exit_code(self) -> int:
        """Exit code by the shells' convention: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)


@contextmanager
def tolerate_closed_stdout() -> Iterator[None]:
    """Discard output while stdout or stderr is closed (``| head``, a closed terminal), as ``nohup`` does.

    Without it a print inside a library would end the run before it saves.
    """
    previous = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _TolerantStream(stream)) for stream in previous)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = previous


class _TolerantStream:
    """A text stream with writes that never fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._redirect_if_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._redirect_if_closed():
            self._stream.flush()

    @contextmanager
    def _redirect_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The disk of a redirected output is full. The stream stays, because space may become free.
            if error.errno == errno.ENOSPC:
                return
            # Point the descriptor to the null device, also for what is still buffered.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as null_device:
                os.dup2(null_device.fileno(), self._stream.fileno())


# --- The lock on out_dir: two runs in one folder would delete each other's checkpoints


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock."""

    pid: int
    host: str
    since: str
    boot: str = ""
    """Identifies the running kernel. All containers of a machine share it, with different host names. Only on Linux."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Hold the lock on ``out_dir``. Only the main process of a run takes it.

    Raises:
        UserError: another run holds it, or a run on another machine may hold it, or the folder is not writable.
    """
    # The other ranks belong to the same run and must not wait for its lock.
    if not main_process():
        yield
        return
    new_folders = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    # The lock of the system ends with its process, also after SIGKILL. The file with the holder is for messages, and
    # for machines that do not see the lock.
    lock, holder_file = FileLock(out_dir / LOCK), out_dir / HOLDER
    with ExitStack() as cleanup:
        # Runs last: a run that could not start leaves nothing behind.
        cleanup.callback(_remove_empty, new_folders)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(_in_use(out_dir)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"can't write to {out_dir} ({error.strerror}); choose a folder that can be written to with"
                    " --out_dir."
                ) from None
            # A run on such a disk (some network disks) is still useful, so it only warns.
            print(f"warning: {out_dir} has no file locks ({error.strerror}). Do not start a second run there.")
        cleanup.callback(lock.release)
        # Once released, the file may belong to another run, so it is deleted before. Windows can't delete open files;
        # there `release` deletes it.
        cleanup.callback(_delete, lock.lock_file)
        this_process = _this_process()
        if holder_file.exists():
            _take_over(out_dir, this_process)
        write_json(holder_file, asdict(this_process))
        cleanup.callback(_delete, holder_file)
        yield


def _delete(path: str | Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _remove_empty(folders: list[Path]) -> None:
    # Stops at the first folder with files.
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _this_process() -> Holder:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return Holder(os.getpid(), socket.gethostname(), since, boot)


def _read_holder(out_dir: Path) -> Holder | None:
    """Return the recorded holder, or None if there is none or the file can't be read."""
    try:
        return Holder(**known_fields(Holder, read_json(out_dir / HOLDER)))
    except (OSError, ValueError, TypeError):
        return None


def _take_over(out_dir: Path, this_process: Holder) -> None:
    """Report the killed run that held the lock before.

    Raises:
        UserError: that run was on another machine, and locks of other machines may not be visible here.
    """
    holder = _read_holder(out_dir)
    if holder is not None:
        # The lock of a killed run is free on this kernel. On another machine it may only look free.
        is_same_kernel = holder.boot != "" and holder.boot == this_process.boot
        if holder.host != this_process.host and not is_same_kernel:
            raise UserError(
                f"{out_dir} is marked as used by a run on another machine: {holder}. This machine"
                f" ({this_process.host}) can't check whether that run has ended. If it has, delete {out_dir / HOLDER}"
                " and start again. If not, use another --out_dir."
            )
    description = strip_control_chars(str(holder)) if holder else "its process is unknown"
    print(f"Taking over {out_dir} from a run that ended without releasing it ({description}).")


def _in_use(out_dir: Path) -> str:
    """Return the error message of a second run."""
    holder = _read_holder(out_dir)
    message = (
        f"{out_dir} is used by another run ({holder or 'its process is unknown'}). Two runs in one folder would"
        " delete each other's checkpoints. Wait until that run has ended, stop it, or use another --out_dir."
    )
    # A network disk may keep the lock of a machine that crashed.
    if holder is not None and holder.host != socket.gethostname():
        message += f" If {holder.host} has crashed, delete {out_dir / LOCK} and {out_dir / HOLDER}."
    return message


def main_process() -> bool:
    """Return whether this is rank 0 of the processes that torchrun, srun or Fabric started.

    A single process has none of these environment variables.
    """
    names = ["NODE_RANK", "LOCAL_RANK"]
    if "RANK" in os.environ:
        names = ["RANK"]
    elif SLURMEnvironment.detect():
        names = ["SLURM_PROCID"]
    return all(os.environ.get(name, "0") == "0" for name in names)
