"""Writes a checkpoint as a Hugging Face folder that `transformers` loads without custom code; brings such a folder in.

    uv run python export_hf.py checkpoints/final exported/
    uv run python export_hf.py checkpoints/final exported/ --dtype bfloat16
    uv run python export_hf.py checkpoints/final exported/ --push ORG/NAME
    uv run python export_hf.py --import HF_FOLDER checkpoints/imported

Both models are run and compared before anything is moved into place. What goes where: litmoe/export/huggingface.py.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litmoe.cli import run_door

if TYPE_CHECKING:
    from litmoe.export.verify import Check


def main(
    checkpoint: Path, out: Path, dtype: Literal["float32", "bfloat16", "float16"] | None = None, push: str | None = None
) -> None:
    """Writes a checkpoint as a Hugging Face folder; with --import HF_FOLDER OUT it makes a checkpoint of such a folder.

    Args:
        checkpoint: The checkpoint folder.
        out: The folder to write, which must not be there yet.
        dtype: Type of the weights written; without it, as they are.
        push: Upload to this repository of the Hub, ORG/NAME; a new one is private.
    """
    from litmoe.export import huggingface  # takes seconds

    if push is not None:
        huggingface.check_can_push(push)
    show(huggingface.export(checkpoint, out, dtype=dtype, title=push), out)
    if push is not None:
        print(f"Uploaded to {huggingface.push(out, push)}")


def import_folder(hf_folder: Path, out: Path) -> None:
    """Makes a checkpoint of a Hugging Face folder on this disk: Mixtral, Llama, Pythia (GPT-NeoX) and their relatives.

    Args:
        hf_folder: The folder with config.json, weights and tokenizer.
        out: The checkpoint folder to write, which must not be there yet.
    """
    from litmoe.checkpoints import load_config
    from litmoe.export import huggingface  # takes seconds
    from litmoe.validation import constant_weights_note

    show(huggingface.import_folder(hf_folder, out), out)
    if note := constant_weights_note(load_config(out)):
        print(note)


def show(checks: "list[Check]", out: Path) -> None:
    """Prints what was verified."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(f"{out}: verified"))
    for check in checks:
        table.add_row(*map(escape, check))
    Console().print(table)


if __name__ == "__main__":
    words = [word for argument in sys.argv[1:] for word in argument.split("=", argument.startswith("--import="))]
    run_door(import_folder if "--import" in words else main, [word for word in words if word != "--import"])
