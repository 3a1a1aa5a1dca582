"""How fast is one mixture-of-experts layer, forward and backward? Ours, LitGPT's, Hugging Face's, others', dense.

    uv run python benchmarks/moe_layer.py --device cpu
    uv run --with liger-kernel==0.8.5 python benchmarks/moe_layer.py --device cuda

All layers of a case have the same weights and get the same tokens. Before a layer is timed, its output and all its
gradients are compared with LitGPT's layer in fp32; a layer that deviates is reported and not timed. Then the layers
take turns: a round times each layer once, over as many iterations as fill 0.1 seconds (0.03 on a GPU), and ratios are
formed within a round. An iteration is a forward and a backward with gradients to the input and all weights.

Tokens are N(0, 1) and the router has its usual initial values, so the routing is almost even. Tokens whose choice of
experts depends on rounding are not used: layers that round differently would route them differently. In the skewed case
every token chooses the first expert. On a CPU the process keeps the memory that it frees, because clearing fresh pages
for gradients could take most of the time.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from litgpt import Config
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Row, bold_ours, make_table
from benchmarks.moe_peers import GPU_ONLY, Size, layer_builders, litgpt_config, stacked_weights
from custom_moe import MoE
from litmoe.data.files import in_short
from litmoe.hardware import cpu_has_bf16

PACKAGES = ("torch", "litgpt", "lightning", "transformers", "triton", "liger-kernel")
SIZES: list[Size] = [(768, 2048, 8, 2), (768, 512, 32, 8), (1024, 3584, 8, 2), (256, 256, 32, 4)]

ALL_LAYERS = tuple(layer_builders(SIZES[0]))
EAGER_LAYERS = tuple(name for name in ALL_LAYERS if "compiled" not in name)

# The largest relative deviation from LitGPT's layer in fp32 (Frobenius norm). bf16 keeps 8 bits, so one rounding is off
# by up to 2e-3, and a result has passed through several.
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2}


class Case(NamedTuple):
    """Layers that are compared with each other."""

    size: Size
    tokens: int
    precision: str  # fp32 or bf16, of weights and tokens
    layers: tuple[str, ...]
    rounds: int
    skewed: bool = False


def main() -> None:
    parser = common.make_parser(__doc__, "moe_layer_DEVICE")
    parser.add_argument("--quick", action="store_true", help="two sizes, nothing compiled, for a few GPU minutes")
    args = parser.parse_args()
    result = common.start(args, *PACKAGES)
    if args.device == "cpu":
        keep_freed_memory()
        cases, seconds = cpu_cases(), 0.1
    else:
        cases, seconds = gpu_cases(), 0.03
    if args.quick:
        cases = quick_cases(args.device)
    common.print_table(run(result, cases, args.output, seconds))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees (glibc only).

    glibc gives blocks above 32 MB back to the system, which clears their pages when they are allocated again. On a
    virtual machine that can take longer than the layer that is timed. Not for real runs: the heap may grow large.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def quickstart_size() -> Size:
    config = Config.from_file(ROOT / "configs/models/quickstart.yaml")
    return config.n_embd, config.moe_intermediate_size, config.n_expert, config.n_expert_per_token


def cpu_cases() -> list[Case]:
    """Return the cases for a CPU. Compiling is slow, so only the two small sizes have compiled layers."""
    cases = []
    # On a CPU without support bf16 takes a hundred times as long as fp32.
    for precision in ("fp32", "bf16") if cpu_has_bf16() else ("fp32",):
        cases += [Case(size, 2048, precision, EAGER_LAYERS, rounds=5) for size in SIZES[:3]]
        cases += [Case(size, 2048, precision, ALL_LAYERS, rounds=5) for size in (SIZES[3], quickstart_size())]
        cases.append(Case(SIZES[0], 2048, precision, ("LitGPT", "ours"), rounds=5, skewed=True))
    return cases


def gpu_cases() -> list[Case]:
    """Return the cases for a GPU, the most important one first; GPU time is expensive."""
    cases = [Case(size, 16384, "bf16", ALL_LAYERS, rounds=15) for size in (*SIZES, quickstart_size())]
    cases.append(Case(SIZES[0], 16384, "bf16", ("LitGPT", "ours"), rounds=15, skewed=True))
    cases.append(Case(SIZES[0], 2048, "fp32", EAGER_LAYERS, rounds=15))
    # Few tokens per expert, and many.
    few_and_many = product((2048, 65536), SIZES)
    return cases + [Case(size, tokens, "bf16", EAGER_LAYERS, rounds=15) for tokens, size in few_and_many]


def quick_cases(device: str) -> list[Case]:
    """Return MoE-200M's layer and one of many small experts for a GPU, two small layers for a CPU."""
    if device == "cuda":
        return [Case(size, 16384, "bf16", EAGER_LAYERS, rounds=15) for size in SIZES[:2]]
    return [Case(size, 2048, "fp32", EAGER_LAYERS, rounds=3) for size in (SIZES[3], quickstart_size())]


def run(result: Row, cases: list[Case], output: Path, seconds: float) -> Row:
    """Measure all cases. The file is written after each one, so an interrupted run keeps what it has.

    Args:
        result: with the description of the machine; the cases are added to it.
        cases: to measure.
        output: result file.
        seconds: that a layer is timed for in each round.
    """
    result |= {"quickstart": quickstart_size(), "bounds": BOUNDS, "cases": []}
    for number, case in enumerate(cases, 1):
        try:
            result["cases"].append(measure(case, result["device"], seconds))
        except torch.OutOfMemoryError:
            print(f"{number}/{len(cases)}: {case.size}, {case.tokens} tokens: LitGPT's layer does not fit into the GPU")
            continue
        add_table(result)
        common.write_result(result, output)
        print(f"{number}/{len(cases)}: {case.size}, {case.tokens} tokens, {case.precision}")
        for name, row in result["cases"][-1]["layers"].items():
            print(f"   {name}: {row.get('tokens_per_second', row['status'])}", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------- one case


@dataclass
class Bench:
    """The tokens of a case, and how a layer runs on them."""

    x: Tensor  # (1, tokens, n_embd)
    dy: Tensor  # gradient of the output, like x

    def iteration(self, layer: nn.Module) -> Tensor:
        self.clear_gradients(layer)
        y: Tensor = layer(self.x)
        y.backward(self.dy)
        return y

    def clear_gradients(self, layer: nn.Module) -> None:
        """Set gradients to None, so that the backward writes them instead of adding to them."""
        for tensor in (self.x, *layer.parameters()):
            tensor.grad = None


def measure(case: Case, device: str, seconds: float) -> Row:
    """Compare every layer of a case with LitGPT's, measure its memory, and time it."""
    torch.compiler.reset()  # torch stops compiling a function after eight sizes
    config = litgpt_config(case.size)
    weights, bench, largest_share = prepare(case, device)
    builders = layer_builders(case.size)
    result: Row = {
        **dict(zip(("n_embd", "intermediate_size", "n_expert", "n_expert_per_token"), case.size, strict=True)),
        "tokens": case.tokens,
        "precision": case.precision,
        "routing": "skewed" if case.skewed else "even",
        "largest_share": round(largest_share, 3),
        "layers": {},
    }
    rows = result["layers"]
    # LitGPT's layer in fp32 is the reference, also for bf16.
    exact_bench = Bench(bench.x.detach().float().requires_grad_(), bench.dy.float())
    with torch.device(device):
        reference = outputs_and_gradients(builders["LitGPT"](weights).float(), exact_bench, config)
    del exact_bench

    layers: dict[str, nn.Module] = {}
    for name in case.layers:
        if device == "cpu" and name in GPU_ONLY:
            rows[name] = {"status": "needs a GPU"}
            continue
        try:
            with torch.device(device):
                layer = builders[name](weights).to(bench.x.dtype)
            rows[name] = examine(name, layer, bench, reference, case, config)
        except Exception as error:  # whatever a peer's layer raises goes into the table
            rows[name] = {"status": in_short(error)}
        if rows[name]["status"] == "measured":
            layers[name] = layer
    del reference  # memory for the larger cases

    for name, turns in time_layers(layers, bench, case.rounds, seconds).items():
        rows[name] |= turns
    return result


def prepare(case: Case, device: str) -> tuple[dict[str, Tensor], Bench, float]:
    """Return weights under LitGPT's names, the tokens, and the busiest expert's share of the assignments."""
    config = litgpt_config(case.size)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        weights = {name: tensor.to(dtype) for name, tensor in MoE(config).state_dict().items()}
    gate = weights["gate.weight"]
    # Twice as many tokens as needed: up to a third are dropped below.
    x = torch.randn(2 * case.tokens, config.n_embd, device=device).to(dtype)
    if case.skewed:
        # A constant input feature that only the first expert's router weight reacts to.
        x[:, 0] = 1
        gate[:, 0] = 4 * nn.functional.one_hot(torch.tensor(0), config.n_expert)
    top, indices = (x.float() @ gate.float().T).topk(config.n_expert_per_token + 1)
    # Keep tokens whose last chosen expert is clearly ahead of the next one: 0.02 is twice the error of a bf16 logit.
    is_clear = top[:, -2] - top[:, -1] > 0.02
    kept = is_clear.nonzero().flatten()[: case.tokens]
    assert len(kept) == case.tokens, "too few tokens with a clear choice of experts"
    assignments = indices[kept, :-1].flatten()
    largest_share = assignments.bincount().max().item() / len(assignments)
    x = x[kept].unsqueeze(0).requires_grad_()
    return weights, Bench(x, torch.randn_like(x)), largest_share


def outputs_and_gradients(layer: nn.Module, bench: Bench, config: Config) -> dict[str, Tensor]:
    """Return the output of one iteration and the gradients, in the same layout for every layer."""
    y = bench.iteration(layer).detach()
    # torch.compile adds a prefix to the names.
    gradients = {name.removeprefix("_orig_mod."): value.grad for name, value in layer.named_parameters()}
    if "experts.0.proj.weight" in gradients:
        of_weights = stacked_weights(gradients, config)
    else:
        of_weights = tuple(gradients.values())
    return dict(zip(("output", "x", "gate", "fc", "proj"), (y, bench.x.grad, *of_weights), strict=True))


def examine(name: str, layer: nn.Module, bench: Bench, reference: dict[str, Tensor], case: Case, config: Config) -> Row:
    """Return deviation and memory of a layer. These iterations also warm it up."""
    row: Row = {"status": "measured"}
    if name != "dense":  # which computes something else
        actual = outputs_and_gradients(layer, bench, config)
        # Relative, in the Frobenius norm, with two digits.
        relative = {key: (actual[key].float() - exact).norm() / exact.norm() for key, exact in reference.items()}
        row["deviation"] = {key: float(f"{value.item():.2g}") for key, value in relative.items()}
        # `not <=` is also true for NaN.
        wrong = [key for key, value in row["deviation"].items() if not value <= BOUNDS[case.precision]]
        if wrong:
            return row | {"status": f"wrong: {', '.join(wrong)}"}
    # Activation memory decides which micro batch fits.
    row["saved_bytes_per_token"] = round(saved_bytes(layer, bench) / case.tokens, 1)
    bench.clear_gradients(layer)
    return row


def saved_bytes(layer: nn.Module, bench: Bench) -> int:
    """Return what autograd saves for the backward: each storage once, with the input, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.compiler.disable(lambda tensor: tensor)):
        y = layer(bench.x)
    y.backward(bench.dy)
    return sum(storages.values())


# --------------------------------------------------------------------------------------------------------------- timing


def time_layers(layers: dict[str, nn.Module], bench: Bench, rounds: int, seconds: float) -> dict[str, Row]:
    """Return the seconds per iteration of each layer, and its speedup over LitGPT's: lowest, median, highest."""
    functions: dict[str, Callable[[], float]] = {}
    for name, layer in layers.items():
        # The first iteration warms up, the second one tells how many fill the time.
        time_iterations(layer, bench, 1)
        iterations = max(1, round(seconds / time_iterations(layer, bench, 1)))
        functions[name] = partial(time_iterations, layer, bench, iterations)
    turns = common.take_turns(functions, rounds)
    rows: dict[str, Row] = {}
    for name in layers:
        times = common.low_median_high([turn[name] for turn in turns])
        rows[name] = {"seconds": times, "tokens_per_second": round(bench.x.size(1) / times[1])}
        if "LitGPT" in layers:
            rows[name]["speedup"] = common.low_median_high([turn["LitGPT"] / turn[name] for turn in turns])
    return rows


def time_iterations(layer: nn.Module, bench: Bench, iterations: int) -> float:
    """Return seconds per iteration."""
    synchronize = torch.cuda.synchronize if bench.x.is_cuda else lambda: None
    # Kernels run asynchronously: wait for earlier ones before the clock starts.
    synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        bench.iteration(layer)
    synchronize()
    elapsed = time.perf_counter() - start
    bench.clear_gradients(layer)
    return elapsed / iterations


# --------------------------------------------------------------------------------------------------------------- tables


def add_table(result: Row) -> None:
    """Add a table with a row for each layer and a column for each size."""
    sizes = list(dict.fromkeys(size_of(case) for case in result["cases"]))
    rows: dict[tuple[str, ...], dict[str, str]] = {}  # the cells of a row by size
    for case in result["cases"]:
        for name, layer in case["layers"].items():
            if "speedup" in layer:
                key = (case["precision"], f"{case['tokens']:,}", bold_ours(name))
                kept = layer["saved_bytes_per_token"] / 1024
                rows.setdefault(key, {})[size_of(case)] = f"{layer['speedup'][1]:.2f} / {kept:.0f}"
    # A layer was not timed at every size, so some cells stay empty.
    cells = [[*key, *(by_size.get(size, "") for size in sizes)] for key, by_size in rows.items()]
    result["table"] = make_table(("", "tokens", "layer", *sizes), cells)
    ours = [case["layers"]["ours"] for case in result["cases"]]
    speedups = [layer["speedup"][1] for layer in ours if "speedup" in layer]
    if speedups:
        text = f"{min(speedups):.2f} to {max(speedups):.2f} times LitGPT's"
        result["headline"] = [["speed of the MoE layer", text]]


def size_of(case: Row) -> str:
    """Name the column of a case."""
    sizes = (case["n_embd"], case["intermediate_size"], case["n_expert"], case["n_expert_per_token"])
    return f"{sizes}, skewed" if case["routing"] == "skewed" else str(sizes)


if __name__ == "__main__":
    main()
