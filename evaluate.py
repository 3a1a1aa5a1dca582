"""Measures how well a checkpoint predicts its validation text: loss, perplexity, bits per byte.

    uv run python evaluate.py
    uv run python evaluate.py checkpoints/final --data_dir data/shakespeare
    uv run python evaluate.py checkpoints/step-00000010 --max_iters 20 --json result.json

A table goes to stderr and the same as JSON to stdout. What is counted: recipe/evaluation/loss.py.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from recipe.cli import UserError, run_door


def main(
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    json_file: Path | None = None,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] = "auto",
) -> None:
    """Measures how well a checkpoint predicts its validation text: loss, perplexity, bits per byte.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/.
        data_dir: Prepared corpus whose validation text is used; without one, the checkpoint's own.
        json_file: Write the JSON to this file too.
        max_iters: Stop after so many batches; without it, every token is used.
        batch_size: Windows at once; without it, as many as give 2^28 logits.
        max_seq_length: Tokens in a window; without it, as many as in training.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.
        precision: auto is bf16-mixed on a GPU that computes in it, else 32-true.
    """
    from recipe import checkpoints

    for name, value in (("max_iters", max_iters), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more.")
    folder = checkpoints.resolve(checkpoint)
    print(f"{'The newest checkpoint' if checkpoint is None else 'Checkpoint'}: {folder}", file=sys.stderr)
    from rich.console import Console

    from recipe.evaluation.loss import evaluate, table  # takes seconds

    result = evaluate(
        folder,
        data_dir,
        max_iters=max_iters,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        device=device,
        precision=precision,
    )
    Console(stderr=True).print(table(result))
    text = json.dumps(asdict(result), indent=2)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
