"""What the quickstart's defaults are worth: each choice against its alternatives, three seeds each, on a CPU.

    uv run python benchmarks/ablations.py                       # 8 to 15 minutes
    uv run python benchmarks/ablations.py --only default Muon   # some of the rows; an earlier run's others are kept

Writes benchmarks/results/ablations.json; benchmarks/report.py makes the table of docs/PERFORMANCE.md.

All are runs of run_train.py with configs/quickstart.yaml and a few flags, equally many tokens and the whole schedule.
A seed decides the weights and the order of the data, and differences are formed between runs of the same seed. Where a
choice has a rate of its own, the best of its grid with the first seed is taken with the others, too.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common import choose_device, circumstances, invocation, kept_rows, write_result
from benchmarks.moe_vs_dense import outcome, seeded
from benchmarks.runs import SEEDS, Corpus, Failed, Row, corpus, curve, spread, train

PACKAGES = ("torch", "litgpt", "lightning")
CONFIG = "configs/quickstart.yaml"
OUTPUT = ROOT / "benchmarks/results/ablations.json"
TOKENS = 120_000
SIGMOID = [
    *("--model.n_expert_groups=2", "--model.n_topk_groups=2", "--model.n_topk_scores_per_group=2"),
    *("--model.norm_topk_prob=true", "--moe.load_balancing_loss=0"),
]
MUON = {"class_path": "litmoe.train.muon.Muon", "init_args": {"adamw_lr": 2.0e-3, "weight_decay": 0.1}}


@dataclass(frozen=True)
class Choice:
    """A row: the flags that make it, and the values of the one that is tuned."""

    question: str
    """What it is an answer to; the default is one too"""
    flags: tuple[str, ...] = ()
    tuned: str | None = None
    """A flag without its value"""
    grid: tuple[float, ...] = ()


CHOICES = {
    "default": Choice("softmax router with both balance losses, AdamW, 8 experts top-2, no QK-norm"),
    "selection bias": Choice("balance", tuple(SIGMOID), "--moe.bias_update_rate", (0.001,)),
    "no balancing": Choice("balance", ("--moe.load_balancing_loss=0", "--moe.z_loss=0")),
    "AdamW at a higher rate": Choice("rate", (), "--optimizer.init_args.lr", (8e-3,)),
    "Muon": Choice("optimizer", (f"--optimizer={json.dumps(MUON)}",), "--optimizer.init_args.lr", (0.02,)),
    "32 experts, top-8": Choice(
        "experts", ("--model.n_expert=32", "--model.n_expert_per_token=8", "--model.moe_intermediate_size=48")
    ),
    "QK-norm": Choice("attention", ("--model.norm_qk=true",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CHOICES), default=list(CHOICES), metavar="ROW")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seeds", type=int, choices=SEEDS, default=3, metavar="N")
    parser.add_argument("--data-dir", type=Path, help="a prepared corpus; the quickstart's when left away")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    choose_device("cpu")
    result = circumstances(invocation("ablations"), PACKAGES)
    result["hardware"] |= {"threads": torch.get_num_threads()}
    result |= {"run_file": CONFIG, "tokens": args.tokens, "seeds": args.seeds}
    text, started = corpus(args.data_dir), time.perf_counter()
    rows = kept_rows(args.output, result, "rows", "tokens", "seeds")
    for name in args.only:
        rows[name] = measure(name, args.tokens, args.seeds, text)
        result |= {"rows": with_differences({name: rows[name] for name in CHOICES if name in rows})}
        write_result(result | {"seconds": round(time.perf_counter() - started, 1)}, args.output)


def measure(name: str, tokens: int, seeds: int, text: Corpus) -> dict[str, Any]:
    """A row's runs, its rate found first where it has one."""
    choice = CHOICES[name]
    settings = [(*choice.flags, f"{choice.tuned}={value}") for value in choice.grid] or [choice.flags]
    tried: dict[int, dict[str, Any]] = {}
    failed = ""
    for index, flags in enumerate(settings):
        try:
            tried[index] = one(flags, 0, tokens, text)
        except Failed as error:  # a rate that is too high, say
            failed = str(error)
    try:
        if not tried:
            raise Failed(failed)
        best = min(tried, key=lambda index: tried[index]["bits_per_byte"])
        runs = [tried[best], *(one(settings[best], seed, tokens, text) for seed in range(1, seeds))]
    except Failed as error:
        return {"question": choice.question, "status": str(error)}
    grid = {str(choice.grid[index]): row["bits_per_byte"] for index, row in tried.items() if choice.grid}
    row = {
        "question": choice.question,
        "status": "measured",
        "flags": settings[best],
        "tuned": choice.tuned,
        "chosen": choice.grid[best] if choice.grid else None,
        "grid": grid,
    }
    print(name, {key: value for key, value in row.items() if key != "flags"}, flush=True)
    return row | {"runs": runs}


def one(flags: Sequence[str], seed: int, tokens: int, text: Corpus) -> dict[str, Any]:
    """One run."""
    flags = ["--config", CONFIG, *flags, *text.flags, *seeded(seed), f"--train.max_tokens={tokens}"]
    flags += ["--train.save_interval=null", "--checkpoint.every_minutes=null", "--sample.prompt=null"]
    flags += ["--train.log_interval=50", "--eval.interval=1000000000", "--eval.max_iters=50"]
    rows = train(flags).rows
    row = {"seed": seed, **outcome(curve(rows), text), **balance(rows)}
    print(f"  {row}", flush=True)
    return row


def balance(rows: Sequence[Row]) -> dict[str, float]:
    """How evenly the experts are used at the end: the busiest one's load over the mean load, a mean over layers."""
    last = next(row for row in reversed(rows) if "train_loss" in row)
    loads = [value for name, value in last.items() if name.startswith("expert_load_max/")]
    dead = [value for name, value in last.items() if name.startswith("dead_experts/")]
    return {"busiest_expert": round(mean(loads), 3), "dead_experts": sum(dead)}


def with_differences(rows: dict[str, Any]) -> dict[str, Any]:
    """Each row's mean, and its difference to the default's run of the same seed; below 0 is better."""
    default = rows.get("default", {}).get("runs")
    for row in rows.values():
        if "runs" in row:
            values = [run["bits_per_byte"] for run in row["runs"]]
            row["bits_per_byte"] = spread(values)._asdict()
            row["tokens_per_second"] = spread([run["tokens_per_second"] for run in row["runs"]])._asdict()
            if default and row["runs"] is not default:
                pairs = zip(values, default, strict=True)
                row["difference"] = spread([value - run["bits_per_byte"] for value, run in pairs])._asdict()
    return rows


if __name__ == "__main__":
    main()
