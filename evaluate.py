"""Measures a checkpoint: loss, perplexity, bits per byte of its validation text, or its answers to HellaSwag.

    uv run python evaluate.py
    uv run python evaluate.py checkpoints/final --data_dir data/shakespeare
    uv run python evaluate.py checkpoints/step-00000010 --max_iters 20 --json result.json
    uv run python evaluate.py checkpoints/final --hellaswag Rowan/hellaswag
    uv run python evaluate.py checkpoints/final --hellaswag hellaswag_val.jsonl --limit 1000

A table goes to stderr and the same as JSON to stdout. What is counted: recipe/evaluation/loss.py and hellaswag.py.
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
    hellaswag: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] = "auto",
) -> None:
    """Measures a checkpoint: loss, perplexity, bits per byte of its validation text, or its answers to HellaSwag.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/.
        data_dir: Prepared corpus whose validation text is used; without one, the checkpoint's own.
        json_file: Write the JSON to this file too.
        max_iters: Stop after so many batches; without it, every token is used.
        batch_size: Windows at once; without it, as many as give 2^28 logits.
        max_seq_length: Tokens in a window; without it, as many as in training.
        hellaswag: HellaSwag's questions, in place of the text: a file in its JSONL, or a name on the Hub.
        limit: Only the first so many questions.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.
        precision: auto is bf16-mixed on a GPU that computes in it, else 32-true.
    """
    from recipe import checkpoints

    numbers = {"max_iters": max_iters, "batch_size": batch_size, "max_seq_length": max_seq_length, "limit": limit}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more.")
    for_text = {"data_dir": data_dir, "max_iters": max_iters, "batch_size": batch_size}
    other = {"limit": limit} if hellaswag is None else for_text
    if meaningless := [f"--{name}" for name, value in other.items() if value is not None]:
        raise UserError(f"{'without' if hellaswag is None else 'with'} --hellaswag no {', '.join(meaningless)}.")
    folder = checkpoints.resolve(checkpoint)
    print(f"{'The newest checkpoint' if checkpoint is None else 'Checkpoint'}: {folder}", file=sys.stderr)
    from rich.console import Console

    from recipe.evaluation import hellaswag as questions  # takes seconds
    from recipe.evaluation import loss

    if hellaswag is not None:
        score = questions.evaluate(
            folder, hellaswag, limit=limit, max_seq_length=max_seq_length, device=device, precision=precision
        )
        shown, result = questions.table(score), asdict(score)
    else:
        evaluation = loss.evaluate(
            folder,
            data_dir,
            max_iters=max_iters,
            batch_size=batch_size,
            max_seq_length=max_seq_length,
            device=device,
            precision=precision,
        )
        shown, result = loss.table(evaluation), asdict(evaluation)
    Console(stderr=True).print(shown)
    text = json.dumps(result, indent=2)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
