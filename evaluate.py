"""Measures a checkpoint: the loss on its validation text, HellaSwag, lm-eval's tasks, or what its experts do.

    uv run python evaluate.py
    uv run python evaluate.py checkpoints/final --data_dir data/shakespeare
    uv run python evaluate.py checkpoints/final --data_dir data/instruct
    uv run python evaluate.py checkpoints/step-00000010 --max_iters 20 --json result.json
    uv run python evaluate.py checkpoints/final --hellaswag Rowan/hellaswag
    uv run python evaluate.py checkpoints/final --hellaswag hellaswag_val.jsonl --limit 1000
    uv run python evaluate.py checkpoints/final --tasks arc_easy,lambada_openai
    uv run python evaluate.py checkpoints/final --tasks mine --tasks_dir my_tasks
    uv run python evaluate.py checkpoints/final --experts --plot experts.png

A table goes to stderr and the same as JSON to stdout. What is counted: the files of litmoe/evaluation say it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from litmoe.cli import UserError, run_door

MEANINGFUL = {
    "the loss": {"data_dir", "max_iters", "batch_size"},
    "--hellaswag": {"limit"},
    "--tasks": {"tasks_dir", "limit", "num_fewshot"},
    "--experts": {"data_dir", "max_iters", "batch_size", "plot"},
}
"""What is measured, and the flags that say something of it alone."""


def main(
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    json_file: Path | None = None,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    hellaswag: str | None = None,
    tasks: str | None = None,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    experts: bool = False,
    plot: Path | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] = "auto",
) -> None:
    """Measures a checkpoint: the loss on its validation text, HellaSwag, lm-eval's tasks, or what its experts do.

    Args:
        checkpoint: The checkpoint folder; without one, the newest whole one under checkpoints/.
        data_dir: Prepared corpus whose validation text is used, or prepared conversations whose answers are; without
            one, what the checkpoint was trained on.
        json_file: Write the JSON to this file too.
        max_iters: Stop after so many batches; without it, every token is used.
        batch_size: Windows at once; without it, as many as give 2^28 logits.
        max_seq_length: Tokens in a window; without it, as many as in training.
        hellaswag: HellaSwag's questions, in place of the text: a file in its JSONL, or a name on the Hub.
        tasks: Tasks or groups of lm-eval by name, separated by commas; their data come from the Hub.
        tasks_dir: A folder of tasks in lm-eval's YAML. Tasks are code: use folders that you trust.
        limit: Only the first so many questions (of each task).
        num_fewshot: Examples before each question of a task; without it, as many as the task says.
        experts: Load, entropy and most telling tokens of each expert, over the text.
        plot: A picture of the experts, .png or .svg.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.
        precision: auto is bf16-mixed on a GPU that computes in it, else 32-true.
    """
    from litmoe import checkpoints

    common: dict[str, Any] = {"max_seq_length": max_seq_length, "device": device, "precision": precision}
    over_text: dict[str, Any] = {"data_dir": data_dir, "max_iters": max_iters, "batch_size": batch_size}
    of_tasks: dict[str, Any] = {"tasks_dir": tasks_dir, "limit": limit, "num_fewshot": num_fewshot}
    given = {"--hellaswag": hellaswag is not None, "--tasks": tasks is not None, "--experts": experts}
    measure = _check(
        given, {**over_text, **of_tasks, "plot": plot, "json_file": json_file, "max_seq_length": max_seq_length}
    )
    folder = checkpoints.resolve(checkpoint)
    print(f"{'The newest checkpoint' if checkpoint is None else 'Checkpoint'}: {folder}", file=sys.stderr)
    from rich.console import Console

    room: Any  # each takes seconds to import
    result: Any
    if measure == "--hellaswag":
        from litmoe.evaluation import hellaswag as room

        result = room.evaluate(folder, hellaswag, limit=limit, **common)
    elif measure == "--tasks":
        from litmoe.evaluation import tasks as room

        result = room.evaluate(folder, [name.strip() for name in str(tasks).split(",")], **of_tasks, **common)
    elif measure == "--experts":
        from litmoe.evaluation import experts as room

        result = room.evaluate(folder, **over_text, **common)
    else:
        from litmoe.evaluation import answers, loss

        conversations = answers.find_conversations(folder, data_dir)
        room = loss if conversations is None else answers
        result = room.evaluate(folder, **over_text | {"data_dir": conversations or data_dir}, **common)
    Console(stderr=True).print(room.table(result))
    text = json.dumps(asdict(result), indent=2)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8", newline="\n")
    if plot is not None:
        room.draw(result, plot)
        print(f"Picture: {plot}", file=sys.stderr)


def _check(given: dict[str, bool], values: dict[str, Any]) -> str:
    """What to measure; raises `UserError` for flags out of range or that mean nothing together."""
    smallest = {"num_fewshot": 0}
    for name, value in values.items():
        if isinstance(value, int) and value < smallest.get(name, 1):
            raise UserError(f"{name} is {value}; expected {smallest.get(name, 1)} or more.")
    asked = [name for name, is_given in given.items() if is_given]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different measures; ask for one at a time.")
    measure = asked[0] if asked else "the loss"
    belongs = {name: [other for other, flags in MEANINGFUL.items() if name in flags] for name in values}
    lost = [name for name, of in belongs.items() if of and measure not in of and values[name] is not None]
    if lost and asked:
        raise UserError(f"with {measure} no {', '.join(f'--{name}' for name in lost)}.")
    if lost:
        raise UserError(f"without {' or '.join(belongs[lost[0]])} no --{lost[0]}.")
    if (picture := values["plot"]) is not None and picture.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {picture}: expected a name that ends in .png or .svg.")
    for name in ("json_file", "plot"):
        if (path := values[name]) is not None and not path.parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {path.parent}.")
    return measure


if __name__ == "__main__":
    run_door(main, optional_positional="checkpoint")
