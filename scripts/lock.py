"""Update the version pins in pyproject.toml and write requirements.txt with hashes.

    make lock
    python scripts/lock.py uv --keep-pins     # write requirements.txt only, from today's pins

Direct dependencies keep the version written under [project]; edit those first. Every other package gets the newest
version that fits. The pins are stored in pyproject.toml and not in a committed uv.lock, because each line of a uv.lock
names one package index and would be useless behind another one. requirements.txt contains no index address.
"""

import argparse
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
PIN_SECTION = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}\n", re.DOTALL)
REQUIREMENTS_HEADER = """\
# Written by `make lock`: the packages that uv installs, for users of pip (without the development tools).
#   pip install -r requirements.txt
"""


def main() -> None:
    """Rewrite the pins and requirements.txt. On an error both files keep their content."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uv", nargs="?", default="uv", help="path of uv (default: the one on the PATH)")
    parser.add_argument("--keep-pins", action="store_true", help="leave pyproject.toml as it is")
    args = parser.parse_args()
    uv = shutil.which(args.uv)
    if uv is None:
        sys.exit("error: uv was not found. Run: make lock")
    uv = str(Path(uv).absolute())
    pyproject = PROJECT / "pyproject.toml"
    old_text = pyproject.read_text(encoding="utf-8")
    if len(PIN_SECTION.findall(old_text)) != 1:
        sys.exit(f"error: expected exactly one section from the line {BEGIN!r} to the line {END!r} in {pyproject}.")

    new_text = old_text if args.keep_pins else update_pins(uv, old_text)
    # Users of pip do not need the development tools.
    requirements = REQUIREMENTS_HEADER + export(uv, new_text, "--no-dev")

    # Write last: an error above leaves both files unchanged.
    pyproject.write_text(new_text, encoding="utf-8", newline="\n")
    (PROJECT / "requirements.txt").write_text(requirements, encoding="utf-8", newline="\n")
    (PROJECT / "uv.lock").unlink(missing_ok=True)  # the next `uv run` derives it from the new pins
    show_changes(old_text, new_text)


def update_pins(uv: str, old_text: str) -> str:
    """Return the text of pyproject.toml with the newest pins.

    The first resolution ignores the old pins, so that they do not hold back newer versions. The second one uses the new
    pins: a user who has only pyproject.toml must get the same packages.
    """
    pins = resolve_pins(uv, with_pins(old_text, []))
    new_text = with_pins(old_text, pins)
    if resolve_pins(uv, new_text) != pins:
        sys.exit("error: resolving with the new pins gives other packages. Nothing was changed; run make lock again.")
    return new_text


def resolve_pins(uv: str, pyproject_text: str) -> list[str]:
    """Return one requirement per package; with a marker only where the version depends on the Python version."""
    # A package may have several lines, for example one per Python version.
    lines = export(uv, pyproject_text, "--all-groups", "--no-hashes").splitlines()
    versions_per_package = Counter(line.split("==")[0] for line in lines)
    pins = []
    for line in lines:
        requirement, _, _ = line.partition(" ;")
        has_one_version = versions_per_package[line.split("==")[0]] == 1
        pins.append(requirement if has_one_version else line)
    return pins


def export(uv: str, pyproject_text: str, *options: str) -> str:
    """Resolve a pyproject.toml in an empty folder, where no older uv.lock influences the result.

    Returns:
        The requirements, one per line (with hashes: followed by indented lines).
    """
    command = [uv, "export", "--format", "requirements-txt", "--no-emit-project", "--no-annotate", "--no-header"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(pyproject_text, encoding="utf-8")
        shutil.copy(PROJECT / "README.md", folder)  # pyproject.toml refers to it
        result = subprocess.run(
            [*command, "--quiet", *options], cwd=folder, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
    if result.returncode != 0:
        sys.exit("error: uv could not resolve the dependencies; its message is above. Nothing was changed.")
    return result.stdout


def with_pins(pyproject_text: str, pins: list[str]) -> str:
    """Return the text of pyproject.toml with its pin section replaced."""
    # One pin per line, so that a diff shows each change.
    pin_lines = "".join(f'  "{pin}",\n' for pin in pins)
    section = f"{BEGIN}\nconstraint-dependencies = [\n{pin_lines}]\n{END}\n"
    return PIN_SECTION.sub(lambda _: section, pyproject_text)


def show_changes(old_text: str, new_text: str) -> None:
    """Print the removed pins with a minus and the added ones with a plus."""
    old, new = (set(tomllib.loads(text)["tool"]["uv"]["constraint-dependencies"]) for text in (old_text, new_text))
    for pin in sorted(old ^ new):
        print(f"{'-' if pin in old else '+'} {pin}")
    print(f"{len(new)} packages are pinned, {len(new - old)} of them changed.")


if __name__ == "__main__":
    main()
