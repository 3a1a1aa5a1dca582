"""Finds uv, or puts it into this project's .uv/ folder, and prints where it is.

    python3 scripts/get_uv.py

Uses Python's venv, else its pip, else the index that PIP_INDEX_URL names. Nothing outside the project is written, so it
also works where pip may not touch the system's Python (PEP 668).
"""

import hashlib
import html
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

VERSION = "0.13.8"
FOLDER = Path(__file__).resolve().parent.parent / ".uv"
NAME = "uv.exe" if os.name == "nt" else "uv"


def main() -> None:
    """Prints the path of uv, found or installed; exits with 1 and one message where it cannot be had."""
    found = find()
    if found is None:
        print(f"uv is not on the PATH; putting uv {VERSION} into {FOLDER}", file=sys.stderr)
        reasons = []
        for way in (by_venv, by_pip, by_download):
            shutil.rmtree(FOLDER, ignore_errors=True)  # what a failed way left behind
            try:
                way()
            except (OSError, RuntimeError, ValueError) as error:
                reasons.append(f"  {way.__name__[3:]}: {error}")
            found = find()
            if found is not None:
                break
        else:
            shutil.rmtree(FOLDER, ignore_errors=True)
            sys.exit(
                "error: could not get uv:\n" + "\n".join(reasons) + "\nInstall it by hand "
                "(https://docs.astral.sh/uv/getting-started/installation/), or mend the network, and run this again."
            )
    print(found)


def find() -> str | None:
    """The path of a uv that runs: the PATH's, else the project's own; None where there is neither."""
    candidates = [shutil.which("uv"), *(str(FOLDER / place / NAME) for place in ("bin", "Scripts"))]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            try:
                subprocess.run([candidate, "--version"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue  # such as a binary of another platform in a copied folder
            return candidate
    return None


def by_venv() -> None:
    """A virtual environment of its own in .uv/, and pip inside it."""
    run([sys.executable, "-m", "venv", str(FOLDER)])
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"uv=={VERSION}"])


def by_pip() -> None:
    """The system's pip, told to write into .uv/ alone (allowed even where the system's Python is closed to it)."""
    target = ["--target", str(FOLDER), f"uv=={VERSION}"]
    run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *target])


def by_download() -> None:
    """uv's wheel, straight from the index that the environment names, checked against its hash, without pip."""
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX")
    if not index:
        raise RuntimeError("neither PIP_INDEX_URL nor UV_DEFAULT_INDEX names a package index")
    page_url = index.rstrip("/") + "/uv/"
    page = fetch(page_url).decode()
    for href in re.findall(r'href="([^"]+)"', page):
        url, _, fragment = html.unescape(href).partition("#")
        name = urllib.parse.unquote(url.rsplit("/", 1)[-1])
        if name.startswith(f"uv-{VERSION}-") and name.endswith(".whl") and all(tag in name for tag in wheel_tags()):
            wheel = fetch(urllib.parse.urljoin(page_url, url))
            if fragment != "sha256=" + hashlib.sha256(wheel).hexdigest():
                raise RuntimeError(f"{name} from {index} does not have the hash that the index names")
            break
    else:
        raise RuntimeError(f"{index} has no wheel of uv {VERSION} for {platform.system()} {platform.machine()}")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        entry = next(name for name in archive.namelist() if name.endswith(f"/scripts/{NAME}"))
        binary = FOLDER / "bin" / NAME
        binary.parent.mkdir(parents=True)
        binary.write_bytes(archive.read(entry))
    binary.chmod(0o755)


def wheel_tags() -> tuple[str, str]:
    """Two parts that the name of uv's wheel for this machine has: system and processor."""
    machine = platform.machine().lower()
    if os.name == "nt":
        return "win_", machine
    machine = {"amd64": "x86_64"}.get(machine, machine)
    if sys.platform == "darwin":
        return "macosx_", machine
    return "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux", machine


def run(command: list[str]) -> None:
    """Runs a command and raises RuntimeError with the last line of its output where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError((result.stdout.strip().splitlines() or ["no output"])[-1])


def fetch(url: str) -> bytes:
    """The body of a page or file."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return bytes(response.read())


if __name__ == "__main__":
    main()
