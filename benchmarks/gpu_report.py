"""Check and measure everything that runs on a GPU, the most important first, in as many minutes as there are.

    uv run python benchmarks/gpu_report.py                        # make gpu-report: 12 minutes
    uv run python benchmarks/gpu_report.py --minutes 60 --resume  # what did not fit the first time
    uv run python benchmarks/gpu_report.py --device cpu           # rehearsal on a CPU with small sizes, 10 minutes
    uv run python benchmarks/gpu_report.py --packages             # what a machine without network needs besides torch

Each part is a benchmark of its own, and its result file is written while it runs. A part that does not fit into the
remaining time is skipped, one that takes too long is stopped, and one that fails does not stop the others. After each
part, report.md contains all tables so far, in a form that can be pasted into an issue.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common
from benchmarks.common import RESULTS, Row, make_table, markdown

# What the parts import, besides torch and what it brings.
PACKAGES = (
    *("docstring-parser", "filelock", "huggingface-hub", "jsonargparse", "lightning", "lightning-utilities", "litgpt"),
    *("numpy", "psutil", "pyyaml", "rich", "safetensors", "tiktoken", "tokenizers", "torchao", "torchmetrics", "tqdm"),
    *("transformers", "typeshed-client"),
)


class Part(NamedTuple):
    """One command."""

    name: str
    result: str  # name of its result file, without the device
    seconds: float  # a guess of what it takes on an H200; a part starts only if that much time is left
    command: str
    rehearsal: str  # the same with small sizes for a CPU; empty if another part runs the same code


ONE_SEED = "--equal seconds --seeds 1 --rounds 1"
OURS_ONLY = "--models moe-200m-dense-twin moe-200m-muon --ways ours"
MOE_200M = "--model configs/models/moe-200m.yaml"
QUICKSTART = "--model configs/models/quickstart.yaml"
PARTS = (
    Part("checks", "gpu_checks", 90, "gpu_checks.py", "gpu_checks.py"),
    Part(
        *("training step", "train_step", 180),
        *("train_step.py --quick --models moe-200m", "train_step.py --quick --models quickstart"),
    ),
    Part(
        *("training step, dense twin and Muon", "train_step", 100),
        *(f"train_step.py --quick {OURS_ONLY}", "train_step.py --quick --models quickstart-muon --ways ours"),
    ),
    Part("memory", "gpu_memory", 150, "gpu_memory.py", "gpu_memory.py"),
    Part("layer", "moe_layer", 60, "moe_layer.py --quick", "moe_layer.py --quick"),
    Part("loss", "loss", 40, "loss.py", "loss.py --tokens 1024 --n-embd 144 --vocab 2048"),
    Part(
        *("generation", "generation_moe-200m", 60),
        *(f"generation.py {MOE_200M} --rounds 3", f"generation.py {QUICKSTART} --rounds 1 --new-tokens 16"),
    ),
    Part("training step of GPT-2", "train_step", 150, "train_step.py --quick --models gpt2-124m", ""),
    Part(
        *("profile", "step_profile_moe-200m", 40),
        *(f"step_profile.py {MOE_200M} --batch 8", "step_profile.py --steps 1"),
    ),
    Part(
        *("learning", "learning", 200),
        *(f"learning.py --minutes 0.5 {ONE_SEED}", f"learning.py --minutes 0.05 {ONE_SEED}"),
    ),
)


def main() -> None:
    parser = common.make_parser(__doc__, "gpu_report_DEVICE")
    parser.set_defaults(device="cuda", output=None)
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--resume", action="store_true", help="skip the parts that an earlier report contains")
    parser.add_argument("--packages", action="store_true", help="print the packages that are needed besides torch")
    args = parser.parse_args()
    if args.packages:
        print("\n".join(needed_packages()))
        return
    if args.output is None:
        # A rehearsal must not replace real results.
        args.output = (RESULTS if args.device == "cuda" else RESULTS / "rehearsal") / "gpu_report.json"
    deadline = time.monotonic() + 60 * args.minutes
    report = common.start(args, "torch", "triton", "litgpt", "lightning")
    report["parts"] = earlier_parts(args.output, report) if args.resume else {}
    for part in PARTS:
        is_done = report["parts"].get(part.name, {}).get("status") == "done"
        is_left_out = (args.only and part.name not in args.only) or (args.device == "cpu" and not part.rehearsal)
        if is_done or is_left_out:
            continue
        report["parts"][part.name] = run_part(part, args, deadline - time.monotonic())
        common.write_result(report, args.output)
        args.output.with_suffix(".md").write_text(describe(report, args.output.parent), encoding="utf-8", newline="\n")
    print(f"\nThe report, to paste into an issue: {args.output.with_suffix('.md')}\n")
    print(describe(report, args.output.parent))
    if any(part["status"] == "failed" for part in report["parts"].values()):
        sys.exit("error: some parts failed; the report names them.")


def earlier_parts(path: Path, report: Row) -> Row:
    """Return the parts of an earlier report, each with its commit."""
    if not path.exists():
        sys.exit(f"error: --resume found no earlier report {path}. Run without --resume.")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if not common.is_comparable(earlier, report):
        sys.exit(f"error: {path} is from other hardware or other versions. Run without --resume.")
    return {name: {"commit": earlier["commit"], **part} for name, part in earlier["parts"].items()}


def run_part(part: Part, args: argparse.Namespace, seconds_left: float) -> Row:
    """Run a part, or skip it if the time is too short. Its output goes to the terminal."""
    script, *flags = (part.command if args.device == "cuda" else part.rehearsal).split()
    # train_step.py keeps the models of its earlier calls.
    output = args.output.with_name(f"{part.result}_{args.device}.json")
    # A rehearsal takes another time.
    if seconds_left < (part.seconds if args.device == "cuda" else 1):
        return {
            "status": "skipped",
            "note": f"needs about {part.seconds:.0f} s, {max(0, seconds_left):.0f} s were left",
        }
    command = [f"benchmarks/{script}", *flags, f"--device={args.device}", f"--output={output}"]
    print(f"\n== {part.name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        try:
            code = process.wait(seconds_left)
            note = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            note = f"stopped after {seconds_left:.0f} s; its results so far are kept"
        finally:
            end_tree(process)
    result = {"status": "failed" if note else "done", "seconds": round(time.monotonic() - start, 1), "note": note}
    return result | {"output": output.name, "command": " ".join(command)}


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and the training runs that it started."""
    import psutil

    if process.poll() is not None:
        return
    for member in (*psutil.Process(process.pid).children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):  # it ended with its parent
            member.kill()


# -------------------------------------------------------------------------------------------------------------- report


def describe(report: Row, folder: Path) -> str:
    """Return the report as Markdown: hardware and versions, what ran, and the tables."""
    hardware, gpu = report["hardware"], report["hardware"]["gpu"]
    device = f"{hardware['cpu']}, {hardware['cores']} cores (rehearsal)"
    if gpu:
        device = f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"{device}; {versions}; commit {report['commit']}; {report['date'][:10]}", ""]
    rows = []
    for name, part in report["parts"].items():
        commit = part.get("commit", report["commit"])
        notes = [part["note"], f"commit {commit}" if commit != report["commit"] else ""]
        rows.append([name, part["status"], part.get("seconds", ""), "; ".join(filter(None, notes))])
    lines += markdown(make_table(("part", "", "seconds", ""), rows))
    for name in dict.fromkeys(part["output"] for part in report["parts"].values() if "output" in part):
        if (folder / name).exists():
            table = json.loads((folder / name).read_text(encoding="utf-8")).get("table")
            lines += ["", f"**{name.removesuffix('.json')}**", "", *(markdown(table) if table else ["no table"])]
    return "\n".join(lines) + "\n"


def needed_packages() -> list[str]:
    """Return the installed versions of ``PACKAGES`` as `name==version`."""
    return [f"{name}=={version(name)}" for name in PACKAGES]


if __name__ == "__main__":
    main()
