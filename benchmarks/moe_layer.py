"""Times one mixture-of-experts layer, forward and backward: ours, LitGPT's, Hugging Face's, others', and a dense one.

    uv run python benchmarks/moe_layer.py --device cpu
    uv run python benchmarks/moe_layer.py --device cuda

Writes benchmarks/results/moe_layer_DEVICE.json; benchmarks/report.py makes docs/PERFORMANCE.md of it.

All layers of a case hold the same weights and get the same tokens. Before anything is timed, each one's output and all
its gradients are compared with LitGPT's layer in fp32; a layer that deviates is reported and not timed. Then they take
turns: a round times each layer once, over as many iterations as fill 0.1 seconds (0.03 on a GPU), and ratios are formed
within a round. An iteration is a forward and a backward with gradients to the input and to every weight; gradients are
None before it, so they are written and not added up. Tokens are N(0, 1) and the gate has its usual initial values, so
that routing is about even; tokens whose choice of experts hangs on the rounding of their logits are not drawn, since
layers that round differently would send them elsewhere. In the skewed case every token chooses the first expert. On a
CPU the process keeps the memory that it frees: fresh pages for gradients could be most of what is timed there, most of
all for the layers whose gradients are one large block.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its start and end
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt import Config
from torch import Tensor, nn

from benchmarks.common import circumstances, gpu, installed, keep_freed_memory, write_result
from benchmarks.moe_peers import GPU_ONLY, Size, config_of, layers, stacked
from custom_moe import MoE
from custom_moe.backends import choose_backend
from litmoe.hardware import cpu_has_bf16

PACKAGES = ("torch", "litgpt", "lightning", "transformers", "triton", "liger-kernel", "scattermoe", "sonic-moe")
SIZES = [(768, 2048, 8, 2), (768, 512, 32, 8), (1024, 3584, 8, 2), (256, 256, 32, 4)]
"""n_embd, an expert's width, experts, experts per token"""
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "bf16-mixed": 2e-2}
"""The largest relative deviation from LitGPT's layer in fp32, in the Frobenius norm. bf16 keeps 8 bits, so that one
rounding is off by up to 2e-3, and a result has passed through several."""


@dataclass(frozen=True)
class Case:
    """Layers that are compared with each other."""

    size: Size
    tokens: int
    precision: str
    """``fp32``, ``bf16`` (the weights too) or ``bf16-mixed`` (weights in fp32, autocast)"""
    layers: tuple[str, ...]
    """Names in ``layers``"""
    rounds: int
    """0 compares and does not time"""
    skewed: bool = False


def main() -> None:
    """Runs all cases; the file is written anew after each, so that a run that was cut short leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/moe_layer_DEVICE.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA GPU here; `--device cpu` needs none.")
    if args.device == "cpu":
        keep_freed_memory()
    output = args.output or ROOT / f"benchmarks/results/moe_layer_{args.device}.json"
    command = f"python benchmarks/moe_layer.py --device {args.device}"
    run(args.device, cases(args.device), output, command, seconds=0.1 if args.device == "cpu" else 0.03)


def cases(device: str) -> list[Case]:
    """What is measured, on a GPU what matters most first. Compiling is slow, so not every case has it: on the CPU the
    two sizes that are not bound by arithmetic, on a GPU one number of tokens. bf16 only on a CPU that has it."""
    sizes = [*SIZES, quickstart()]
    pair = ("LitGPT", "ours")
    every = tuple(layers(SIZES[0]))
    eager = tuple(name for name in every if "compiled" not in name)
    if device == "cpu":
        precisions = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
        places = [(size, precision) for precision in precisions for size in sizes]
        table = [Case(size, 2048, precision, every if size in sizes[3:] else eager, 5) for size, precision in places]
        return [*table, *(Case(SIZES[0], 2048, precision, pair, 5, skewed=True) for precision in precisions)]
    backends = tuple(name for name in eager if name.startswith("ours"))
    checks = [Case(size, 2048, precision, backends, 0) for precision in ("fp32", "bf16") for size in sizes]
    skewed = Case(SIZES[0], 16384, "bf16", pair, 15, skewed=True)
    table = [Case(size, 16384, "bf16", every, 15) for size in sizes]
    table += [Case(size, tokens, "bf16", eager, 15) for tokens in (2048, 65536) for size in sizes]
    return [*checks, skewed, *table, *(Case(size, 16384, "bf16-mixed", eager, 15) for size in sizes)]


def quickstart() -> Size:
    config = Config.from_file(ROOT / "configs/models/quickstart.yaml")
    return config.n_embd, config.moe_intermediate_size, config.n_expert, config.n_expert_per_token


def run(device: str, cases: list[Case], output: Path, command: str, seconds: float) -> dict[str, Any]:
    """Measures every case and writes the result; each layer runs for about ``seconds`` in a round."""
    result = circumstances(command, installed(PACKAGES))
    result["hardware"] |= {"threads": torch.get_num_threads(), "gpu": gpu() if device == "cuda" else None}
    result |= {"device": device, "quickstart": quickstart(), "bounds": BOUNDS, "cases": [], "profile": None}
    started = time.perf_counter()
    for number, case in enumerate(cases, 1):
        result["cases"].append(measure(case, device, seconds))
        result["seconds"] = round(time.perf_counter() - started, 1)
        if device == "cuda" and result["profile"] is None and case.rounds and not case.skewed:
            result["profile"] = {"size": case.size, "tokens": case.tokens, **profile(case, device)}
        write_result(result, output)
        rows = result["cases"][-1]["layers"].items()
        shown = (f"{name} {row.get('tokens_per_second', row['status'])}" for name, row in rows)
        print(f"{number}/{len(cases)}, {result['seconds']:.0f} s: {case.size}, {case.tokens} tokens, {case.precision}")
        print("   " + "; ".join(shown), flush=True)
    return result


@dataclass
class Bench:
    """One case's tokens, and how a layer is run on them."""

    x: Tensor
    dy: Tensor
    mixed: bool = False

    def forward(self, layer: nn.Module) -> Tensor:
        self.clear(layer)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.mixed):
            y: Tensor = layer(self.x)
        return y

    def iteration(self, layer: nn.Module) -> Tensor:
        y = self.forward(layer)
        y.backward(self.dy.to(y.dtype))
        return y

    def clear(self, layer: nn.Module) -> None:
        for tensor in (self.x, *layer.parameters()):
            tensor.grad = None


def prepare(case: Case, device: str) -> tuple[dict[str, Tensor], Bench, float]:
    """Weights under LitGPT's names, tokens, and the busiest expert's share of the assignments."""
    config, dtype = config_of(case.size), torch.bfloat16 if case.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        values = {name: value.to(dtype) for name, value in MoE(config).state_dict().items()}
    gate = values["gate.weight"]
    # More than needed, as a third can be unsure. 0.02 is twice what bf16 does to a logit between 1 and 2.
    x = torch.randn(2 * case.tokens, config.n_embd, device=device).to(dtype)
    if case.skewed:
        x[:, 0] = 1
        gate[:, 0] = 4 * nn.functional.one_hot(torch.tensor(0), config.n_expert)
    top, indices = (x.float() @ gate.float().T).topk(config.n_expert_per_token + 1)
    sure = (top[:, -2] - top[:, -1] > 0.02).nonzero().flatten()[: case.tokens]
    assert len(sure) == case.tokens, "too few tokens are sure of their experts"
    share = indices[sure, :-1].flatten().bincount().max().item() / (case.tokens * config.n_expert_per_token)
    x = x[sure].unsqueeze(0).requires_grad_()
    return values, Bench(x, torch.randn_like(x), mixed=case.precision == "bf16-mixed"), share


def build(name: str, case: Case, values: dict[str, Tensor], device: str, dtype: torch.dtype) -> nn.Module:
    with torch.device(device):
        return layers(case.size)[name](values).to(dtype)


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """One case: every layer compared, its memory, and the rounds."""
    torch.compiler.reset()  # torch stops compiling a function that it has compiled for eight sizes
    config = config_of(case.size)
    values, bench, share = prepare(case, device)
    exact = Bench(bench.x.detach().float().requires_grad_(), bench.dy.float())
    rows: dict[str, dict[str, Any]] = {}
    wanted = None
    try:
        wanted = outcome(build("LitGPT", case, values, device, torch.float32), exact, config)
    except Exception as error:  # out of memory, at a large size
        rows = {name: {"status": f"nothing to compare with: {why(error)}"} for name in case.layers}
    del exact

    built: dict[str, nn.Module] = {}
    for name in case.layers if wanted else ():
        if device == "cpu" and name in GPU_ONLY:
            rows[name] = {"status": "needs a GPU"}
            continue
        try:
            layer = build(name, case, values, device, bench.x.dtype)
            rows[name] = examine(name, layer, bench, wanted, case, config)
        except Exception as error:  # whatever another's layer dies of goes into the table
            rows[name] = {"status": why(error)}
            continue
        if rows[name]["status"] == "measured":
            built[name] = layer
    del wanted
    if case.rounds:
        times = rounds(built, bench, case.rounds, seconds)
        for name, own in times.items():
            router = 0 if name == "dense" else config.n_embd * config.n_expert
            experts = 3 * config.n_embd * config.moe_intermediate_size * config.n_expert_per_token
            rows[name] |= summary(own, times.get("LitGPT"), 3 * 2 * (experts + router), case.tokens)
    names = ("n_embd", "intermediate_size", "n_expert", "n_expert_per_token")
    row = dict(zip(names, case.size, strict=True)) | {"tokens": case.tokens, "precision": case.precision}
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    row["backend"] = choose_backend(None, dtype, bench.x.device, case.tokens, case.size[:2])
    return row | {"routing": "skewed" if case.skewed else "even", "largest_share": round(share, 3), "layers": rows}


def why(error: Exception) -> str:
    """One line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]


def outcome(layer: nn.Module, bench: Bench, config: Config) -> dict[str, Tensor]:
    """Output and gradients of one iteration."""
    y = bench.iteration(layer).detach()
    gradients = {name.removeprefix("_orig_mod."): value.grad for name, value in layer.named_parameters()}
    theirs = stacked(gradients, config) if "experts.0.proj.weight" in gradients else tuple(gradients.values())
    return dict(zip(("output", "x", "gate", "fc", "proj"), (y, bench.x.grad, *theirs), strict=True))


def examine(
    name: str, layer: nn.Module, bench: Bench, wanted: dict[str, Tensor], case: Case, config: Config
) -> dict[str, Any]:
    """What is known of a layer before it is timed: deviation, memory, host syncs. These runs also warm it up."""
    row: dict[str, Any] = {"status": "measured" if case.rounds else "compared"}
    if name != "dense":
        found = outcome(layer, bench, config)
        far = {key: ((found[key].float() - value).norm() / value.norm()).item() for key, value in wanted.items()}
        row["deviation"] = {key: float(f"{value:.2g}") for key, value in far.items()}
        if wrong := [key for key, value in far.items() if not value <= BOUNDS[case.precision]]:
            return row | {"status": f"wrong: {', '.join(f'{key} by {far[key]:.1e}' for key in wrong)}"}
        del found
    row["saved_bytes_per_token"] = round(saved_bytes(layer, bench) / case.tokens, 1)
    row["peak_bytes"] = peak_bytes(layer, bench)
    if bench.x.is_cuda:
        row["host_sync"] = host_sync(layer, bench)
    bench.clear(layer)
    return row


def saved_bytes(layer: nn.Module, bench: Bench) -> int:
    """What autograd keeps for the backward, each storage once, without the parameters; the input is counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.compiler.disable(lambda tensor: tensor)):
        y = bench.forward(layer)
    y.backward(bench.dy.to(y.dtype))
    return sum(storages.values())


def peak_bytes(layer: nn.Module, bench: Bench) -> int:
    """The most that torch's allocator held at once during an iteration, beside weights and tokens; gradients count."""
    bench.clear(layer)
    if bench.x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.iteration(layer)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        bench.iteration(layer)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def host_sync(layer: nn.Module, bench: Bench) -> str | None:
    """What waits for the GPU during an iteration, by torch's sync debug mode; None where nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.iteration(layer)
    except RuntimeError as error:
        return why(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def rounds(built: dict[str, nn.Module], bench: Bench, number: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per iteration, a value for each round: A B C ..., A B C ..."""

    def timed(layer: nn.Module, iterations: int) -> float:
        wait = torch.cuda.synchronize if bench.x.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(iterations):
            bench.iteration(layer)
        wait()
        return (time.perf_counter() - started) / iterations

    iterations = {}
    for name, layer in built.items():
        timed(layer, 1)
        iterations[name] = max(1, round(seconds / timed(layer, 1)))
        bench.clear(layer)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(number):
        for name, layer in built.items():
            times[name].append(timed(layer, iterations[name]))
            bench.clear(layer)
    return times


def summary(times: list[float], stock: list[float] | None, flops: float, tokens: int) -> dict[str, Any]:
    """Seconds per iteration and, where LitGPT's ran, times its speed, both with quartiles over the rounds."""
    typical = median(times)
    pairs = zip(stock, times, strict=True) if stock else ()
    return {
        "seconds": spread(times),
        **({"speedup": spread([first / second for first, second in pairs])} if stock else {}),
        "tokens_per_second": round(tokens / typical),
        "tflops": float(f"{flops * tokens / typical / 1e12:.4g}"),
    }


def spread(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(f"{value:.4g}") for value in quantiles(values, n=4, method="inclusive")]


def profile(case: Case, device: str) -> dict[str, Any]:
    """The ten kernels of our layer that take longest, over three iterations."""
    values, bench, _ = prepare(case, device)
    layer = build("ours", case, values, device, bench.x.dtype)
    for _ in range(3):
        bench.iteration(layer)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            bench.iteration(layer)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in kernels)
    top = [
        {"name": event.key[:120], "calls": event.count // 3, "microseconds": round(event.self_device_time_total / 3, 1)}
        for event in kernels[:10]
    ]
    return {"microseconds": round(total / 3, 1), "kernels": top}


if __name__ == "__main__":
    main()
