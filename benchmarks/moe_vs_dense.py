"""A mixture of experts against its dense twin: bits per byte at equal tokens and at equal seconds.

    uv run python benchmarks/moe_vs_dense.py                  # the quickstart's model, on a CPU, 6 to 11 minutes
    uv run python benchmarks/moe_vs_dense.py --tokens 2000000 --learning-rates 1e-3 2e-3 4e-3 \\
      --output benchmarks/results/moe_vs_dense_long_cpu.json  # its own length, an hour
    uv run python benchmarks/moe_vs_dense.py --device cuda    # MoE-200M; another one with --config, --dense, --tokens
    uv run python benchmarks/moe_vs_dense.py --train.global_batch_size 8    # further flags go to run_train.py

Writes benchmarks/results/moe_vs_dense_DEVICE.json; benchmarks/report.py makes its table and plot. The file is
written after each run; a run that fails is on record in it, and as a rate of the grid just not the best.

The twin's feed-forward is as wide as the experts that work on one token, so both have the same active parameters. All
runs are run_train.py's, with the whole learning-rate schedule each. For both models each learning rate of one grid is
tried with the first seed, and the best, by the validation loss at the end, is taken with the others. At equal tokens
the dense model is done sooner; for equal seconds it gets more tokens, as many more as it was faster in the runs before,
and a schedule of that length. A seed decides the weights and the order of the data, which is the same for both models.
All validate on the same tokens. Seconds are those of training, without start, validation and saving.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common import choose_device, circumstances, gpu, invocation, write_result
from benchmarks.runs import SEEDS, Corpus, Failed, Point, corpus, curve, interpolate, spread, train
from litmoe.config import parse_run
from litmoe.flops import count_parameters

PACKAGES = ("torch", "litgpt", "lightning")
VALIDATIONS = 6


@dataclass(frozen=True)
class Preset:
    """What is compared where nothing else is asked for."""

    config: str
    dense: str
    tokens: int
    learning_rates: tuple[float, ...]
    flags: tuple[str, ...] = ()
    """Beside the run file, for both"""


PRESETS = {
    "cpu": Preset("configs/quickstart.yaml", "configs/models/quickstart-dense-twin.yaml", 200_000, (4e-3, 8e-3)),
    "cuda": Preset(
        "configs/runs/tinystories-moe-200m.yaml",
        "configs/models/moe-200m-dense-twin.yaml",
        16_000_000,
        (3e-4, 6e-4, 1.2e-3),
        ("--train.lr_warmup_steps=50", "--train.micro_batch_size=32"),  # the run file is for 60 times as many tokens
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is run_train.py's
    )
    parser.add_argument("--device", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--config", help="run file of the mixture of experts")
    parser.add_argument("--dense", help="model file of its dense twin")
    parser.add_argument("--tokens", type=int, help="of each run at equal tokens")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the grid")
    parser.add_argument("--seeds", type=int, choices=SEEDS, default=3, metavar="N")
    parser.add_argument("--data-dir", type=Path, help="a prepared corpus; the quickstart's when left away")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/moe_vs_dense_DEVICE.json")
    args, further = parser.parse_known_args()
    choose_device(args.device)
    preset = PRESETS[args.device]
    chosen = Preset(
        args.config or preset.config,
        args.dense or preset.dense,
        args.tokens or preset.tokens,
        tuple(args.learning_rates or preset.learning_rates),
        (*(() if args.config else preset.flags), *further),
    )
    output = args.output or ROOT / f"benchmarks/results/moe_vs_dense_{args.device}.json"
    result = circumstances(invocation("moe_vs_dense"), PACKAGES)
    result["hardware"] |= {
        "threads": torch.get_num_threads(),
        "gpu": gpu() if args.device == "cuda" else None,
    }
    started = time.perf_counter()

    def save(found: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - started, 1)
        write_result(result | {"device": args.device} | found | {"seconds": seconds}, output)

    try:
        compare(chosen, args.seeds, corpus(args.data_dir), save)
    except Failed as error:
        sys.exit(f"error: {error}")


def compare(preset: Preset, seeds: int, text: Corpus, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All runs, and what comes of them; ``save`` gets what is there after each run.

    Raises:
        Failed: where a model's runs failed at every learning rate.
    """
    models = {"MoE": [], "dense": [f"--model={preset.dense}"]}
    parsed = {name: parse_run(["--config", preset.config, *flags, *preset.flags]) for name, flags in models.items()}
    settings = {name: run.settings for name, run in parsed.items()}
    train_args = settings["MoE"].train
    floor = train_args.min_lr / parsed["MoE"].optimizer["init_args"]["lr"]
    step = train_args.global_batch_size * (train_args.max_seq_length or settings["MoE"].model.block_size)
    tied = bool(train_args.tie_embeddings)
    grid, failed = [], []
    equal: dict[str, list[dict[str, Any]]] = {"tokens": [], "seconds": []}
    found: dict[str, Any] = {
        "run_file": preset.config,
        "flags": preset.flags,
        "models": {
            name: {"name": of_run.model.name, **count_parameters(of_run.model, tie_embeddings=tied)._asdict()}
            for name, of_run in settings.items()
        },
        "grid": grid,
        "failed": failed,
    }

    def go(model: str, rate: float, seed: int, tokens: int, runs: list[dict[str, Any]]) -> None:
        interval = max(1, tokens // step // VALIDATIONS)
        flags = ["--config", preset.config, *models[model], *preset.flags, *text.flags, *seeded(seed)]
        flags += [f"--train.max_tokens={tokens}", "--train.max_steps=null", "--train.save_interval=null"]
        flags += ["--checkpoint.every_minutes=null"]
        flags += [f"--optimizer.init_args.lr={rate}", f"--train.min_lr={rate * floor}"]
        flags += [f"--eval.interval={interval}", f"--train.log_interval={interval}", "--eval.max_iters=25"]
        row = {"model": model, "learning_rate": rate, "seed": seed, "max_tokens": tokens}
        try:
            row |= outcome(curve(train([*flags, "--sample.prompt=null"]).rows), text)
            runs.append(row)
        except Failed as error:  # a rate that is too high, say
            failed.append(row | {"status": str(error)})
        print(f"  { ({**row, 'curve': row.get('curve', failed)[-1]}) }", flush=True)
        for by, equal_runs in equal.items():
            found[f"equal_{by}"] = {"runs": equal_runs, **verdict(equal_runs, by)}
        save(found)

    for rate in preset.learning_rates:
        for name in models:
            go(name, rate, 0, preset.tokens, grid)
    rates = {name: best_rate(grid, name) for name in models}
    found["learning_rates"] = rates
    found["on_the_edge"] = sorted(name for name, rate in rates.items() if rate in edges(preset.learning_rates))
    equal["tokens"] += [row for row in grid if row["learning_rate"] == rates[row["model"]]]
    for seed in range(1, seeds):
        for name in models:
            go(name, rates[name], seed, preset.tokens, equal["tokens"])
    speeds = {name: median(row["tokens_per_second"] for row in of(equal["tokens"], name)) for name in models}
    found["tokens_per_second"] = speeds
    longer = round(preset.tokens * speeds["dense"] / speeds["MoE"])
    equal["seconds"] += of(equal["tokens"], "MoE")
    for seed in range(seeds):
        go("dense", rates["dense"], seed, longer, equal["seconds"])
    return found


def seeded(seed: int) -> list[str]:
    """Flags: the weights and the order of the data."""
    return [f"--seed={seed}", f"--data.init_args.seed={seed}"]


def outcome(points: Sequence[Point], text: Corpus) -> dict[str, Any]:
    """What is kept of a run: its curve as (tokens, seconds, bits per byte), and its end."""
    last = points[-1]
    return {
        "bits_per_byte": text.bits_per_byte(last.loss),
        "tokens": last.tokens,
        "seconds": round(last.seconds, 2),
        "tokens_per_second": round(last.tokens / last.seconds, 1),
        "curve": [
            [point.tokens, round(point.seconds, 2), round(text.bits_per_byte(point.loss), 5)] for point in points
        ],
    }


def best_rate(grid: Sequence[dict[str, Any]], model: str) -> float:
    """The learning rate with which the model ended best."""
    if not (runs := of(grid, model)):
        raise Failed(f"the {model} model failed at every learning rate.")
    return min(runs, key=lambda row: row["bits_per_byte"])["learning_rate"]


def edges(rates: Sequence[float]) -> set[float]:
    """A best rate that is one of these may have a better one beyond it."""
    return {min(rates), max(rates)}


def of(runs: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [row for row in runs if row["model"] == model]


def verdict(runs: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    """Means at the end, and MoE less dense of the same seed: at the end, and on the way; nothing without a pair.

    Args:
        by: ``tokens`` or ``seconds``, what is equal.
    """
    pairs = [(moe, dense) for moe in of(runs, "MoE") for dense in of(runs, "dense") if moe["seed"] == dense["seed"]]
    if not pairs:
        return {}
    column = {"tokens": 0, "seconds": 1}[by]
    on_the_way = {}
    for share in (0.25, 0.5, 0.75):
        differences = []
        for pair in pairs:
            curves = [[(point[column], point[2]) for point in row["curve"]] for row in pair]
            values = [interpolate(points, share * min(c[-1][0] for c in curves)) for points in curves]
            if None not in values:
                differences.append(values[0] - values[1])
        if differences:
            on_the_way[f"{share:.0%}"] = spread(differences)._asdict()
    return {
        "means": {
            name: spread([pair[index]["bits_per_byte"] for pair in pairs])._asdict()
            for index, name in enumerate(("MoE", "dense"))
        },
        "difference": spread([moe["bits_per_byte"] - dense["bits_per_byte"] for moe, dense in pairs])._asdict(),
        "difference_on_the_way": on_the_way,
        by: [[moe[by], dense[by]] for moe, dense in pairs],
    }


if __name__ == "__main__":
    main()
