"""Print the path of uv; install it into .uv/ of this project if it is missing.

    python3 scripts/get_uv.py

Nothing outside the project is written, so this also works where the system's Python is read-only for pip (PEP 668).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.13.8"
FOLDER = Path(__file__).resolve().parent.parent / ".uv"
IS_WINDOWS = os.name == "nt"
UV_NAME = "uv.exe" if IS_WINDOWS else "uv"
PIP_INSTALL = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def main() -> None:
    """Print the path. Exit with code 1 and one message if no method works."""
    # Only the path goes to stdout, so that other scripts can use it.
    path = find_uv()
    if path is not None:
        print(path)
        return

    print(f"uv is not on the PATH. Installing uv {VERSION} into {FOLDER}", file=sys.stderr)
    # The first method needs Python's venv module, the second one pip.
    errors = []
    for install in (install_in_venv, install_with_system_pip):
        shutil.rmtree(FOLDER, ignore_errors=True)  # remove what a failed attempt left behind
        error = install()
        path = find_uv()
        if path is not None:
            print(path)
            return
        errors.append(f"  {error}")

    shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(
        "error: could not install uv:\n" + "\n".join(errors) + "\nCheck the network and run this command again, or "
        "install uv yourself: https://docs.astral.sh/uv/getting-started/installation/"
    )


def find_uv() -> str | None:
    """Return the first uv that runs: from the PATH, then from .uv/."""
    candidates = [shutil.which("uv"), FOLDER / "bin" / UV_NAME, FOLDER / "Scripts" / UV_NAME]
    for candidate in candidates:
        # A copied folder may contain a binary for another platform, so start it once.
        if candidate and Path(candidate).exists() and run([str(candidate), "--version"]) is None:
            return str(candidate)
    return None


def install_in_venv() -> str | None:
    """Create a virtual environment in .uv/ and install uv with its pip. Return an error message or None."""
    # Debian's python3 has this module only with the package python3-venv.
    error = run([sys.executable, "-m", "venv", str(FOLDER)])
    if error is not None:
        return f"venv: {error}"
    python = FOLDER / ("Scripts/python.exe" if IS_WINDOWS else "bin/python")
    return run([str(python), *PIP_INSTALL, f"uv=={VERSION}"])


def install_with_system_pip() -> str | None:
    """Let the system's pip write into .uv/ only; some systems have pip but no venv. Return an error or None."""
    return run([sys.executable, *PIP_INSTALL, "--target", str(FOLDER), f"uv=={VERSION}"])


def run(command: list[str]) -> str | None:
    """Run a command. Return None on success, else the last line of its output."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return str(error)
    if result.returncode == 0:
        return None
    lines = result.stdout.strip().splitlines() or ["no output"]
    return lines[-1]


if __name__ == "__main__":
    main()
