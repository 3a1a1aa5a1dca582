"""Renews the pins in pyproject.toml: the newest versions that fit its dependencies, every package, direct and not.

    make lock

Direct dependencies keep the version written under [project]; edit those by hand first. The pins stand in pyproject.toml
because a uv.lock names one package index in each of its lines and would be useless behind any other.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BEGIN = "# Pins of every package, written by `make lock`, not by hand."
END = "# End of the pins."
SECTION = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}\n", re.DOTALL)


def main() -> None:
    """Rewrites the section between the two marker lines; pyproject.toml stays as it was where anything fails."""
    uv = shutil.which(sys.argv[1] if len(sys.argv) > 1 else "uv")
    if uv is None:
        sys.exit("error: uv was not found; run: make lock")
    uv = str(Path(uv).absolute())
    path = PROJECT / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    if len(SECTION.findall(text)) != 1:
        sys.exit(f"error: {path} does not have exactly one section from the line {BEGIN!r} to the line {END!r}.")
    # In folders of their own, so that no older lock steers the result and an error leaves the project alone.
    packages, pins = resolve(uv, with_pins(text, []))
    new = with_pins(text, pins)
    again, _ = resolve(uv, new)
    if again != packages:
        sys.exit(f"error: the pins do not give the same packages again: {sorted(packages ^ again)}")
    if new == text:
        print(f"All {len(packages)} pins are up to date.")
        return
    path.write_text(new, encoding="utf-8", newline="\n")
    (PROJECT / "uv.lock").unlink(missing_ok=True)  # derived anew from the pins by the next `uv run`
    old = {pin.split(" ;")[0] for pin in tomllib.loads(text)["tool"]["uv"].get("constraint-dependencies", [])}
    for pin in sorted({pin.split(" ;")[0] for pin in pins} ^ old):
        print(("- " if pin in old else "+ ") + pin)
    print(f"{len(pins)} packages pinned in {path}")


def resolve(uv: str, pyproject: str) -> tuple[set[tuple[str, str]], list[str]]:
    """Locks a pyproject.toml by itself.

    Returns:
        the (name, version) pairs of the lock, and one requirement each, with a marker where a name has two versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(pyproject, encoding="utf-8")
        shutil.copy(PROJECT / "README.md", folder)
        export = [
            "export",
            "--all-groups",
            "--no-emit-project",
            "--no-hashes",
            "--no-annotate",
            "--no-header",
            "--quiet",
        ]
        result = subprocess.run([uv, *export], cwd=folder, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        if result.returncode:
            sys.exit("error: uv could not resolve the dependencies; its message stands above.")
        lock = tomllib.loads((Path(folder) / "uv.lock").read_text(encoding="utf-8"))
    packages = {(package["name"], package["version"]) for package in lock["package"] if "registry" in package["source"]}
    pins = [line for line in result.stdout.splitlines() if line]
    versions = Counter(pin.split("==")[0] for pin in pins)
    pins = [pin if versions[pin.split("==")[0]] > 1 else pin.split(" ;")[0] for pin in pins]
    missing = {name for name, _ in packages} - set(versions)
    if missing:
        sys.exit(f"error: locked but not exported, so without a pin: {sorted(missing)}")
    return packages, pins


def with_pins(text: str, pins: list[str]) -> str:
    """The pyproject.toml with its section of pins replaced."""
    lines = "".join(f'  "{pin}",\n' for pin in pins)
    return SECTION.sub(lambda _: f"{BEGIN}\nconstraint-dependencies = [\n{lines}]\n{END}\n", text)


if __name__ == "__main__":
    main()
