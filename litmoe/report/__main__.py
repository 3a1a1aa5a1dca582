"""Write the report of a run again, or compare several.

uv run python -m litmoe.report checkpoints/quickstart
uv run python -m litmoe.report checkpoints/a checkpoints/b --out comparison.html
"""

import argparse
from pathlib import Path

from litmoe.cli import exit_with_message
from litmoe.run_files import REPORT_FILE


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m litmoe.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the out_dir of a run")
    parser.add_argument(
        "--out", type=Path, help=f"the page; default: {REPORT_FILE} in the folder of a single run, or in this folder"
    )
    arguments = parser.parse_args(argv)
    is_single = len(arguments.runs) == 1
    path = arguments.out or (arguments.runs[0] / REPORT_FILE if is_single else Path(REPORT_FILE))
    exit_with_message(lambda: _write(arguments.runs, path))


def _write(folders: list[Path], path: Path) -> None:
    # Imported here, so that --help and mistakes in flags are fast.
    from litmoe.report.page import write_report

    write_report(folders, path)
    print(f"Report      {path}")


if __name__ == "__main__":
    main()
