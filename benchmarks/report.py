"""Write the tables of benchmarks/results/ into the documents.

    uv run python benchmarks/report.py      # after a measurement; a test fails if a document is outdated

A table is inserted between the lines `<!-- begin:NAME -->` and `<!-- end:NAME -->` of README.md and docs/*.md, where
NAME is a key of BLOCKS below. The text around the markers is written by hand. To add a table: write a function that
returns its lines, and add a line to BLOCKS. Needs no package besides Python's own.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import Lines, Row, gib, machine, plus_minus, ranged, table, verdict

RESULTS = ROOT / "benchmarks" / "results"
MARKERS = re.compile(r"(<!-- begin:([\w-]+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
Results = dict[str, Row]  # the result files by name, without .json


def main() -> None:
    results = load_results(RESULTS)
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = insert_tables(old, results)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"Updated {path.relative_to(ROOT)}")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load_results(folder: Path) -> Results:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def insert_tables(text: str, results: Results) -> str:
    """Return a document with every block between markers written anew."""

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            sys.exit(f"error: there is no table {name!r}. Known tables: {', '.join(sorted(BLOCKS))}.")
        return "".join([begin, *(f"{line}\n" for line in BLOCKS[name](results)), end])

    return MARKERS.sub(block, text)


def not_measured(script: str) -> Lines:
    return [f"Not measured yet: `uv run python benchmarks/{script}`"]


# ------------------------------------------------------------------------------------------------- README: one overview


def overview(results: Results) -> Lines:
    """The most important number of each benchmark with its hardware."""
    quickstart = results["quickstart"]
    loss = f"{quickstart['val_loss']} nats per token, {quickstart['bits_per_byte']} bits per byte"
    rows = [["quickstart, from a fresh clone to a story", f"{quickstart['clone_to_story_seconds']} s", "Xeon"]]
    for cpu in ("Xeon", "EPYC"):
        seconds, speed = (quickstart[key][cpu] for key in ("training_seconds", "tokens_per_second"))
        name = f"quickstart training, {quickstart['tokens'] / 1e6:.1f} M tokens"
        rows.append([name, f"{seconds} s, {speed:,} tokens/s", cpu])
    rows.append(["quickstart validation loss", loss, "Xeon"])

    data = results["data_prep"]
    speed = data["tokens_per_second"]
    text = f"{speed['ours']:,} against {speed['TextFiles']:,} tokens/s: {data['times_textfiles']} times"
    name = f"tokenizing {data['text_bytes'] / 1e6:.0f} MB, against LitGPT's `TextFiles`"
    rows.append([name, text, short_machine(data)])

    for result in of_devices(results, "train_step"):
        for model, row in result["models"].items():
            ratio = row["summary"]["times_stock"].get("tokens_per_second")
            text = f"{ranged(ratio, '{:.2f}')} times the tokens/s" if ratio else "stock LitGPT failed"
            rows.append([f"training step of {model}, against stock LitGPT", text, short_machine(result)])
    for result in of_devices(results, "moe_layer"):
        speedups = [case["layers"]["ours"]["speedup"][1] for case in timed_cases(result)]
        text = f"{min(speedups):.2f} to {max(speedups):.2f} times the speed"
        rows.append(["MoE layer, against LitGPT's", text, short_machine(result)])
    for result in of_devices(results, "generation"):
        single = result["batches"]["1"]
        ours, stock = (single[name]["tokens_per_second"][1] for name in ("ours", "litgpt generate"))
        text = f"{ours:,.0f} against {stock:,.0f} tokens/s: {single['ours']['speedup'][1]:.2f} times"
        rows.append(["generation at batch size 1, against `litgpt generate`", text, short_machine(result)])

    twin, saving = results["moe_vs_dense_long_cpu"], results["checkpoint_cpu"]
    difference = twin["equal_seconds"]["difference"]
    text = f"{plus_minus(difference)} bits per byte: {verdict(difference)}"
    rows.append(["MoE against its dense twin at equal time", text, short_machine(twin)])
    share = plus_minus(saving["share_at_one_a_minute"], "{:.2%}")
    rows.append(["one save per minute during training", f"{share} of the time", short_machine(saving)])
    hardware = "Xeon: Intel Xeon with AVX-512, 2026-11-21. EPYC: AMD EPYC 7003, 2026-11-28."
    hardware += " Each: 2 cores of a virtual machine."
    return [*table(("what", "result", "hardware"), rows), "", hardware]


def of_devices(results: Results, name: str) -> list[Row]:
    """Return the results of a benchmark on the devices that were measured."""
    files = (f"{name}_{device}" for device in ("cpu", "cuda"))
    return [results[file] for file in files if file in results]


def short_machine(result: Row) -> str:
    """Return EPYC, Xeon, or the name of the GPU or another CPU."""
    name = machine(result)
    return next((short for short in ("EPYC", "Xeon") if short in name), name)


def measurements(results: Results) -> Lines:
    """Which file was measured where, when, and with which command."""
    rows = []
    for name, result in results.items():
        if "commit" in result:
            link = f"[{name}](../benchmarks/results/{name}.json)"
            command = result["command"].removeprefix("uv run ")
            rows.append([link, machine(result), result["date"][:10], f"`{result['commit']}`", f"`{command}`"])
    return table(("result", "hardware", "date", "commit", "command"), rows)


# ------------------------------------------------------------------------------------------------------- training steps


def train_step(results: Results, device: str) -> Lines:
    result = results.get(f"train_step_{device}")
    if result is None:
        return not_measured(f"train_step.py --device {device}")
    rows = []
    for model, row in result["models"].items():
        ways = list(row["ways"])
        for name in ways:
            numbers, way = row["summary"].get(name), row["ways"][name]
            is_repeated = name != "stock" and way == row["ways"].get("stock")
            if not numbers or is_repeated:
                continue
            times = row["summary"]["times_stock"] if name == "ours" else {}
            rows.append(
                [
                    model,
                    f"**{name}**" if name == "ours" else name,
                    ranged(numbers["tokens_per_second"]),
                    ranged(times["tokens_per_second"], "{:.2f}") if "tokens_per_second" in times else "",
                    utilization(result, row, numbers),
                    gib(numbers["peak_bytes"][2]),
                    ranged(numbers["first_step_seconds"], "{:.1f}"),
                    ranged(numbers["seconds"], "{:.1f}"),
                    ranged(times["whole_command"], "{:.2f}") if "whole_command" in times else "",
                ]
            )
    heads = ["model", "", "tokens/s", "times stock", "MFU", "peak memory", "first step, s", "whole command, s"]
    return table([*heads, "times stock"], rows)


def utilization(result: Row, row: Row, numbers: Row) -> str:
    """Return the share of the matrix-product peak; empty if the peak is unknown or of another precision."""
    peak = result["peaks"].get("measured")
    if not peak or (result["device"] == "cuda" and not row["precision"].startswith("bf16")):
        return ""
    return f"{numbers['tokens_per_second'][1] * row['flops_per_token']['causal'] / peak:.1%}"


# ------------------------------------------------------------------------------------------------------------ the layer


def timed_cases(result: Row) -> list[Row]:
    return [case for case in result["cases"] if "speedup" in case["layers"].get("ours", {})]


def case_size(case: Row) -> str:
    sizes = (case[key] for key in ("n_embd", "intermediate_size", "n_expert", "n_expert_per_token"))
    skewed = ", skewed routing" if case["routing"] == "skewed" else ""
    return f"({', '.join(map(str, sizes))}){skewed}"


def layer_cases(results: Results, device: str) -> list[Row] | None:
    result = results.get(f"moe_layer_{device}")
    return timed_cases(result) if result else None


def layer_table(results: Results, device: str, cell: Callable[[Row, Row], str]) -> Lines:
    """One table per precision and token count: a row for each layer, a column for each size."""
    cases = layer_cases(results, device)
    if cases is None:
        return not_measured(f"moe_layer.py --device {device}")
    groups: dict[str, list[Row]] = {}
    for case in cases:
        title = f"{case['precision']}, {case['tokens']:,} tokens"
        groups.setdefault(title, []).append(case)
    lines: Lines = []
    for title, group in groups.items():
        names = max((list(case["layers"]) for case in group), key=len)
        rows = []
        for name in names:
            cells = [cell(case, case["layers"].get(name, {})) for case in group]
            if any(cells):
                rows.append([f"**{name}**" if name == "ours" else name, *cells])
        lines += [f"{title}:", "", *table(["", *map(case_size, group)], rows), ""]
    return lines[:-1]


def layer_speed(results: Results, device: str) -> Lines:
    def cell(case: Row, layer: Row) -> str:
        return f"{layer['speedup'][1]:.2f}" if "speedup" in layer else ""

    return layer_table(results, device, cell)


def layer_memory(results: Results) -> Lines:
    """What autograd keeps for the backward, in fp32 on a CPU."""
    cases = [case for case in layer_cases(results, "cpu") or [] if case["precision"] == "fp32"]
    cases = [case for case in cases if case["routing"] == "even"]
    rows = []
    for name in ("LitGPT", "ours", "plain grouped_mm", "dense"):
        kept = [f"{case['layers'][name]['saved_bytes_per_token'] / 1024:.0f}" for case in cases]
        rows.append([f"**{name}**" if name == "ours" else name, *kept])
    return table(["KiB per token", *map(case_size, cases)], rows)


# ----------------------------------------------------------------------------------------------------------------- data


def data_prepare(results: Results) -> Lines:
    result = results["data_prep"]
    rows = []
    for side, name in (("TextFiles", "LitGPT's `TextFiles`"), ("ours", "**`prepare_data.py`**")):
        seconds = ", ".join(f"{value:.2f}" for value in result["seconds"][side])
        memory = f"{max(result['peak_memory_gb'][side]):.2f} GB"
        rows.append([name, seconds, f"{result['tokens_per_second'][side]:,}", memory])
    return table(("", "seconds", "tokens/s", "peak memory"), rows)


def data_memory(results: Results) -> Lines:
    rows = []
    for run in results["data_memory"]["runs"]:
        size = f"{run['text_bytes'] / 1e6:,.0f} MB"
        rows.append([size, f"{run['tokens_per_second']:,}", f"{run['peak_memory_mb']:.0f} MB"])
    return table(("parquet", "tokens/s", "peak memory"), rows)


def data_read(results: Results) -> Lines:
    rows = []
    for row in results["data_read"]["rows"]:
        speed, first = row["tokens_per_second"], row["first_batch_seconds"]
        batch = f"{row['model']}: {row['micro_batch']} x {row['context']:,}"
        cells = [f"{speed[side]:,}" if side in speed else "" for side in ("ours", "LitData")]
        rows.append([batch, row["workers"], *cells, f"{1000 * first['ours']:,.1f}"])
    heads = ("micro batch", "workers", "ours, tokens/s", "LitGPT's LitData, tokens/s", "our first batch, ms")
    return table(heads, rows)


# ----------------------------------------------------------------------------------------------------- model quality


def moe_vs_dense(results: Results) -> Lines:
    rows = []
    for name, title in (
        ("moe_vs_dense_cpu", "quickstart, short runs"),
        ("moe_vs_dense_long_cpu", "quickstart, full length"),
        ("moe_vs_dense_cuda", "MoE-200M on a GPU"),
    ):
        for equal in ("tokens", "seconds"):
            runs = results.get(name, {}).get(f"equal_{equal}", {})
            if "difference" not in runs:
                rows.append([title, f"equal {equal}", "not measured yet", "", "", "", ""])
                continue
            means = [f"{runs['means'][model]['mean']:.4f}" for model in ("MoE", "dense")]
            spent = []
            for model in ("MoE", "dense"):
                own = [run for run in runs["runs"] if run["model"] == model]
                tokens, seconds = mean(run["tokens"] for run in own), mean(run["seconds"] for run in own)
                spent.append(f"{tokens / 1e6:.2f} M in {seconds:.0f} s")
            difference = f"{plus_minus(runs['difference'])}: {verdict(runs['difference'])}"
            rows.append([title, f"equal {equal}", *means, difference, *spent])
    heads = ("runs", "", "MoE", "dense", "MoE minus dense", "tokens of the MoE", "tokens of the dense model")
    return table(heads, rows)


def ablations(results: Results) -> Lines:
    rows = []
    for name, row in results["ablations_cpu"]["rows"].items():
        if row["status"] != "measured":
            rows.append([name, row["status"], "", "", ""])
            continue
        score, difference = row["bits_per_byte"], row.get("difference")
        rows.append(
            [
                f"**{name}**" if name == "default" else name,
                f"{score['mean']:.4f} ± {score['deviation']:.4f}",
                f"{plus_minus(difference)}: {verdict(difference)}" if difference else "",
                f"{row['tokens_per_second']['mean']:,.0f}",
                f"{mean(run['busiest_expert'] for run in row['runs']):.2f}",
            ]
        )
    return table(("", "bits per byte", "minus the default's", "tokens/s", "busiest expert, times the mean"), rows)


def low_memory(results: Results) -> Lines:
    rows = []
    for name, way in results["low_memory_cpu"]["ways"].items():
        loss = f"{mean(way['val_losses']):.4f}"
        over = plus_minus(way["loss_over_fp32"], "{:+.2%}") if way["flags"] else ""
        rows.append([name, loss, over, f"{way['weights_mb']} MB", f"{way['optimizer_mb']} MB", f"{way['seconds']:.0f}"])
    return table(("", "validation loss", "over fp32's", "weights", "optimizer state", "seconds"), rows)


def finetuning(results: Results) -> Lines:
    rows = []
    for name, key in (("as pretrained", "before"), ("all weights", "all weights"), ("LoRA of rank 16", "LoRA")):
        row = results["finetuning"][key]
        seconds = f"{row['seconds']} s" if "seconds" in row else ""
        rows.append([name, f"{row['loss']:.4f}", row["ended_by_themselves"], row["used_the_names"], seconds])
    heads = ("tuned", "loss on the answers, nats per token", "of 50 answers, end with the end-of-text token")
    return table([*heads, "use the names asked for", "time"], rows)


# ------------------------------------------------------------------------------------------------ generation and memory


def generation(results: Results) -> Lines:
    rows = []
    for file, result in results.items():
        if not file.startswith("generation_"):
            continue
        for batch, peers in result["batches"].items():
            for name, row in peers.items():
                rows.append(
                    [
                        f"{result['model']}, {result['dtype']}, {short_machine(result)}",
                        batch,
                        f"**{name}**" if name == "ours" else name,
                        ranged(row["tokens_per_second"]),
                        ranged(row["speedup"], "{:.2f}"),
                        f"{1000 * row['first_token_seconds'][1]:.1f}",
                        f"{row['rows_as_litgpt']} of {batch}",
                    ]
                )
    heads = ("model", "batch", "", "tokens/s", "times litgpt generate", "first token, ms", "rows with LitGPT's ids")
    return table(heads, rows)


def memory(results: Results) -> Lines:
    """One row for each model and depth, from a pair of rows with the small and the large micro batch."""
    rows = []
    pairs = results["memory_cpu"]["rows"]
    for small, large in zip(pairs[::2], pairs[1::2], strict=True):
        total, active = small["total_parameters"], small["active_parameters"]
        kept = small["weights"] + small["gradients"] + small["optimizer"]
        parameters = f"{total / 1e6:,.1f} M / {active / 1e6:,.1f} M"
        kind = "MoE" if active < total else "dense"
        rows.append([kind, small["n_layer"], parameters, gib(kept), gib(small["peak"]), gib(large["peak"])])
    heads = ("model", "layers", "parameters / active", "weights, gradients, AdamW", "peak, micro batch 1")
    return table([*heads, "micro batch 16"], rows)


BLOCKS: dict[str, Callable[[Results], Lines]] = {
    "results": overview,
    "measurements": measurements,
    "train_step_cpu": lambda results: train_step(results, "cpu"),
    "train_step_cuda": lambda results: train_step(results, "cuda"),
    "layer_speed_cpu": lambda results: layer_speed(results, "cpu"),
    "layer_speed_cuda": lambda results: layer_speed(results, "cuda"),
    "layer_memory": layer_memory,
    "data_prepare": data_prepare,
    "data_memory": data_memory,
    "data_read": data_read,
    "moe_vs_dense": moe_vs_dense,
    "ablations": ablations,
    "low_memory": low_memory,
    "finetuning": finetuning,
    "generation": generation,
    "memory": memory,
}


if __name__ == "__main__":
    main()
