"""Put the tables of benchmarks/results/ into the documents.

    uv run python benchmarks/report.py      # after a measurement; a test fails if a document is outdated

A table is inserted between the lines `<!-- begin:NAME -->` and `<!-- end:NAME -->` of README.md and docs/*.md. NAME is
a result file (`generation_cpu`), `results` for the overview of all benchmarks, or `measurements` for the list of all
result files. The text around the markers is written by hand. A new benchmark needs no change here: it stores its
`table`, and for the overview a `headline`, in its result file.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, Row, make_table, markdown

# The name must be the same in both markers.
MARKERS = re.compile(r"(<!-- begin:([\w.-]+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
# The overview starts with these files; the others follow by name.
FIRST = ("quickstart", "data_prep", "train_step", "moe_layer", "generation")
Results = dict[str, Row]  # the result files by name, without .json


def main() -> None:
    results = load_results(RESULTS)
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = insert_tables(old, results)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"Updated {path.relative_to(ROOT)}")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load_results(folder: Path) -> Results:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def insert_tables(text: str, results: Results) -> str:
    """Return a document with new content between all markers."""

    def replace(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        lines = "\n".join(lines_of(name, results))
        return f"{begin}{lines}\n{end}"

    return MARKERS.sub(replace, text)


def lines_of(name: str, results: Results) -> list[str]:
    """Return the lines between the markers of one name."""
    if name == "results":
        return overview(results)
    if name == "measurements":
        return measurements(results)
    if name in results:
        return markdown(results[name]["table"])
    # Not everybody has a GPU. Any other name without a result is a typing mistake.
    if name.endswith("_cuda"):
        return ["Not measured yet."]
    sys.exit(f"error: found a marker for {name!r}, but no result of this name. Results: {', '.join(results)}.")


def overview(results: Results) -> list[str]:
    """The headlines of all benchmarks."""
    # Results without a headline (a detail, or a script that was removed) are only in the list of measurements.
    first = [name for prefix in FIRST for name in sorted(results) if name.startswith(prefix)]
    rows = []
    for name in dict.fromkeys([*first, *sorted(results)]):
        for what, number in results[name].get("headline", []):
            rows.append([what, number, hardware(results[name])])
    return markdown(make_table(("what", "result", "hardware"), rows))


def measurements(results: Results) -> list[str]:
    """Where and when each result was measured, and with which command."""
    rows = []
    for name, result in results.items():
        link = f"[{name}](../benchmarks/results/{name}.json)"
        command = result["command"].removeprefix("uv run ")
        rows.append([link, hardware(result), result["date"][:10], f"`{result['commit']}`", f"`{command}`"])
    return markdown(make_table(("result", "hardware", "date", "commit", "command"), rows))


def hardware(result: Row) -> str:
    """Name the hardware of a result."""
    hardware = result["hardware"]
    return hardware["gpu"]["name"] if hardware.get("gpu") else f"{hardware['cpu']}, {hardware['cores']} cores"


if __name__ == "__main__":
    main()
