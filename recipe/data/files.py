"""Files to read, here (a ``Path``) or on the Hugging Face Hub (an ``hf://`` address), opened by one function."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from recipe.cli import UserError

Location = Path | str
HUB = "hf://"
WAITS = (0.5, 2.0)  # seconds before a broken request is made again


class Unfinished(UserError):
    """What ended the work from outside: what was done is kept, and the same command goes on there."""


def is_remote(location: Location) -> bool:
    """Whether a file is on the Hub."""
    return isinstance(location, str) and location.startswith(HUB)


def suffix(location: Location) -> str:
    """The ending of a file's name, in lower case."""
    return Path(str(location)).suffix.lower()


def open_file(location: Location) -> BinaryIO:
    """Opens a file for reading in any order; of one on the Hub no more is fetched than is read."""
    if not is_remote(location):
        return open(location, "rb")
    from huggingface_hub import HfFileSystem  # here alone: processes that read local files need none of it

    file = _again(HfFileSystem().open)(location, "rb", cache_type="none")
    file.cache.fetcher = _again(file.cache.fetcher)
    return file


def _again(call: Callable[..., Any]) -> Callable[..., Any]:
    """Calls again when the server hangs up in the middle, which huggingface_hub does not for all kinds of it."""
    import httpx

    def patient(*args: Any, **kwargs: Any) -> Any:
        for wait in WAITS:
            try:
                return call(*args, **kwargs)
            except httpx.RemoteProtocolError:
                time.sleep(wait)
        return call(*args, **kwargs)

    return patient


@contextmanager
def reading(location: Location) -> Iterator[None]:
    """Whatever goes wrong with a file of the Hub in here is a lost connection: transports have many ways to say so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(location):
            raise
        raise Unfinished(
            f"{location} could not be read on: the connection was lost ({in_short(error)}). What was done is kept; the "
            "same command goes on where it was."
        ) from None


def in_short(error: Exception) -> str:
    """An exception of another library in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
