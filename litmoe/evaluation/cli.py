"""Command line of evaluate.py. Modules that import torch are imported when they are used: ``--help`` must be fast."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from litmoe.cli import UserError
from litmoe.inference.console import find_checkpoint

# The evaluations that use a flag, by the flags that select them.
_USED_BY = {
    "data_dir": ("the loss", "--experts"),
    "max_iters": ("the loss", "--experts"),
    "batch_size": ("the loss", "--experts"),
    "document_masking": ("the loss",),
    "tasks_dir": ("--tasks",),
    "limit": ("--hellaswag", "--tasks"),
    "num_fewshot": ("--tasks",),
    "plot": ("--experts",),
}


def main(
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    json_file: Path | None = None,
    max_iters: int | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    document_masking: bool | None = None,
    hellaswag: str | None = None,
    tasks: str | None = None,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    experts: bool = False,
    plot: Path | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] = "auto",
    router: str | None = None,
) -> None:
    """Evaluate a checkpoint: loss on its validation text, HellaSwag, tasks of lm-eval, or statistics of its experts.

    Args:
        checkpoint: Checkpoint folder. Default: the newest complete one under checkpoints/.
        data_dir: Prepared corpus, or prepared conversations, to evaluate on. Default: the data of the training.
        json_file: Also write the JSON result to this file.
        max_iters: Maximum number of batches. Default: all.
        batch_size: Windows in a batch. Default: as many as give 2^28 logits; 8 for conversations.
        max_seq_length: Tokens in a window. Default: as many as in training.
        document_masking: Whether tokens attend only to their own document, not to others in the window. Default: as in
            training.
        hellaswag: Score HellaSwag: a file in its JSONL format, or a name on the Hub (Rowan/hellaswag).
        tasks: Score tasks or groups of lm-eval, separated by commas. Their data is downloaded from the Hub.
        tasks_dir: Folder of your own tasks in the YAML of lm-eval. Tasks can run code: use only folders you trust.
        limit: Use only the first questions (of each task).
        num_fewshot: Examples before each question of a task. Default: that of the task.
        experts: Show load, entropy and preferred tokens of each expert.
        plot: With --experts, write a heat map of the experts to this .png or .svg file.
        device: cpu, cuda, cuda:1, mps. auto takes a GPU if there is one.
        precision: auto is bf16-mixed on a GPU with bf16 support, else 32-true.
        router: Class path of the --moe.router that the checkpoint was trained with, to import its code.
    """
    selected = {"--hellaswag": hellaswag is not None, "--tasks": tasks is not None, "--experts": experts}
    text_flags: dict[str, Any] = {"data_dir": data_dir, "max_iters": max_iters, "batch_size": batch_size}
    task_flags: dict[str, Any] = {"tasks_dir": tasks_dir, "limit": limit, "num_fewshot": num_fewshot}
    # Mistakes in the flags come before the slow imports.
    other_flags = {"plot": plot, "document_masking": document_masking}
    evaluation = _selected_evaluation(selected, text_flags | task_flags | other_flags)
    _check_values(text_flags | task_flags | {"max_seq_length": max_seq_length}, json_file, plot)
    folder = find_checkpoint(checkpoint, router)

    # Libraries print messages, as lm-eval does about its error bars. Only the JSON belongs on stdout.
    with contextlib.redirect_stdout(sys.stderr):
        # Each import takes seconds, so only the module in use is imported.
        options = {"max_seq_length": max_seq_length, "device": device, "precision": precision, "router": router}
        module: ModuleType
        if evaluation == "--hellaswag":
            from litmoe.evaluation import hellaswag as module

            result = module.evaluate(folder, hellaswag, limit=limit, **options)
        elif evaluation == "--tasks":
            from litmoe.evaluation import tasks as module

            names = [name.strip() for name in str(tasks).split(",")]
            result = module.evaluate(folder, names, **task_flags, **options)
        elif evaluation == "--experts":
            from litmoe.evaluation import experts as module

            result = module.evaluate(folder, **text_flags, **options)
        else:
            from litmoe.evaluation import answers, loss

            # A finetuned checkpoint is evaluated on its answers, unless the user names a corpus.
            conversations = answers.find_conversations(folder, data_dir)
            if conversations is None:
                module = loss
                text_flags["document_masking"] = document_masking
            else:
                if document_masking is not None:
                    raise UserError(
                        "--document_masking has no effect on conversations, which never attend to each other."
                    )
                module = answers
                text_flags["data_dir"] = conversations
            result = module.evaluate(folder, **text_flags, **options)
    # Before the heat map, so that an error there loses no numbers.
    _write(result, module, json_file)
    if plot is not None:
        module.draw(result, plot)
        print(f"Heat map: {plot}", file=sys.stderr)


def _write(result: Any, module: ModuleType, json_file: Path | None) -> None:
    """Print the table to stderr and the JSON to stdout."""
    from rich.console import Console

    Console(stderr=True).print(module.table(result))
    # The table is for people, the JSON for programs, so `> result.json` contains only JSON.
    text = json.dumps(asdict(result), indent=2)
    print(text)
    if json_file is not None:
        # The same bytes on every system.
        json_file.write_text(text + "\n", encoding="utf-8", newline="\n")


def _selected_evaluation(selected: dict[str, bool], values: dict[str, Any]) -> str:
    """Return the evaluation that the user asked for.

    Raises:
        UserError: several evaluations are selected, or a flag has no effect on the selected one.
    """
    evaluation, *others = [name for name, is_selected in selected.items() if is_selected] or ["the loss"]
    if others:
        raise UserError(f"{' and '.join([evaluation, *others])} are different evaluations; use one of them per call.")
    for name, users in _USED_BY.items():
        if values[name] is not None and evaluation not in users:
            raise UserError(f"--{name} has no effect on {evaluation}; it is used by {' and '.join(users)}.")
    return evaluation


def _check_values(numbers: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    """Raise UserError if a number is out of range or an output file can't be written."""
    for name, value in numbers.items():
        # Zero examples are a valid choice.
        smallest = 0 if name == "num_fewshot" else 1
        if isinstance(value, int) and value < smallest:
            raise UserError(f"--{name} is {value}; expected {smallest} or more.")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {plot}; expected a name that ends in .png or .svg.")
    # Before the evaluation, which may take long and would be lost.
    for flag, path in (("--json_file", json_file), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{flag} is {path}, but the folder {path.parent} does not exist.")
