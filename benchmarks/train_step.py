"""How fast is a training step? run_train.py against stock LitGPT: the same model, tokens, batches and AdamW.

    uv run python benchmarks/train_step.py                                    # the quickstart on a CPU, 8 minutes
    uv run python benchmarks/train_step.py --device cuda --models moe-200m    # keeps the other models of an earlier run
    uv run python benchmarks/train_step.py --device cuda --quick              # one short round, for a few GPU minutes

Both sides are commands in processes of their own: run_train.py, and `train_step.py stock` with the same flags, which
runs LitGPT's own `setup`, `main`, `fit`, model and loss. Both read the same tokens in the same order, validate on the
same batches before the first and after the last step, write no samples and save one checkpoint. Stock LitGPT runs
twice, compiled and not compiled. All ways take turns, and ratios are formed within a round against the better of the
two.

Tokens per second are those of the second half of a run's steps, from its own log. "First step" is the time from the
start of the command to the end of the first step, with imports, compilation and the first validation.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import common
from benchmarks.common import Row, bold_ours, gib, make_table, ranged
from benchmarks.runs import MUON, Corpus, RunFailed, find_corpus, train
from custom_moe.router import TopKRouter
from litmoe.config import parse_run
from litmoe.flops import training_flops_per_token
from litmoe.hardware import choose_precision, processes

# FLOP/s of dense bf16 matrix products, measured on such a GPU.
GPU_PEAKS = {"NVIDIA H200": 790e12}

# The same work besides the steps on both sides.
SAME_ON_BOTH_SIDES = {
    "train.log_interval": 10,
    "train.save_interval": "null",
    "eval.initial_validation": "true",
    "eval.interval": 1_000_000_000,
    "sample.prompt": "null",
}
VALIDATION_SEQUENCES = 64  # eval.max_iters counts micro batches, so it is computed from this
SECONDS_LIMIT = 300.0  # a way that takes longer is reported as too slow; GPU time is expensive


# Each side, and its torch.compile: ours decides by its own rules, as a user gets it.
WAYS = {"ours": None, "stock": False, "stock compiled": True}


class Case(NamedTuple):
    """A model and how it is trained."""

    run_file: str
    flags: tuple[str, ...]
    micro_batch: int  # sequences per forward pass on both sides; gradients are accumulated to the same batch
    tokens: int
    rounds: int
    on_request: bool = False  # measured only if --models names it


def gpu_case(run_file: str, context: int, model: str | None = None) -> Case:
    """Return a case of 65,536 tokens per step, in two micro batches."""
    # Enough tokens to fill an H200, and a micro batch whose fp32 logits fit into its memory for both sides.
    batch = 65536 // context
    flags = [f"--train.max_seq_length={context}", f"--train.global_batch_size={batch}"]
    if model:
        flags.append(f"--model=configs/models/{model}.yaml")
    return Case(f"configs/runs/{run_file}.yaml", tuple(flags), batch // 2, 80 * 65536, rounds=2)


QUICKSTART = Case("configs/quickstart.yaml", (), micro_batch=4, tokens=150_000, rounds=3)
MOE_200M = gpu_case("tinystories-moe-200m", 2048)
CASES = {
    "cpu": {"quickstart": QUICKSTART, "quickstart-muon": QUICKSTART._replace(flags=(MUON,), on_request=True)},
    "cuda": {  # the most important one first
        "moe-200m": MOE_200M,
        "gpt2-124m": gpu_case("openwebtext-gpt2-124m", 1024),
        "moe-200m-dense-twin": gpu_case("tinystories-moe-200m", 2048, "moe-200m-dense-twin"),
        "moe-200m-muon": MOE_200M._replace(flags=(*MOE_200M.flags, MUON), on_request=True),
        "moe-fine-32": gpu_case("tinystories-moe-200m", 2048, "moe-fine-32"),
        "quickstart": QUICKSTART,
    },
}


def main() -> None:
    if sys.argv[1:2] == ["stock"]:
        pretrain_with_stock(sys.argv[2:])
        return
    parser = common.make_parser(__doc__, "train_step_DEVICE", runs=True)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="some of the device's models (default: all)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="sides (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round with a quarter of the tokens")
    args = parser.parse_args()
    cases = CASES[args.device]
    unknown = sorted(set(args.models or ()) - set(cases))
    if unknown:
        sys.exit(f"error: no model {', '.join(unknown)} on {args.device}. Available: {', '.join(cases)}.")
    result = common.start(args, "torch", "litgpt", "lightning")
    result |= {"peaks": {"measured": matmul_peak(args.device)}, "same_on_both_sides": SAME_ON_BOTH_SIDES}
    result["models"] = common.earlier_rows(args.output, result, "models")
    corpus = find_corpus(args.data_dir)
    for name in args.models or [name for name, case in cases.items() if not case.on_request]:
        case = cases[name]
        # For a few GPU minutes: the same comparison with fewer tokens.
        if args.quick:
            case = case._replace(tokens=case.tokens // 4, rounds=1)

        # Called after each round: a run that is cut short keeps what it has.
        def save(model_result: Row, name: str = name) -> None:
            result["models"][name] = model_result
            add_table(result)
            common.write_result(result, args.output)

        print(f"{name}: {case.tokens:,} tokens", flush=True)
        measure(case, args.ways, corpus, save)
    common.print_table(result)


def matmul_peak(device: str) -> float | None:
    """Return the FLOP/s of matrix products: of a known GPU in bf16, of this CPU in fp32, measured now."""
    if device == "cuda":
        return GPU_PEAKS.get(torch.cuda.get_device_name())
    # The best of two seconds: other programs only make it slower.
    size, rates, start = 2048, [], time.perf_counter()
    a, b = torch.randn(2, size, size)
    while time.perf_counter() - start < 2.0:
        before = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - before))
    return max(rates)


def measure(case: Case, ways: Sequence[str], corpus: Corpus, save: Callable[[Row], None]) -> Row:
    """Let the ways take turns. ``save`` receives the result after each round."""
    settings = parse_run(["--config", str(ROOT / case.run_file), *case.flags]).settings
    context = settings.train.max_seq_length or settings.model.block_size
    result: Row = {
        "run_file": case.run_file,
        "flags": case.flags,
        "precision": choose_precision(settings.precision)[0],
        "context": context,
        "batch": settings.train.global_batch_size,
        "tokens": case.tokens,
        "flops_per_token": {"causal": training_flops_per_token(settings.model, context)},
        "ways": {way: WAYS[way] for way in ways},
        "rounds": [],
    }
    for _ in range(case.rounds):
        result["rounds"].append({way: run_way(way, case, corpus) for way in ways})
        result["summary"] = summarize(result["rounds"])
        print("  " + "; ".join(f"{name} {row}" for name, row in result["rounds"][-1].items()), flush=True)
        save(result)
    return result


def run_way(way: str, case: Case, corpus: Corpus) -> Row:
    """Run one side once. A failure (out of memory, too slow) is a result, too."""
    flags = ["--config", case.run_file, *case.flags, *corpus.flags]
    flags += [f"--train.max_tokens={case.tokens}", "--train.max_steps=null"]
    flags += [f"--train.micro_batch_size={case.micro_batch}"]
    flags += [f"--eval.max_iters={max(1, VALIDATION_SEQUENCES // case.micro_batch)}"]
    flags += [f"--{name}={value}" for name, value in SAME_ON_BOTH_SIDES.items()]
    script, environment = ["run_train.py"], {}
    if way != "ours":
        script = ["benchmarks/train_step.py", "stock"]
        environment = {"TORCH_COMPILE_DISABLE": "0" if WAYS[way] else "1"}
    try:
        run = train(flags, script=script, environment=environment, limit=SECONDS_LIMIT, watch_memory=True)
        return {
            "status": "measured",
            "tokens_per_second": round(run.tokens_per_second, 1),
            "seconds": round(run.seconds, 2),
            "first_step_seconds": round(run.first_step_seconds, 2),
            "peak_bytes": run.peak_bytes,
            "val_loss": run.val_loss,
        }
    except RunFailed as error:
        return {"status": str(error)}


def pretrain_with_stock(flags: Sequence[str]) -> None:
    """Pretrain with stock LitGPT. Only what would crash is replaced. Prints the allocator's peak on a GPU.

    Args:
        flags: those of run_train.py. TORCH_COMPILE_DISABLE=1 in the environment turns LitGPT's torch.compile off.
    """
    import litgpt.model
    import litgpt.pretrain

    torch.set_float32_matmul_precision("high")  # as LitGPT's command line does
    # LitGPT never initializes the weight of this router: it is whatever the memory contained, sometimes NaN.
    litgpt.model.GroupedTopkRouter.reset_parameters = TopKRouter.reset_parameters
    run = parse_run(flags)
    settings = run.settings
    # LitGPT parses sys.argv again at each checkpoint and would exit, because the flags are not its own.
    litgpt.pretrain.save_hyperparameters = lambda *_: None
    if settings.model.mlp_class_name == "LLaMAMoE":
        # It runs the model on the meta device, where LLaMAMoE calls `nonzero` and crashes.
        litgpt.pretrain.measure_flops = lambda *_: 0

    devices, num_nodes = processes(settings)
    litgpt.pretrain.setup(
        model_name=settings.model.name,
        model_config=settings.model,
        out_dir=settings.out_dir,
        precision=choose_precision(settings.precision)[0],
        # Not litgpt.data.TextFiles, which loses the ends of documents: the same tokens in the same order.
        data=settings.data,
        train=settings.train,
        eval=settings.eval,
        log=settings.log,
        optimizer=run.optimizer,
        devices=devices,
        num_nodes=num_nodes,
        tokenizer_dir=settings.tokenizer_dir,
        logger_name="csv",
        seed=settings.seed,
    )
    if torch.cuda.is_available():
        print(f"Peak memory {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB.")


# ------------------------------------------------------------------------------------------------------------- summary


def summarize(rounds: list[Row]) -> Row:
    """Return (lowest, median, highest) of each number and of the ratios; a ratio above 1 is in favour of ours."""
    summary: Row = {}
    for way in rounds[0]:
        summary[way] = {}
        for number in ("tokens_per_second", "seconds", "first_step_seconds", "peak_bytes", "val_loss"):
            values = [row[way][number] for row in rounds if row[way].get(number) is not None]
            if values:
                summary[way][number] = common.low_median_high(values)

    speed = ratios_to_stock(rounds, summary, "tokens_per_second", max)
    seconds = ratios_to_stock(rounds, summary, "seconds", min)
    summary["times_stock"] = {}
    if speed:
        summary["times_stock"]["tokens_per_second"] = common.low_median_high(speed)
        summary["times_stock"]["whole_command"] = common.low_median_high([1 / ratio for ratio in seconds])
    return summary


def ratios_to_stock(rounds: list[Row], summary: Row, number: str, best: Callable[..., str]) -> list[float]:
    """Return ours divided by stock's, for each round in which both ran.

    Stock's eager and compiled runs compete: the one that is better by the median of the number is the opponent.
    """
    ran = [way for way in summary if number in summary[way]]
    medians = {way: summary[way][number][1] for way in ran if way != "ours"}
    if "ours" not in ran or not medians:
        return []
    stock = best(medians, key=medians.get)
    both = [row for row in rounds if number in row["ours"] and number in row[stock]]
    return [row["ours"][number] / row[stock][number] for row in both]


def add_table(result: Row) -> None:
    heads = ("model", "", "tokens/s", "times stock", "MFU", "peak memory", "first step, s", "complete command, s")
    rows, headline = [], []
    for model, row in result["models"].items():
        times_stock = {name: ranged(values, "{:.2f}") for name, values in row["summary"]["times_stock"].items()}
        if times_stock:
            text = f"{times_stock['tokens_per_second']} times stock LitGPT"
            headline.append([f"training step of {model}, tokens/s", text])
        for way in row["ways"]:
            if row["summary"].get(way):  # it ran
                rows.append([model, bold_ours(way), *describe_way(result, row, way, times_stock)])
    result["table"] = make_table((*heads, "times stock"), rows)
    result["headline"] = headline


def describe_way(result: Row, row: Row, way: str, times_stock: dict[str, str]) -> list[str]:
    """Return the cells of one way. Only ours has the ratios to stock."""
    numbers, ratios = row["summary"][way], times_stock if way == "ours" else {}
    return [
        ranged(numbers["tokens_per_second"]),
        ratios.get("tokens_per_second", ""),
        utilization(result, row, numbers["tokens_per_second"][1]),
        gib(numbers["peak_bytes"][2]),
        ranged(numbers["first_step_seconds"], "{:.1f}"),
        ranged(numbers["seconds"], "{:.1f}"),
        ratios.get("whole_command", ""),
    ]


def utilization(result: Row, row: Row, tokens_per_second: float) -> str:
    """Return the share of the matrix-product peak (MFU); empty if the peak is unknown or of another precision."""
    peak = result["peaks"].get("measured")
    is_other_precision = result["device"] == "cuda" and not row["precision"].startswith("bf16")
    if peak is None or is_other_precision:
        return ""
    return f"{tokens_per_second * row['flops_per_token']['causal'] / peak:.1%}"


if __name__ == "__main__":
    main()
