"""Checkpoints written in the background, the signals that ask a run to stop, and a closed stdout.

The training thread only waits for the copy into CPU memory. ``litmoe.checkpoints`` writes a checkpoint atomically and
removes older ones only after that.
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
from litmoe.data.loader import STOP_SIGNALS


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Only rank 0 uses it.

    Args:
        settings: how many checkpoints are kept, and how often one is due.
        warn: shows a line to the user.
    """

    def __init__(self, settings: CheckpointSettings, warn: Callable[[str], None]) -> None:
        self._settings = settings
        self._warn = warn
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last_save = time.monotonic()
        self.saved: Path | None = None
        """The last checkpoint that was written completely"""

    def is_due(self) -> bool:
        """Return whether the last save is written and began ``every_minutes`` ago or earlier."""
        minutes = self._settings.every_minutes
        if minutes is None or self._is_writing():
            return False
        return time.monotonic() - self._last_save >= 60 * minutes

    def write(self, folder: Path, content: dict[str, Any], *, copy: bool = True) -> None:
        """Write ``content`` (the arguments of ``checkpoints.save``) in the background.

        Waits for the checkpoint before it. The next call reports a failed save; training continues.

        Args:
            copy: False if nothing changes the content any more.
        """
        self.report_failure(wait=True)
        self._last_save = time.monotonic()
        if copy:
            content = copy_to_cpu(content)
        # A daemon, so that a second Ctrl-C ends the process at once. A partial save is never taken for a checkpoint.
        self._thread = threading.Thread(target=self._write, args=(folder, content), name=f"writes {folder.name}")
        self._thread.daemon = True
        self._thread.start()

    def write_now(self, folder: Path, content: dict[str, Any]) -> None:
        """Write ``content`` before returning, without a copy.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        self.report_failure(wait=True)
        self._write(folder, content)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def report_failure(self, *, wait: bool = False) -> None:
        """Warn if the last save failed because of the disk; raise any other error.

        Args:
            wait: for a save in progress. Without it, a save in progress counts as successful.
        """
        if self._thread is None or (self._is_writing() and not wait):
            return
        self._thread.join()
        failure = self._failure
        self._thread, self._failure = None, None
        if isinstance(failure, UserError):
            self._warn(f"warning: {failure} The run continues without this checkpoint.")
        elif failure is not None:
            raise failure

    def remove_old(self, newest: Path) -> None:
        """Remove the checkpoints that need not be kept next to ``newest``, which is complete."""
        try:
            checkpoints.remove_old(newest, keep_last=self._settings.keep_last, keep_every=self._settings.keep_every)
        except OSError as error:  # another process has one of its files open (Windows, NFS)
            self._warn(f"warning: an old checkpoint in {newest.parent} could not be removed: {error}")

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, folder: Path, content: dict[str, Any]) -> None:
        try:
            checkpoints.save(folder, **content)
            self.saved = folder
            self.remove_old(folder)
        except BaseException as error:  # the training thread shows or raises it
            self._failure = error


def copy_to_cpu(value: Any) -> Any:
    """Copy a nested structure, with every tensor in new CPU memory. Tied tensors stay tied."""
    copies: dict[tuple[int, ...], Tensor] = {}

    def copy_tensor(tensor: Tensor) -> Tensor:
        if hasattr(tensor, "__tensor_flatten__"):  # a tensor subclass around others, such as torchao's 8-bit state
            names, context = tensor.__tensor_flatten__()
            inner = {name: copy(getattr(tensor, name)) for name in names}
            return cast(Any, type(tensor)).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
        key = (tensor.data_ptr() or id(tensor), *tensor.shape, *tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy_tensor(value)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([copy(item) for item in value])
        return value

    return copy(value)


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
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        for number in STOP_SIGNALS:
            ignored_by_nohup = number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
            if not ignored_by_nohup:
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._received_at = time.monotonic()
            with suppress(RuntimeError, ValueError):  # the signal interrupted another print
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
            if error.errno == errno.ENOSPC:  # the disk of a redirected output; space may become free
                return
            # Point the descriptor to the null device, also for what is still buffered.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as null_device:
                os.dup2(null_device.fileno(), self._stream.fileno())
