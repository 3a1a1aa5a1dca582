"""Trains configs/runs/shakespeare.yaml with batches for a CPU and keeps its loss curve.

    uv run python benchmarks/shakespeare.py                                  # the text from the Hub
    uv run python benchmarks/shakespeare.py --source tinyshakespeare.txt     # your copy of it

Writes benchmarks/results/shakespeare.json and docs/shakespeare.svg.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import circumstances

RUN = "configs/runs/shakespeare.yaml"
CPU_SIZE = ["--precision", "32-true", "--global-batch-size", "16"]  # an eighth of the recipe's batch, as many steps


def main() -> None:
    """Trains in a temporary folder, evaluates, writes the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="shakespeare", help="corpus or file, as prepare_data.py takes it")
    args = parser.parse_args()
    flags = " ".join(["--config", RUN, *CPU_SIZE, "--prepare.source", Path(args.source).name])
    result = circumstances(f"python run_train.py {flags}", ("torch", "litgpt", "lightning"))
    with tempfile.TemporaryDirectory() as name:
        result |= train(Path(name), args.source)
    path = ROOT / "benchmarks" / "results" / "shakespeare.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    plot(result, ROOT / "docs" / "shakespeare.svg")
    print(json.dumps({key: result[key] for key in ("seconds", "tokens", "best", "evaluation")}, indent=1))


def train(folder: Path, source: str) -> dict:
    """What came of the run."""
    out_dir = folder / "run"
    places = ["--out_dir", str(out_dir), "--tokenizer_dir", str(folder / "tokenizer"), "--prepare.source", source]
    for split in ("train", "val"):
        places += [f"--data.init_args.{split}_data_path", str(folder / "data" / split)]
    started = time.perf_counter()
    run("run_train.py", "--config", str(ROOT / RUN), *CPU_SIZE, *places, "--progress", "false")
    seconds = time.perf_counter() - started
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [
            {key: float(value) for key, value in row.items() if value and key in COLUMNS}
            for row in csv.DictReader(file)
        ]
    measured = [row for row in rows if "val_loss" in row]
    evaluation = json.loads(run("evaluate.py", str(out_dir / "final"), keep=True))
    sample = run("generate.py", str(out_dir / "final"), "--prompt", "ROMEO:", "--max_new_tokens", "200", keep=True)
    return {
        "seconds": round(seconds, 1),
        "tokens": int(rows[-1]["total_tokens"]),
        "best": {key: min(measured, key=lambda row: row["val_loss"])[key] for key in ("step", "val_loss")},
        "evaluation": {key: evaluation[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")},
        "sample": sample,
        "curve": rows,
    }


COLUMNS = ("step", "train_loss", "val_loss", "total_tokens", "time", "load_balancing_loss", "learning_rate")


def run(script: str, *flags: str, keep: bool = False) -> str:
    """Runs a door of the project; its output where it is to be kept."""
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE if keep else None, text=True, encoding="utf-8")
    return done.stdout or ""


def plot(result: dict, path: Path) -> None:
    """Training and validation loss over tokens."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "litmoe"  # the same picture from the same numbers
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        points = [(row["total_tokens"] / 1e6, row[name]) for row in result["curve"] if name in row]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(
        xlabel="million tokens",
        ylabel="loss, nats per token",
        title=f"configs/runs/shakespeare.yaml, {result['tokens'] / 1e6:.1f} M tokens on a CPU",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
