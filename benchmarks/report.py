"""Writes docs/PERFORMANCE.md and its plots from benchmarks/results/.

    uv run python benchmarks/report.py

What has not been measured is said to be so; every number and every verdict is computed from the results.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report_layer, report_runs
from benchmarks.common import verdicts

RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
HEAD = """# Performance

Made by `uv run python benchmarks/report.py` from the files of `benchmarks/results/`, which `make bench` and, on a
machine with a GPU, `make bench-gpu` measure: don't edit it by hand. How a thing is measured stands at the top of the
script that its section names. Other measurements (tokenizing, the memory of training, finetuning) stand in the
[README](../README.md#what-was-measured).
"""


def main() -> None:
    """Reads the results, writes the document and its plots, prints what was reached."""
    results = load(RESULTS)
    (DOCS / "PERFORMANCE.md").write_text(document(results), encoding="utf-8", newline="\n")
    for name, result in results.items():
        if name.startswith("moe_layer_"):
            report_layer.plot(result, DOCS / f"{name}.svg")
        elif name.startswith("moe_vs_dense_"):
            report_runs.plot(result, DOCS / f"{name}.svg")
    print("\n".join(targets(results)))


def load(folder: Path) -> dict[str, dict]:
    """The results that the document is made of, by the names of their files."""
    paths = sorted(path for path in folder.glob("*.json") if path.stem in {*report_runs.FILES, *LAYER.values()})
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


LAYER = {device: f"moe_layer_{device}" for device in report_layer.DEVICES}


def of_the_layer(results: dict[str, dict]) -> dict[str, dict]:
    """Those of the layer, by device."""
    return {device: results[name] for device, name in LAYER.items() if name in results}


def document(results: dict[str, dict]) -> str:
    """The whole of docs/PERFORMANCE.md."""
    parts = [HEAD, "## What was to be reached", "", *targets(results), *report_runs.document(results)]
    return "\n".join([*parts, *report_layer.document(of_the_layer(results))]).rstrip("\n") + "\n"


def targets(results: dict[str, dict]) -> list[str]:
    """A table: what was to be reached, what was measured, whether that is enough."""
    return verdicts([*report_runs.targets(results), *report_layer.targets(of_the_layer(results))])


if __name__ == "__main__":
    main()
