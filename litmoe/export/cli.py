"""Command lines of export_hf.py and export_gguf.py.

Modules that import torch are imported when they are used: ``--help`` must be fast.
"""

import re
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


def export_gguf(checkpoint: Path, out: Path, quantize: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16") -> None:
    """Export a checkpoint to a GGUF file for llama.cpp, Ollama and LM Studio, with a Modelfile for Ollama.

    Args:
        checkpoint: Checkpoint folder.
        out: File to write, FOLDER/NAME.gguf; it must not exist.
        quantize: Type of the matrices; q8_0 has 8.5 bits per weight, q4_0 has 4.5. For K-quants such as Q4_K_M run
            llama.cpp's own tool on an f32 or f16 file: `llama-quantize NAME.gguf OUT.gguf Q4_K_M`.
    """
    from litmoe.cli import quoted
    from litmoe.export import gguf  # takes seconds

    exported = gguf.export(checkpoint, out, quantization=quantize)
    _print_checks(exported.checks, out)
    # Ollama allows these characters in the name of a model.
    name = re.sub(r"[^a-z0-9._-]+", "-", out.stem.lower()).strip(".-_") or "model"
    print(f"Ollama      ollama create {name} -f {quoted(exported.modelfile)}")
    print(f"            ollama run {name}")


def _print_checks(checks: "list[Check]", out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(f"{out}: verified"))
    for check in checks:
        table.add_row(*map(escape, check))
    Console().print(table)
