"""What training in little memory costs in loss, and, on a CUDA GPU, how much memory it takes.

    uv run python benchmarks/low_memory.py                  # on a CPU, minutes
    uv run python benchmarks/low_memory.py --device cuda    # a card with at least 6 GiB

On a CPU the quickstart's model is trained on the same tokens in three ways: in fp32 with AdamW; in the way of
configs/runs/tinystories-moe-200m-6gb.yaml (bf16 weights, 8-bit Adam, stochastic rounding, recomputed blocks); and so,
but rounding to nearest. Three seeds each, of the weights and of the order of the data; differences are formed between
runs of the same seed. Writes benchmarks/results/low_memory.json.

On a GPU that run itself does some steps, on the built-in stories, with PyTorch's allocator held to what is left of a
card of 6 GiB. Writes benchmarks/results/low_memory_cuda.json.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import NO_BF16, choose_device, circumstances, gpu, invocation, write_result
from benchmarks.moe_vs_dense import seeded
from benchmarks.runs import Corpus, Failed, corpus, last, read_metrics, spread, train
from litmoe.cli import run_door
from litmoe.hardware import cpu_has_bf16
from litmoe.train.gpus import CUDA_CONTEXT, DISPLAY

PACKAGES = ("torch", "torchao", "litgpt", "lightning")
CARD = 6.0
"""GiB. Of these the allocator has no say in what a plan reckons with, too: `DISPLAY` for Windows and the display, and
`CUDA_CONTEXT`, of which `outside_allocator_gib` in the result is what was seen."""
SEEDS = 3


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


def main(device: Literal["cpu", "cuda"] = "cpu", tokens: int = 100_000, steps: int = 4) -> None:
    """Measures and writes the result.

    Args:
        device: cpu compares losses, cuda measures the peak.
        tokens: Of each run on a CPU.
        steps: Of the run on a GPU.
    """
    choose_device(device)
    result = circumstances(invocation("low_memory"), PACKAGES)
    text = corpus(None)
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            result |= measure_peak(Path(folder), steps, text)
    else:
        result |= {"tokens": tokens, "seeds": SEEDS, "ways": compare(tokens, text)}
    write_result(result, ROOT / f"benchmarks/results/low_memory{'' if device == 'cpu' else '_cuda'}.json")
    print(json.dumps(result, indent=1))


def compare(tokens: int, text: Corpus) -> dict[str, Any]:
    """Each way's losses on the same validation tokens, and by how much they exceed those of fp32 with the same seed."""
    ways: dict[str, dict[str, Any]] = {}
    for way, its_flags in WAYS.items():
        if "bf16-true" in its_flags and not cpu_has_bf16():
            ways[way] = {"flags": its_flags, "status": NO_BF16}
            continue
        command = ["--config", "configs/quickstart.yaml", *its_flags, *text.flags, f"--train.max_tokens={tokens}"]
        command += ["--train.log_interval=10", "--eval.max_iters=50", "--eval.interval=1000000", "--sample.prompt=null"]
        command += ["--checkpoint.every_minutes=null"]
        try:
            runs = [train([*command, *seeded(seed)]) for seed in range(SEEDS)]
        except Failed as error:  # 8-bit Adam without a C++ compiler, say
            ways[way] = {"flags": its_flags, "status": str(error)}
            continue
        losses = [last(run.rows, "val_loss") for run in runs]
        ways[way] = {
            "flags": its_flags,
            "status": "measured",
            "val_losses": losses,
            "seconds": round(mean(run.seconds for run in runs), 1),
            "weights_mb": round(runs[0].saved_bytes["lit_model.pth"] / 1e6, 2),
            "optimizer_mb": round(runs[0].saved_bytes["training_state.pth"] / 1e6, 2),
        }
        if exact := ways["fp32, AdamW"].get("val_losses"):
            over = [loss / other - 1 for loss, other in zip(losses, exact, strict=True)]
            ways[way]["loss_over_fp32"] = spread(over)._asdict()
        print(f"{way}: {ways[way]}", flush=True)
    return ways


def measure_peak(folder: Path, steps: int, text: Corpus) -> dict[str, Any]:
    """Trains in this process, for whose allocator the cap counts."""
    import torch

    from litmoe.config import parse_run
    from litmoe.train.allocator import use_expandable_segments
    from litmoe.train.preflight import ready
    from litmoe.train.pretrain import pretrain
    from litmoe.validation import check

    use_expandable_segments(True)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    cap = CARD - DISPLAY - CUDA_CONTEXT
    torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), 0)
    run = parse_run(
        [
            *("--config", str(ROOT / "configs/runs/tinystories-moe-200m-6gb.yaml"), *text.flags, "--devices", "1"),
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
        "tokens_per_second": last(read_metrics(metrics), "tokens_per_second") if fits else None,
    }


if __name__ == "__main__":
    run_door(main)
