"""The lock of a run on its ``out_dir``: two runs in one folder would delete each other's checkpoints.

The operating system holds the lock and releases it when the process ends, also after a kill or a reboot. A file beside
it records who holds it, for the message to a second run and for network disks, where such a lock may not reach other
machines.
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
from litmoe.cli import UserError, harmless
from litmoe.train.preflight import check_writable, main_process

LOCK = ".run.lock"
HOLDER = ".run.json"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True)
class Holder:
    """Who holds an ``out_dir``."""

    pid: int
    host: str
    since: str
    boot: str = ""
    """Identifies the start of the machine's kernel, which all of its containers share, whatever their host names are;
    empty where the system has none"""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Keeps other runs out of ``out_dir`` while open. Only the main process of a run holds the lock.

    Raises:
        UserError: another run uses it, or ran on another machine and may still use it; or nothing can be written there.
    """
    if not main_process():
        yield
        return
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    check_writable(out_dir)
    lock, holder_file = FileLock(out_dir / LOCK), out_dir / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(_in_use(out_dir)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {out_dir} is on a disk without file locks ({error.strerror}): start no second run there.")
    try:
        me = _this_process()
        if holder_file.exists():
            _check_left_behind(out_dir, me)
        write_json(holder_file, asdict(me))
        try:
            yield
        finally:
            with suppress(OSError):
                holder_file.unlink()
    finally:
        # Windows deletes no open file. Elsewhere the file goes first: once released, it may be another run's.
        with suppress(OSError):
            if os.name != "nt":
                (out_dir / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            if os.name == "nt":
                (out_dir / LOCK).unlink()
            for folder in made:  # of a run that could not start
                folder.rmdir()


def _this_process() -> Holder:
    boot = ""
    with suppress(OSError):  # Linux alone has it
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return Holder(os.getpid(), socket.gethostname(), since, boot)


def _read_holder(out_dir: Path) -> Holder | None:
    """Who the file names; None where there is none, or where it can't be read."""
    try:
        values = read_json(out_dir / HOLDER)
        return Holder(**{field.name: values[field.name] for field in fields(Holder) if field.name in values})
    except (OSError, ValueError, TypeError):
        return None


def _check_left_behind(out_dir: Path, me: Holder) -> None:
    """Report the run that held the lock before this process took it over.

    Raises:
        UserError: it was on another machine, whose locks may not be seen here.
    """
    holder = _read_holder(out_dir)
    if holder is None or holder.host == me.host or (holder.boot and holder.boot == me.boot):
        named = harmless(str(holder or "it left no name"))
        print(f"Taking over {out_dir} from a run that ended without releasing it ({named}).")
        return
    raise UserError(
        f"{out_dir} is marked as used by a run on another machine: {holder}. This machine ({me.host}) can't check"
        f" whether that run has ended. If it has, delete {out_dir / HOLDER} and start again. If not, use another"
        " --out_dir."
    )


def _in_use(out_dir: Path) -> str:
    """The message to a second run."""
    holder = _read_holder(out_dir)
    until = time.monotonic() + 1
    while holder is None and time.monotonic() < until:  # the other run has just got the lock
        time.sleep(0.05)
        holder = _read_holder(out_dir)
    message = (
        f"{out_dir} is used by another run ({holder or 'it has not named itself yet'}). Two runs in one folder would"
        " delete each other's checkpoints. Wait until that run has ended, stop it, or use another --out_dir."
    )
    if holder is not None and holder.host != socket.gethostname():  # a network disk may keep a dead machine's lock
        message += f" If {holder.host} is gone, delete {out_dir / LOCK} and {out_dir / HOLDER}."
    return message
