"""Checkpoints during a run, written off the training thread from a copy, and the signals that ask a run to stop.

The training thread pays for the copy in memory alone. A checkpoint is written whole or not at all, and only then are
older ones removed (``litmoe.checkpoints``).
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.config import CheckpointSettings
from litmoe.data.reader import STOP_SIGNALS


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; for the process that writes.

    Args:
        settings: how many are kept, and how often one is due.
        warn: shows a line to the user.
    """

    def __init__(self, settings: CheckpointSettings, warn: Callable[[str], None]) -> None:
        self._settings, self._warn = settings, warn
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last_save = time.monotonic()
        self.saved: Path | None = None
        """The last one that was written whole"""

    def is_due(self) -> bool:
        """Whether ``every_minutes`` have passed since the last save began, and it is written."""
        minutes = self._settings.every_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes and not self._writing()

    def write(self, folder: Path, content: dict[str, Any], *, copy: bool = True) -> None:
        """Writes ``content`` (what ``checkpoints.save`` takes) in the background, from a copy.

        Waits for the checkpoint before it. One that can't be written is told by the next call, and the run goes on.

        Args:
            copy: False where nobody changes the content any more.
        """
        self.tell_failure(wait=True)
        self._last_save = time.monotonic()
        content = copied(content) if copy else content
        self._thread = threading.Thread(
            target=self._write, args=(folder, content), name=f"writes {folder.name}", daemon=True
        )
        self._thread.start()

    def write_now(self, folder: Path, content: dict[str, Any]) -> None:
        """Writes ``content`` before it returns, without a copy.

        Raises:
            UserError: it can't be written.
        """
        self.tell_failure(wait=True)
        self._write(folder, content)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def tell_failure(self, *, wait: bool = False) -> None:
        """Warns of the last checkpoint where it could not be written; anything but a full or forbidden disk is raised.

        Args:
            wait: until it is written. Else one that is being written has not failed.
        """
        if self._thread is None or (self._writing() and not wait):
            return
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if isinstance(failure, UserError):
            self._warn(f"warning: {failure} The run goes on without this checkpoint.")
        elif failure is not None:
            raise failure

    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, folder: Path, content: dict[str, Any]) -> None:
        try:
            checkpoints.save(folder, **content)
            self.saved = folder
            self.remove_old(folder)
        except BaseException as error:  # shown or raised by the training thread
            self._failure = error

    def remove_old(self, newest: Path) -> None:
        """Removes what is not to be kept beside ``newest``, which is whole."""
        try:
            checkpoints.remove_old(newest, keep_last=self._settings.keep_last, keep_every=self._settings.keep_every)
        except OSError as error:  # a file of it is open somewhere (Windows, NFS)
            self._warn(f"warning: an old checkpoint in {newest.parent} could not be removed: {error}")


def copied(value: Any) -> Any:
    """The same with each tensor copied to memory of the CPU's. Two names of one matrix stay one (tied embeddings)."""
    copies: dict[tuple[int, ...], Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([copy(item) for item in value])
        if not isinstance(value, Tensor):
            return value
        if hasattr(value, "__tensor_flatten__"):  # tensors around others, whose own copies may share those (torchao)
            names, context = value.__tensor_flatten__()
            within = {name: copy(getattr(value, name)) for name in names}
            return cast(Any, type(value)).__tensor_unflatten__(within, context, value.size(), value.stride())
        key = (value.data_ptr() or id(value), *value.shape, *value.stride())
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return copy(value)


@contextmanager
def lasting_output() -> Iterator[None]:
    """While open, a pipe or terminal that is gone (``| head``, a ``tee`` that the same Ctrl-C ended) ends no run: what
    is printed then goes nowhere, as under ``nohup``. Else a library may end the process at its next line, unsaved."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in before)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that can always be written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._going_on():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self._stream.flush()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:  # there may be room again
                return
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # also for what is still in its buffer


class StopSignals:
    """While open, the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (a closed terminal) only asks the run to stop; a second
    one ends the process.

    ``received`` is the signal that asked. A second one is one that comes a second later or more: a terminal and a
    launcher both send theirs to the same processes.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for number in STOP_SIGNALS:
                under_nohup = number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
                if not under_nohup:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            with suppress(RuntimeError, ValueError):  # a write under way
                self._warn(f"{self.received.name}: saving and stopping after this step; once more stops at once.")
        elif time.monotonic() - self._received_at >= 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # no clean-up that could take its time: a save in progress is never half

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after SIGINT, 143 after SIGTERM, also to another process of the run."""
        return 128 + (self.received or signal.SIGTERM)
