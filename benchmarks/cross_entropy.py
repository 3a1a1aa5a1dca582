"""Times the output layer with its cross-entropy, forward and backward: ours, LitGPT's, torch's, Liger's, Apple's.

    uv run python benchmarks/cross_entropy.py                # a minute on a CPU
    uv run --with liger-kernel==0.8.5 --with cut-cross-entropy==25.1.1 python benchmarks/cross_entropy.py --device cuda

Writes benchmarks/results/cross_entropy_DEVICE.json; benchmarks/report.py makes docs/PERFORMANCE.md of it.

All ways of a case get the same hidden states, output layer and targets, of which one in eight is ignored. Before a way
is timed, its loss and its gradients to the hidden states and to the output layer are compared with those in fp64 (in
fp32 on a GPU); one that deviates is reported and not timed. Then they take turns, as in benchmarks/moe_layer.py, and
ratios are formed within a round. The allocator is as in training: large blocks go back to the system.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from litgpt import Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from benchmarks.common import choose_device, circumstances, gpu, installed, invocation, write_result
from benchmarks.moe_layer import BOUNDS, Bench, peak_bytes, rounds, spread, why
from litmoe.data.instruction_module import IGNORED
from litmoe.hardware import cpu_has_bf16
from litmoe.train.cross_entropy import linear_cross_entropy, loss_of_rows

PACKAGES = ("torch", "litgpt", "liger-kernel", "cut-cross-entropy")
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states (N, C), the output layer's weight (V, C), targets (N) -> the mean loss"""


@dataclass(frozen=True)
class Case:
    """Ways that are compared with each other."""

    model: str
    """Whose output layer it is"""
    tokens: int
    precision: str
    """``fp32``, ``bf16`` (the weight too) or ``bf16-mixed`` (the weight in fp32, autocast)"""
    rounds: int = 5


CASES = {
    "cpu": [
        Case(model, tokens, precision)
        for precision in (("fp32", "bf16") if cpu_has_bf16() else ("fp32",))
        for model, tokens in (("quickstart", 1024), ("moe-200m", 512))
    ],
    "cuda": [
        *(Case("moe-200m", tokens, "bf16-mixed") for tokens in (16384, 65536)),  # what matters most first
        *(Case("moe-200m", tokens, "bf16") for tokens in (2048, 16384)),
        Case("quickstart", 1024, "fp32"),
    ],
}


def litgpt(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As litgpt/pretrain.py calls it."""
    return chunked_cross_entropy(F.linear(x, weight).unsqueeze(0), targets.unsqueeze(0), ignore_index=IGNORED)


def ours_compiled(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As a compiled run has it."""
    return linear_cross_entropy(x, weight, targets, loss_of_rows=_compiled())


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(loss_of_rows, fullgraph=True)


def of_torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Since torch 2.15; without options it makes all logits."""
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(*autocast(x, weight), targets, ignore_index=IGNORED, options=options)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With sums over its blocks in fp32, as ours has them."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x, weight = autocast(x, weight)
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32)(weight, x, targets)


def cut(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Without its filter, which leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*autocast(x, weight), targets, ignore_index=IGNORED, filter_eps=None)


def autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For those that do not know of it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype)


WAYS: dict[str, Compute] = {
    "LitGPT": litgpt,
    "ours": linear_cross_entropy,
    "ours compiled": ours_compiled,
    "torch": of_torch,
    "Liger-Kernel": liger,
    "cut-cross-entropy": cut,
}
GPU_ONLY = ("ours compiled", "Liger-Kernel", "cut-cross-entropy")


class Head(nn.Module):
    """The output layer with its loss, as ``Bench`` runs it."""

    def __init__(self, compute: Compute, weight: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.compute, self.targets = compute, targets

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.targets)


def main() -> None:
    """Runs all cases; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cross_entropy_DEVICE.json")
    args = parser.parse_args()
    choose_device(args.device)
    output = args.output or ROOT / f"benchmarks/results/cross_entropy_{args.device}.json"
    seconds = 0.1 if args.device == "cpu" else 0.03
    run(args.device, CASES[args.device], output, invocation("cross_entropy"), seconds)


def run(device: str, cases: list[Case], output: Path, command: str, seconds: float) -> dict[str, Any]:
    """Measures every case and writes the result; each way runs for about ``seconds`` in a round."""
    result = circumstances(command, installed(PACKAGES))
    result["hardware"] |= {"threads": torch.get_num_threads(), "gpu": gpu() if device == "cuda" else None}
    result |= {"device": device, "bounds": BOUNDS, "cases": []}
    started = time.perf_counter()
    for case in cases:
        result["cases"].append(measure(case, device, seconds))
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_result(result, output)
        print(f"{case.model}, {case.tokens} tokens, {case.precision}")
        for name, row in result["cases"][-1]["ways"].items():
            print(f"   {name}: {row}", flush=True)
    return result


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """One case: every way compared, its memory, and the rounds."""
    torch.compiler.reset()
    weight, targets, bench = prepare(case, device)
    wanted = exact(weight, targets, bench)
    rows: dict[str, dict[str, Any]] = {}
    built: dict[str, nn.Module] = {}
    for name, compute in WAYS.items():
        if device == "cpu" and name in GPU_ONLY:
            rows[name] = {"status": "needs a GPU"}
            continue
        try:
            head = Head(compute, weight, targets)
            rows[name] = examine(head, bench, wanted, BOUNDS[case.precision])
        except Exception as error:  # whatever another's dies of goes into the table
            rows[name] = {"status": why(error)}
            continue
        if rows[name]["status"] == "measured":
            built[name] = head
    times = rounds(built, bench, case.rounds, seconds)
    for name, own in times.items():
        rows[name]["seconds"] = spread(own)
        if stock := times.get("LitGPT"):
            rows[name]["speedup"] = spread([first / second for first, second in zip(stock, own, strict=True)])
    words, n_embd = weight.shape
    size = {"n_embd": n_embd, "padded_vocab_size": words, "tokens": case.tokens}
    return {"model": case.model, **size, "precision": case.precision, "ways": rows}


def prepare(case: Case, device: str) -> tuple[Tensor, Tensor, Bench]:
    """The output layer's weight, targets and hidden states; the logits are about as far apart as a trained model's."""
    config = Config.from_file(ROOT / f"configs/models/{case.model}.yaml")
    n_embd, words = config.n_embd, config.padded_vocab_size
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        weight = (2 * n_embd**-0.5 * torch.randn(words, n_embd)).to(dtype)
        x = torch.randn(case.tokens, n_embd).to(dtype).requires_grad_()
        targets = torch.randint(0, words, (case.tokens,))
        targets[::8] = IGNORED
        return weight, targets, Bench(x, torch.ones(()), mixed=case.precision == "bf16-mixed")


def exact(weight: Tensor, targets: Tensor, bench: Bench) -> tuple[Tensor, ...]:
    """Loss and gradients in fp64, of a GPU in fp32: all logits in fp64 are for small cases."""
    dtype = torch.float32 if weight.is_cuda else torch.float64
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (bench.x, weight))
    loss = F.cross_entropy(F.linear(x, weight), targets)
    return tuple(tensor.float() for tensor in (loss.detach(), *torch.autograd.grad(loss, (x, weight))))


def examine(head: nn.Module, bench: Bench, wanted: tuple[Tensor, ...], bound: float) -> dict[str, Any]:
    """Deviation and memory; these runs also warm it up."""
    loss = bench.iteration(head).detach()
    (weight,) = head.parameters()
    found = (loss, bench.x.grad, weight.grad)
    far = {
        key: ((value.float() - true).norm() / true.norm()).item()
        for key, value, true in zip(("loss", "hidden states", "weight"), found, wanted, strict=True)
    }
    row: dict[str, Any] = {"deviation": {key: float(f"{value:.2g}") for key, value in far.items()}}
    if wrong := [key for key, value in far.items() if not value <= bound]:
        return row | {"status": f"wrong: {', '.join(f'{key} by {far[key]:.1e}' for key in wrong)}"}
    del found, weight
    return {"status": "measured", **row, "peak_bytes": peak_bytes(head, bench)}


if __name__ == "__main__":
    main()
