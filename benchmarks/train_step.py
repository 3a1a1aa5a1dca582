"""Times whole training steps: run_train.py against stock LitGPT, the same model, tokens, batches and AdamW.

    uv run python benchmarks/train_step.py                                    # the quickstart on a CPU, 5 to 9 minutes
    uv run python benchmarks/train_step.py --device cuda --models moe-200m    # an earlier run's others are kept
    uv run python benchmarks/train_step.py --device cuda --quick              # for a card that is there for minutes
    uv run python benchmarks/train_step.py --data-dir data/tinystories        # another corpus than the quickstart's

Writes benchmarks/results/train_step_DEVICE.json; benchmarks/report.py makes docs/PERFORMANCE.md of it.

Both sides are commands in processes of their own: run_train.py, and stock_pretrain.py, which is LitGPT's own
pretraining with only the changes that it needs to end well. Both read the same tokens in the same order, validate the
same batches before the first and after the last step, write no samples and save one checkpoint. First each side's
settings are tried: the micro batches (whose gradients are added up to the same batch), and for stock, at the best of
them, torch.compile. Then ours and stock's best take turns; ratios are formed within a round. If stock is best at one
setting by its steps and at another by the time of the whole command, both take part, each for its ratio. Tokens per
second are those of the second half of a run's steps, as its own log has them; "first step" is from the start of the
command, with imports, compilation and the first validation.

With --quick nothing is tried first: each side runs once with the largest micro batch, stock both compiled and not, for
a quarter of the tokens.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common import choose_device, circumstances, gpu, invocation, kept_rows, matmul_flops, write_result
from benchmarks.runs import Corpus, Failed, Run, corpus, train
from litmoe.config import parse_run
from litmoe.flops import training_flops_per_token

PACKAGES = ("torch", "litgpt", "lightning")
PEAKS = {"NVIDIA H200": {"measured": 790e12, "datasheet": 989e12}}
"""FLOP/s of dense bf16 matrix products, by a GPU's name"""
EQUAL = {
    "train.log_interval": 10,
    "train.save_interval": "null",
    "eval.initial_validation": "true",
    "eval.interval": 1_000_000_000,
    "sample.prompt": "null",
}
"""The same work beside the steps on both sides."""
VALIDATED = 64
"""Sequences of each validation: whole micro batches of each size that is tried, which eval.max_iters counts"""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    run_file: str
    flags: tuple[str, ...]
    """Beside the run file"""
    micro_batches: tuple[int, ...]
    """Tried by each side; the run file's own alone is taken for ours where ``shipped``"""
    trial_tokens: int
    tokens: int
    rounds: int
    """0: the trials are what counts"""
    shipped: bool = False
    """Ours runs as the run file has it"""


def large(run_file: str, context: int, model: str | None = None) -> Case:
    """For a GPU: 65,536 tokens a step, in four, two and one micro batches."""
    batch = 65536 // context
    flags = [f"--train.max_seq_length={context}", f"--train.global_batch_size={batch}"]
    flags += [f"--model=configs/models/{model}.yaml"] if model else []
    return Case(
        f"configs/runs/{run_file}.yaml", tuple(flags), (batch // 4, batch // 2, batch), 40 * 65536, 80 * 65536, 2
    )


QUICKSTART = Case("configs/quickstart.yaml", (), (4, 2), 50 * 1024, 150_000, 3, shipped=True)
CASES = {
    "cpu": {"quickstart": QUICKSTART},
    "cuda": {  # what matters most first
        "moe-200m": large("tinystories-moe-200m", 2048),
        "gpt2-124m": large("openwebtext-gpt2-124m", 1024),
        "moe-200m-dense-twin": large("tinystories-moe-200m", 2048, "moe-200m-dense-twin"),
        "moe-fine-32": large("tinystories-moe-200m", 2048, "moe-fine-32"),
        "quickstart": QUICKSTART,
    },
}
TRIAL_LIMIT = 200.0
"""Seconds after which a trial is given up."""


@dataclass(frozen=True)
class Way:
    """One side with its settings."""

    who: str
    """``ours`` or ``stock``"""
    micro_batch: int
    compile: bool | None = None
    """None: as the side does by itself (ours)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--models", nargs="+", help="of the device's; all when left away")
    parser.add_argument("--data-dir", type=Path, help="a prepared corpus; the quickstart's when left away")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="for trying it, with --output: this share of the tokens"
    )
    parser.add_argument("--quick", action="store_true", help="each way once, with the largest micro batch")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train_step_DEVICE.json")
    args = parser.parse_args()
    if args.scale != 1 and not args.output:
        sys.exit("error: --scale is for trying; name an --output beside it, which the published result is not.")
    cases = CASES[args.device]
    if unknown := [name for name in args.models or () if name not in cases]:
        sys.exit(f"error: no model {', '.join(unknown)} on {args.device}; there are {', '.join(cases)}.")
    choose_device(args.device)
    chosen = {name: scaled(cases[name], args.scale) for name in args.models or cases}
    if args.quick:
        chosen = {name: quick(case) for name, case in chosen.items()}
    output = args.output or ROOT / f"benchmarks/results/train_step_{args.device}.json"
    command = invocation("train_step")
    run(args.device, chosen, corpus(args.data_dir), output, command)


def scaled(case: Case, scale: float) -> Case:
    return replace(case, trial_tokens=round(scale * case.trial_tokens), tokens=round(scale * case.tokens))


def quick(case: Case) -> Case:
    """Trials that are themselves what counts."""
    tokens, micro_batch = case.tokens // 4, max(case.micro_batches)
    changed = {"micro_batches": (micro_batch,), "trial_tokens": tokens, "tokens": tokens}
    return replace(case, **changed, rounds=0, shipped=False)


def run(device: str, cases: dict[str, Case], text: Corpus, output: Path, command: str) -> dict[str, Any]:
    """Measures each model; the file is written after each trial and round: what was cut short leaves what it had."""
    result = circumstances(command, PACKAGES)
    result["hardware"] |= {"threads": torch.get_num_threads(), "gpu": gpu() if device == "cuda" else None}
    result |= {"device": device, "peaks": peaks(device), "same_on_both_sides": EQUAL}
    result["models"] = kept_rows(output, result, "models")
    started = time.perf_counter()
    for name, case in cases.items():

        def save(model: dict[str, Any], name: str = name) -> None:
            result["models"][name] = model
            result["seconds"] = round(time.perf_counter() - started, 1)
            write_result(result, output)

        measure(case, text, save)
    return result


def peaks(device: str) -> dict[str, float]:
    """FLOP/s that matrix products reach: of a GPU what is known of it, of a CPU in fp32 what it does now."""
    if device == "cpu":
        return {"measured": matmul_flops()}
    return PEAKS.get(torch.cuda.get_device_name(), {})


def measure(case: Case, text: Corpus, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Tries both sides' settings, then lets the best take turns; ``save`` gets what is there after each."""
    settings = parse_run(["--config", str(ROOT / case.run_file), *case.flags]).settings
    context = settings.train.max_seq_length or settings.model.block_size
    trials: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    ways: dict[str, Way | None] = {}

    def found() -> dict[str, Any]:
        return {
            "run_file": case.run_file,
            "flags": case.flags,
            "precision": settings.precision,
            "context": context,
            "batch": settings.train.global_batch_size,
            "tokens": case.tokens,
            "flops_per_token": {
                "causal": training_flops_per_token(settings.model, context),
                "full": training_flops_per_token(settings.model, context, causal=False),
            },
            "trials": trials,
            "ways": {name: way and asdict(way) for name, way in ways.items()},
            "rounds": rounds,
            "summary": summary(rounds),
        }

    def attempt(way: Way) -> None:
        trials.append(asdict(way) | one(way, case, text, case.trial_tokens, TRIAL_LIMIT))
        print(f"  trial {trials[-1]}", flush=True)
        if not case.rounds:
            choose()
            rounds[:] = [{name: trial_of(way, trials) for name, way in ways.items() if way}]
        save(found())

    def choose() -> None:
        steps = case.tokens / case.trial_tokens
        for trial in trials:
            if trial["status"] == "measured":  # the whole command, were it as long as the runs that count
                rest = (steps - 1) * case.trial_tokens / trial["tokens_per_second"]
                trial["expected_seconds"] = trial["seconds"] + rest
        shipped = Way("ours", settings.train.micro_batch_size) if case.shipped else None
        ways["ours"] = shipped or best(trials, "ours", "tokens_per_second")
        ways["stock"] = best(trials, "stock", "tokens_per_second")
        ways["stock by the whole command"] = best(trials, "stock", "expected_seconds")

    print(f"{settings.model.name}: {case.tokens:,} tokens", flush=True)
    for micro_batch in () if case.shipped else case.micro_batches:
        attempt(Way("ours", micro_batch))
    for micro_batch in case.micro_batches:
        attempt(Way("stock", micro_batch, compile=False))
    if eager := best(trials, "stock", "tokens_per_second"):
        attempt(Way("stock", eager.micro_batch, compile=True))
    choose()
    for _ in range(case.rounds):
        measured = {way: one(way, case, text, case.tokens) for way in dict.fromkeys(filter(None, ways.values()))}
        rounds.append({name: measured[way] for name, way in ways.items() if way})
        print("  " + "; ".join(f"{name} {row}" for name, row in rounds[-1].items()), flush=True)
        save(found())
    return found()


def trial_of(way: Way, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured in its trial."""
    found = next(trial for trial in trials if asdict(way).items() <= trial.items())
    return {key: value for key, value in found.items() if key not in {*asdict(way), "expected_seconds"}}


def one(way: Way, case: Case, text: Corpus, tokens: int, limit: float | None = None) -> dict[str, Any]:
    """One run of one side."""
    flags = [
        "--config",
        case.run_file,
        *case.flags,
        *text.flags,
        f"--train.max_tokens={tokens}",
        "--train.max_steps=null",
    ]
    flags += [f"--train.micro_batch_size={way.micro_batch}", f"--eval.max_iters={VALIDATED // way.micro_batch}"]
    flags += [f"--{name}={value}" for name, value in EQUAL.items()]
    environment = {}
    if way.who == "ours":
        flags += [] if way.compile is None else [f"--compile={str(way.compile).lower()}"]
        script = "run_train.py"
    else:
        environment = {"TORCH_COMPILE_DISABLE": "0" if way.compile else "1"}
        script = "benchmarks/stock_pretrain.py"
    try:
        return {"status": "measured"} | numbers(train(flags, script=script, environment=environment, limit=limit))
    except Failed as error:  # out of memory, or too slow
        return {"status": str(error)}


def numbers(run: Run) -> dict[str, float | None]:
    """What is kept of a run."""
    return {
        "tokens_per_second": round(run.tokens_per_second, 1),
        "seconds": round(run.seconds, 2),
        "first_step_seconds": round(run.first_step_seconds, 2),
        "peak_bytes": run.peak_bytes,
        "val_loss": run.val_loss,
    }


def best(trials: list[dict[str, Any]], who: str, by: str) -> Way | None:
    """The settings of one side with the highest (of seconds the lowest) number; None where none ran."""
    ran = [trial for trial in trials if trial["who"] == who and trial["status"] == "measured"]
    if not ran:
        return None
    chosen = (min if by.endswith("seconds") else max)(ran, key=lambda trial: trial[by])
    return Way(who, chosen["micro_batch"], chosen["compile"])


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """(lowest, median, highest) over the rounds of each number and of the ratios; a ratio above 1 is for ours."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rounds for name in row):
        ran = [row[name] for row in rounds if row[name]["status"] == "measured"]
        keys = [key for key in ran[0] if key != "status"] if ran else []
        result[name] = {key: ends([row[key] for row in ran]) for key in keys}
    by_steps = [(row["ours"], row["stock"]) for row in rounds if {"ours", "stock"} <= row.keys()]
    whole = [(row["ours"], row["stock by the whole command"]) for row in rounds if {"ours", "stock"} <= row.keys()]
    ratios = {
        "tokens_per_second": [a["tokens_per_second"] / b["tokens_per_second"] for a, b in by_steps if measured(a, b)],
        "whole_command": [b["seconds"] / a["seconds"] for a, b in whole if measured(a, b)],
    }
    return result | {"times_stock": {name: ends(values) for name, values in ratios.items() if values}}


def measured(*rows: dict[str, Any]) -> bool:
    return all(row["status"] == "measured" for row in rows)


def ends(values: list[float]) -> list[float]:
    return [min(values), median(values), max(values)]


if __name__ == "__main__":
    main()
