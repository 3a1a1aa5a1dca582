"""Works out the memory that training needs at 12, 24 and 48 layers, dense and as a mixture of experts.

    uv run python benchmarks/memory.py

Nothing is measured here: the steps run on tensors without contents (recipe/training/memory.py). Writes
benchmarks/results/memory.json and prints the README's table.
"""

import json
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from litgpt import Config

from benchmarks.common import circumstances
from recipe.flops import count_parameters
from recipe.settings import parse_run
from recipe.training.memory import training_memory

RESULT = ROOT / "benchmarks/results/memory.json"
RUNS = ("fineweb-edu-gpt2-124m", "fineweb-edu-gpt2-moe")
LAYERS = (12, 24, 48)
MICRO_BATCHES = (1, 16)


def main() -> None:
    """Works out each row, writes them, and prints them as a table."""
    logging.disable(logging.INFO)  # Fabric tells of each precision that it sets up
    rows = [
        row(f"configs/runs/{name}.yaml", layers, micro_batch)
        for name in RUNS
        for layers in LAYERS
        for micro_batch in MICRO_BATCHES
    ]
    result = {
        **circumstances("python benchmarks/memory.py", ("torch", "litgpt", "lightning")),
        "how": "worked out on fake tensors, not measured on a GPU; without the CUDA context and the allocator's gaps",
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(table(rows))


def row(run_file: str, layers: int, micro_batch_size: int) -> dict[str, object]:
    """A run's model at another depth: its size, and the bytes that a step needs."""
    run = parse_run(["--config", str(ROOT / run_file)])
    train = run.settings.train
    config: Config = replace(run.settings.model, n_layer=layers)
    tied = bool(train.tie_embeddings)
    sizes = count_parameters(config, tie_embeddings=tied)
    memory = training_memory(
        config,
        optimizer=run.optimizer,
        micro_batch_size=micro_batch_size,
        seq_length=train.max_seq_length or config.block_size,
        precision=run.settings.precision or "bf16-mixed",
        tie_embeddings=tied,
    )
    return {
        "run": run_file,
        "n_layer": layers,
        "total_parameters": sizes.total,
        "active_parameters": sizes.active,
        "micro_batch_size": micro_batch_size,
        "max_seq_length": train.max_seq_length,
        "precision": run.settings.precision,
        "optimizer_class": run.optimizer["class_path"],
        **asdict(memory),
        "peak": memory.peak,
    }


def table(rows: list[dict]) -> str:
    """One line for each model and depth; GiB."""
    lines = [
        "| model | layers | parameters / active | weights, gradients, AdamW | peak, micro batch 1 | micro batch 16 |",
        "|---|---|---|---|---|---|",
    ]
    for one, many in zip(rows[::2], rows[1::2], strict=True):
        kept = (one["weights"] + one["gradients"] + one["optimizer"]) / 2**30
        lines.append(
            f"| {'MoE' if one['active_parameters'] < one['total_parameters'] else 'dense'} | {one['n_layer']} "
            f"| {one['total_parameters'] / 1e6:,.1f} M / {one['active_parameters'] / 1e6:,.1f} M "
            f"| {kept:.1f} GiB | {one['peak'] / 2**30:.1f} GiB | {many['peak'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
