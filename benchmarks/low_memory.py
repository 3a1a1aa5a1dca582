"""What training in little memory costs in loss, and, on a CUDA GPU, how much memory it takes.

    uv run python benchmarks/low_memory.py                  # on a CPU, minutes
    uv run python benchmarks/low_memory.py --device cuda    # a card with at least 6 GiB

On a CPU the quickstart's model is trained three times on the same tokens: in fp32 with AdamW; in the way of
configs/runs/tinystories-moe-200m-6gb.yaml (bf16 weights, 8-bit Adam, stochastic rounding, recomputed blocks); and so,
but rounding to nearest. Writes benchmarks/results/low_memory.json.

On a GPU that run itself does some steps, on the built-in stories, with PyTorch's allocator held to what is left of a
card of 6 GiB. Writes benchmarks/results/low_memory_cuda.json.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances, gpu
from recipe.cli import UserError, run_door

PACKAGES = ("torch", "torchao", "litgpt", "lightning")
CARD, WINDOWS, CONTEXT = 6.0, 0.6, 0.4
"""GiB of the card, and of these what the allocator has no say in: assumed for Windows and the display, and for the CUDA
context and its libraries. Of the latter `outside_allocator_gib` in the result is what was seen."""
STORIES = (
    *("--prepare.source", "sample", "--prepare.tokenizer", "train", "--prepare.vocab_size", "2048"),
    *("--data.init_args.train_data_path", "data/stories/train", "--data.init_args.val_data_path", "data/stories/val"),
    *("--tokenizer_dir", "data/stories/tokenizer"),
)


def low_memory(rounding: bool) -> list[str]:
    """The flags that make the quickstart's run one like the run file's, with the quickstart's own rates."""
    return [
        *("--precision", "bf16-true", "--activation_checkpointing", "block"),
        *("--optimizer", "torchao.optim.AdamW8bit", "--optimizer.init_args.lr", "2.0e-3"),
        *("--optimizer.init_args.betas", "[0.9, 0.95]", "--optimizer.init_args.weight_decay", "0.1"),
        *("--optimizer.init_args.bf16_stochastic_round", str(rounding).lower()),
    ]


WAYS = {
    "fp32, AdamW": [],
    "bf16, 8-bit Adam, rounding by chance": low_memory(True),
    "bf16, 8-bit Adam, rounding to nearest": low_memory(False),
}


def main(device: Literal["cpu", "cuda"] = "cpu", tokens: int = 300_000, steps: int = 4) -> None:
    """Measures and writes the result.

    Args:
        device: cpu compares losses, cuda measures the peak.
        tokens: Of each run on a CPU.
        steps: Of the run on a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU; --device cpu compares the losses.")
    result = circumstances(" ".join(["uv run python benchmarks/low_memory.py", *sys.argv[1:]]), PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        result |= compare(Path(folder), tokens) if device == "cpu" else measure_peak(Path(folder), steps)
    path = ROOT / "benchmarks" / "results" / ("low_memory.json" if device == "cpu" else "low_memory_cuda.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(result, indent=1))


def compare(folder: Path, tokens: int) -> dict[str, Any]:
    """The loss of each way on the same validation tokens."""
    ways: dict[str, dict[str, Any]] = {}
    for index, (way, flags) in enumerate(WAYS.items()):
        out_dir = folder / str(index)
        command = ["run_train.py", "--config", "configs/quickstart.yaml", *flags, "--train.max_tokens", str(tokens)]
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, *command, "--eval.max_iters", "50", "--eval.interval", "1000000"),
                *("--sample.prompt", "null", "--progress", "false", "--out_dir", str(out_dir)),
            ],
            cwd=ROOT,
            check=True,
        )
        ways[way] = {
            "flags": flags,
            "val_loss": last(out_dir / "metrics.csv", "val_loss"),
            "seconds": round(time.perf_counter() - start, 1),
            "weights_mb": round((out_dir / "final" / "lit_model.pth").stat().st_size / 1e6, 2),
            "optimizer_mb": round((out_dir / "final" / "training_state.pth").stat().st_size / 1e6, 2),
        }
        ways[way]["loss_over_fp32"] = round(ways[way]["val_loss"] / ways["fp32, AdamW"]["val_loss"] - 1, 4)
    return {"tokens": tokens, "ways": ways}


def measure_peak(folder: Path, steps: int) -> dict[str, Any]:
    """Trains in this process, for whose allocator the cap counts."""
    import torch

    from recipe.settings import check, parse_run
    from recipe.training.allocator import use_expandable_segments
    from recipe.training.pretrain import pretrain
    from recipe.training.ready import ready

    use_expandable_segments(True)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    cap = CARD - WINDOWS - CONTEXT
    torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), 0)
    run = parse_run(
        [
            *("--config", str(ROOT / "configs/runs/tinystories-moe-200m-6gb.yaml"), *STORIES, "--devices", "1"),
            *("--train.max_steps", str(steps), "--train.log_interval", "1", "--eval.max_iters", "2"),
            *("--out_dir", str(folder / "run"), "--progress", "false"),
        ]
    )
    check(run.settings, run.optimizer)
    fits = True
    try:
        pretrain(ready(run)[0], resume_from=None)
    except torch.cuda.OutOfMemoryError as error:
        fits = False
        print(error)
    free, _ = torch.cuda.mem_get_info()
    metrics = folder / "run" / "metrics.csv"
    return {
        "gpu": gpu(),
        "model": run.settings.model.name,
        "context": run.settings.train.max_seq_length,
        "steps": steps,
        "card_gib": CARD,
        "cap_gib": cap,
        "fits": fits,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "outside_allocator_gib": round(total - (free + torch.cuda.memory_reserved()) / 2**30, 3),
        "tokens_per_second": last(metrics, "tokens_per_second") if fits else None,
    }


def last(metrics: Path, column: str) -> float:
    """The last value of a column of a run's log."""
    with open(metrics, encoding="utf-8", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]][-1]


if __name__ == "__main__":
    run_door(main)
