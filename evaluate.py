"""Evaluate a checkpoint: loss on its validation text, HellaSwag, tasks of lm-eval, or statistics of its experts.

    uv run python evaluate.py
    uv run python evaluate.py checkpoints/final --data_dir data/shakespeare
    uv run python evaluate.py checkpoints/final --data_dir data/instruct
    uv run python evaluate.py checkpoints/step-00000010 --max_iters 20 --json_file result.json
    uv run python evaluate.py checkpoints/final --hellaswag Rowan/hellaswag
    uv run python evaluate.py checkpoints/final --hellaswag hellaswag_val.jsonl --limit 1000
    uv run python evaluate.py checkpoints/final --tasks arc_easy,lambada_openai
    uv run python evaluate.py checkpoints/final --tasks mine --tasks_dir my_tasks
    uv run python evaluate.py checkpoints/final --experts --plot experts.png

A table goes to stderr, and the same as JSON to stdout. The files in litmoe/evaluation define the numbers.
"""

from litmoe.cli import run_cli
from litmoe.evaluation.cli import main

if __name__ == "__main__":
    run_cli(main, optional_positional="checkpoint")
