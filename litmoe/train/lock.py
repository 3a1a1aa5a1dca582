"""A lock on ``out_dir``: two runs in one folder would delete each other's checkpoints.

The operating system releases the lock when the process ends, also after a kill or a reboot. A second file records the
holder, for the error message of a second run and for network disks, where a lock may not be visible on other machines.
"""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from litmoe.checksummed_json import read_json, write_json
from litmoe.cli import UserError, strip_control_chars
from litmoe.train.preflight import check_writable, main_process

LOCK = ".run.lock"
HOLDER = ".run.json"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


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
    check_writable(out_dir)
    lock, holder_file = FileLock(out_dir / LOCK), out_dir / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(_in_use(out_dir)) from None
    except OSError as error:
        # A run on such a disk (some network disks) is still useful, so it only warns.
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {out_dir} is on a disk without file locks ({error.strerror}): start no second run there.")
    try:
        this_process = _this_process()
        if holder_file.exists():
            _take_over(out_dir, this_process)
        write_json(holder_file, asdict(this_process))
        try:
            yield
        finally:
            with suppress(OSError):
                holder_file.unlink()
    finally:
        _release(lock, out_dir)
        # Of a run that could not start nothing remains. Folders with files are not removed.
        with suppress(OSError):
            for folder in new_folders:
                folder.rmdir()


def _release(lock: FileLock, out_dir: Path) -> None:
    # Once released, the file may belong to another run, so it is deleted before. Windows can't delete open files.
    lock_file = out_dir / LOCK
    if os.name == "nt":
        lock.release()
        with suppress(OSError):
            lock_file.unlink()
    else:
        with suppress(OSError):
            lock_file.unlink()
        lock.release()


def _this_process() -> Holder:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return Holder(os.getpid(), socket.gethostname(), since, boot)


def _read_holder(out_dir: Path) -> Holder | None:
    """Return the recorded holder, or None if there is none or the file can't be read."""
    try:
        values = read_json(out_dir / HOLDER)
        return Holder(**{field.name: values[field.name] for field in fields(Holder) if field.name in values})
    except (OSError, ValueError, TypeError):
        return None


def _take_over(out_dir: Path, this_process: Holder) -> None:
    """Report the killed run that held the lock before.

    Raises:
        UserError: that run was on another machine, and locks of other machines may not be visible here.
    """
    holder = _read_holder(out_dir)
    if holder is not None:
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
    deadline = time.monotonic() + 1
    # The other run may just have taken the lock, and writes the holder next.
    while holder is None and time.monotonic() < deadline:
        time.sleep(0.05)
        holder = _read_holder(out_dir)
    message = (
        f"{out_dir} is used by another run ({holder or 'its process is unknown'}). Two runs in one folder would"
        " delete each other's checkpoints. Wait until that run has ended, stop it, or use another --out_dir."
    )
    # A network disk may keep the lock of a machine that crashed.
    if holder is not None and holder.host != socket.gethostname():
        message += f" If {holder.host} has crashed, delete {out_dir / LOCK} and {out_dir / HOLDER}."
    return message
