"""Give files and folders that were just written their final names."""

import os
import time
from pathlib import Path

# On Windows a virus scanner or the search index opens new files for a moment, and nothing can be renamed meanwhile.
WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0) if os.name == "nt" else ()
"""Seconds between attempts"""


def rename(source: str | Path, target: str | Path) -> None:
    """Rename a file, replacing an old one, or a folder. On Windows it is tried again for some seconds.

    Raises:
        OSError: as ``os.replace``.
    """
    for seconds in WAITS:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)
