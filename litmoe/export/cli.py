"""Command line of export_hf.py. Modules that import torch are imported when they are used: ``--help`` must be fast."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

# Not imported when the program runs: the module imports torch.
if TYPE_CHECKING:
    from litmoe.export.verify import Check


def main(
    checkpoint: Path, out: Path, dtype: Literal["float32", "bfloat16", "float16"] | None = None, push: str | None = None
) -> None:
    """Export a checkpoint to a Hugging Face folder. With --import HF_FOLDER OUT, import such a folder.

    Args:
        checkpoint: Checkpoint folder.
        out: Folder to write; it must not exist.
        dtype: Type of the exported weights. Default: unchanged.
        push: Upload to this repository of the Hub, ORG/NAME. A new repository is private.
    """
    from litmoe.export import huggingface  # takes seconds

    if push is not None:
        # Before the export, which takes longer.
        huggingface.check_can_push(push)
    _print_checks(huggingface.export(checkpoint, out, dtype=dtype, title=push), out)
    if push is not None:
        print(f"Uploaded to {huggingface.push(out, push)}")


def import_folder(hf_folder: Path, out: Path) -> None:
    """Import a local Hugging Face folder as a checkpoint: Mixtral, Llama, Pythia (GPT-NeoX) and related models.

    Args:
        hf_folder: Folder with config.json, weights and tokenizer.
        out: Checkpoint folder to write; it must not exist.
    """
    from litmoe.checkpoints import load_config
    from litmoe.export import importing  # takes seconds
    from litmoe.validation import constant_weights_note

    _print_checks(importing.import_folder(hf_folder, out), out)
    note = constant_weights_note(load_config(out))
    if note:
        print(note)


def _print_checks(checks: "list[Check]", out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(f"{out}: verified"))
    for check in checks:
        table.add_row(*map(escape, check))
    Console().print(table)
