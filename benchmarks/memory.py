"""Works out the memory that training needs at 12, 24 and 48 layers, dense and as a mixture of experts.

    uv run python benchmarks/memory.py
    uv run python benchmarks/memory.py --device cuda     # the plan of whole runs against what a card allocates

Without a card nothing is measured: the steps run on tensors without contents (litmoe/train/memory.py), with the
kernels of an A100. Writes benchmarks/results/memory.json and prints the README's table; with a card, memory_cuda.json.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
from litgpt import GPT
from torch.func import functional_call

from benchmarks.common import choose_device, circumstances, gpu
from custom_moe import use_custom_moe
from custom_moe.backends import Hardware, hardware_of
from litmoe.config import ParsedRun, parse_run
from litmoe.flops import count_parameters
from litmoe.layers import use_fast_layers
from litmoe.train.memory import training_memory
from litmoe.train.model import PretrainingModel, cast_matrices, matrices_to_cast
from litmoe.train.optimizers import make_optimizer

RESULT = ROOT / "benchmarks/results/memory.json"
RUNS = ("fineweb-edu-gpt2-124m", "fineweb-edu-gpt2-moe")
LAYERS = (12, 24, 48)
MICRO_BATCHES = (1, 16)
A100 = Hardware((8, 0), triton=True)

CHECKPOINTING = tuple(("--activation_checkpointing", kind) for kind in ("none", "moe", "block"))
EIGHT_BIT = ("--precision", "bf16-true", "--optimizer.class_path", "torchao.optim.AdamW8bit")
ON_A_CARD = (
    ("tinystories-moe-200m", *CHECKPOINTING[0]),
    ("tinystories-moe-200m", *CHECKPOINTING[1]),
    ("tinystories-moe-200m", *CHECKPOINTING[2]),
    ("tinystories-moe-200m", "--precision", "bf16-true"),
    ("tinystories-moe-200m", *EIGHT_BIT),
    ("fineweb-edu-gpt2-124m", "--micro-batch-size", "4"),
    ("fineweb-edu-gpt2-124m", "--precision", "32-true", "--micro-batch-size", "1"),
    ("fineweb-edu-gpt2-moe", "--micro-batch-size", "4"),
)
"""Run files and flags that are held against a card's allocator"""


def main() -> None:
    """Works out or measures each row, writes them, and prints them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if parser.parse_args().device == "cuda":
        choose_device("cuda")
        rows = [against_a_card(name, *flags) for name, *flags in ON_A_CARD]
        how, text = "plan against torch.cuda.max_memory_allocated, not compiled", comparison(rows)
        command, file = "python benchmarks/memory.py --device cuda", RESULT.with_name("memory_cuda.json")
    else:
        rows = [row(name, layers, size) for name in RUNS for layers in LAYERS for size in MICRO_BATCHES]
        how = "worked out on fake tensors, not measured on a GPU; without the CUDA context and the allocator's gaps"
        text, command, file = table(rows), "python benchmarks/memory.py", RESULT
    result = {**circumstances(command, ("torch", "litgpt", "lightning")), "how": how, "rows": rows}
    result["hardware"]["gpu"] = gpu() if file != RESULT else None
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(text)


def read(name: str, *flags: str) -> ParsedRun:
    """A shipped run, which accumulates over more than one micro batch."""
    return parse_run(["--config", str(ROOT / f"configs/runs/{name}.yaml"), *flags])


def row(name: str, layers: int, micro_batch_size: int) -> dict[str, object]:
    """A run's model at another depth: its size, and the bytes that a step needs."""
    run = read(name, f"--model.n_layer={layers}", f"--micro-batch-size={micro_batch_size}")
    settings = run.settings
    sizes = count_parameters(settings.model, tie_embeddings=bool(settings.train.tie_embeddings))
    memory = training_memory(run, settings.precision or "bf16-mixed", A100)
    return {
        "run": f"configs/runs/{name}.yaml",
        "n_layer": layers,
        "total_parameters": sizes.total,
        "active_parameters": sizes.active,
        "micro_batch_size": micro_batch_size,
        "max_seq_length": settings.train.max_seq_length,
        "precision": settings.precision,
        "optimizer_class": run.optimizer["class_path"],
        **memory._asdict(),
        "peak": memory.peak,
    }


def against_a_card(name: str, *flags: str) -> dict[str, object]:
    """The bytes of a real step's peak on the card of this machine, and those of its plan."""
    run = read(name, *flags)
    settings, train = run.settings, run.settings.train
    precision = settings.precision or "bf16-mixed"
    fabric = L.Fabric(accelerator="cuda", devices=1, precision=precision)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with use_custom_moe(), use_fast_layers(), fabric.init_module():
        gpt = GPT(settings.model)
    gpt.max_seq_length = train.max_seq_length or settings.model.block_size
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    checkpointing = settings.activation_checkpointing
    model = fabric.setup(PretrainingModel(gpt, checkpointing))
    optimizer = make_optimizer(run.optimizer, model, fused=True)
    tokens = torch.randint(50257, (train.micro_batch_size, gpt.max_seq_length), device=fabric.device)
    for _ in range(3):  # each as litmoe.train.loop.fit does it
        weights = cast_matrices(matrices_to_cast(model, precision, checkpointing), precision)
        for _ in range(min(2, train.gradient_accumulation_iters(1))):
            losses = functional_call(model, weights, (tokens, tokens), tie_weights=False)
            fabric.backward(losses.cross_entropy + losses.load_balancing + losses.z_loss)
            del losses
        del weights
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated()
    planned = training_memory(run, precision, hardware_of(fabric.device))
    return {
        "run": f"configs/runs/{name}.yaml",
        "flags": " ".join(flags),
        "measured": measured,
        "reserved": torch.cuda.max_memory_reserved(),
        "peak": planned.peak,
        **planned._asdict(),
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


def comparison(rows: list[dict]) -> str:
    """One line for each run; GiB."""
    lines = ["| run | flags | plan | allocated | plan / allocated | reserved |", "|---|---|---|---|---|---|"]
    for found in rows:
        plan, measured, reserved = (found[name] / 2**30 for name in ("peak", "measured", "reserved"))
        lines.append(
            f"| `{found['run']}` | `{found['flags']}` | {plan:.2f} GiB | {measured:.2f} GiB | {plan / measured:.3f}"
            f" | {reserved:.2f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
