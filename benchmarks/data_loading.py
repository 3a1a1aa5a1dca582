"""How fast the reader gives batches, and whether a training step waits for it, with 0, 1 and 2 worker processes.

    uv run python benchmarks/data_loading.py                     # against the steps of results/train_step_cpu.json
    uv run python benchmarks/data_loading.py --device cuda       # on the machine of the GPU

Writes benchmarks/results/data_loading_DEVICE.json; benchmarks/report.py makes the table of docs/PERFORMANCE.md.

The batches come from TokenizedText's own loader, through the training loop's way from a batch to inputs and targets.
First alone, as fast as they come: one pass, without its first batch, whose seconds (of starting the workers) stand
beside it. Then, where the speed of the steps was measured on this device, with pauses in the place of steps: what the
loop waits is the time in the loader, as a share of all. The pauses keep this thread busy, as a CPU's steps do, and the
wait for a GPU: after a sleep a virtual machine takes three times as long for a batch.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt.utils import CycleIterator

from benchmarks.common import choose_device, circumstances, gpu, invocation, write_result
from benchmarks.runs import Corpus, corpus
from litmoe.data import TokenizedText
from litmoe.train.model import as_batch

PACKAGES = ("torch", "litgpt", "lightning")
WORKERS = (0, 1, 2)
PASSES = 3
STEPS_SECONDS = 4.0


@dataclass(frozen=True)
class Shape:
    """The batches of a run."""

    model: str
    context: int
    micro_batch: int
    target: float | None
    """Tokens per second that its steps are to reach, where no measurement is there"""
    workers: int
    """Of its run file"""


SHAPES = {
    "cpu": [Shape("quickstart", 256, 4, None, 0), Shape("moe-200m", 2048, 8, 310_000, 2)],
    "cuda": [Shape("moe-200m", 2048, 8, 310_000, 2), Shape("gpt2-124m", 1024, 16, 445_000, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--data-dir", type=Path, help="a prepared corpus; the quickstart's when left away")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/data_loading_DEVICE.json")
    args = parser.parse_args()
    choose_device(args.device)
    result = circumstances(invocation("data_loading"), PACKAGES)
    result["hardware"] |= {"threads": torch.get_num_threads(), "gpu": gpu() if args.device == "cuda" else None}
    measured = ROOT / f"benchmarks/results/train_step_{args.device}.json"
    steps = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
    text, started = corpus(args.data_dir), time.perf_counter()
    rows = []
    for shape in SHAPES[args.device]:
        need, source = needed(shape, steps)
        for workers in WORKERS:
            row = {"model": shape.model, "context": shape.context, "micro_batch": shape.micro_batch, "workers": workers}
            row["shipped"] = workers == shape.workers
            rows.append(row | alone(shape, workers, text) | {"needed": need, "needed_by": source})
            if need and source == "measured":
                rows[-1]["waiting"] = round(waiting(shape, workers, text, need, STEPS_SECONDS), 5)
            print(rows[-1], flush=True)
    output = args.output or ROOT / f"benchmarks/results/data_loading_{args.device}.json"
    seconds = round(time.perf_counter() - started, 1)
    write_result(result | {"device": args.device, "seconds": seconds, "rows": rows}, output)


def needed(shape: Shape, steps: dict[str, Any] | None) -> tuple[float | None, str]:
    """Tokens per second that the steps take, and whether that was measured."""
    model = (steps or {}).get("models", {}).get(shape.model, {})
    if speed := model.get("summary", {}).get("ours", {}).get("tokens_per_second"):
        return speed[2], "measured"  # the fastest round's
    return shape.target, "target"


def loader(shape: Shape, workers: int, text: Corpus) -> Any:
    """The training batches, as a run reads them."""
    data = TokenizedText(text.data_dir / "train", text.data_dir / "val", num_workers=workers)
    data.connect(batch_size=shape.micro_batch, max_seq_length=shape.context)
    return data.train_dataloader()


def alone(shape: Shape, workers: int, text: Corpus) -> dict[str, float]:
    """Tokens per second of a pass, and the seconds until its first batch: medians."""
    batches, rates, firsts = loader(shape, workers, text), [], []
    for _ in range(PASSES):
        start = time.perf_counter()
        one_pass = iter(batches)
        next(one_pass)
        first = time.perf_counter()
        tokens = sum(as_batch(batch, shape.context).input_ids.numel() for batch in one_pass)
        rates.append(tokens / (time.perf_counter() - first))
        firsts.append(first - start)
    return {"tokens_per_second": round(median(rates)), "first_batch_seconds": round(median(firsts), 4)}


def waiting(shape: Shape, workers: int, text: Corpus, need: float, seconds: float) -> float:
    """The share of its time that a loop waits whose micro batches take as long as ``need`` tokens per second say."""
    pause = shape.context * shape.micro_batch / need
    batches, waited = CycleIterator(loader(shape, workers, text)), 0.0
    as_batch(next(batches), shape.context)  # the workers run
    start = time.perf_counter()
    for _ in range(max(2, round(seconds / pause))):
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            pass
        before = time.perf_counter()
        as_batch(next(batches), shape.context)
        waited += time.perf_counter() - before
    return waited / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
