"""The parts of docs/PERFORMANCE.md about whole runs: training steps, data, comparisons of models, generation."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import Target, plotting, table, where
from benchmarks.runs import Spread
from litmoe.train.gpus import CUDA_CONTEXT, DISPLAY

Row = dict[str, Any]

DEVICES = {"cpu": "on a CPU", "cuda": "on a GPU"}
MOE_VS_DENSE = {
    "moe_vs_dense_cpu": "CPU, short runs",
    "moe_vs_dense_long_cpu": "CPU, the quickstart's own length",
    "moe_vs_dense_cuda": "GPU",
}
FILES = {
    "train_step_cpu": "python benchmarks/train_step.py",
    "train_step_cuda": "python benchmarks/train_step.py --device cuda",
    "data_loading_cpu": "python benchmarks/data_loading.py",
    "data_loading_cuda": "python benchmarks/data_loading.py --device cuda",
    "moe_vs_dense_cpu": "python benchmarks/moe_vs_dense.py",
    "moe_vs_dense_long_cpu": "python benchmarks/moe_vs_dense.py --tokens 2000000 --learning-rates 1e-3 2e-3 4e-3 "
    "--output benchmarks/results/moe_vs_dense_long_cpu.json",
    "moe_vs_dense_cuda": "python benchmarks/moe_vs_dense.py --device cuda",
    "ablations": "python benchmarks/ablations.py",
    "generation": "python benchmarks/generation.py",
    "generation_cuda": "python benchmarks/generation.py --device cuda",
    "generation_moe-200m_cuda": "python benchmarks/generation.py --device cuda --model configs/models/moe-200m.yaml",
    "cross_entropy_cpu": "python benchmarks/cross_entropy.py",
    "cross_entropy_cuda": "--with liger-kernel==0.8.5 --with cut-cross-entropy==25.1.1 "
    "python benchmarks/cross_entropy.py --device cuda",
    "low_memory": "python benchmarks/low_memory.py",
    "low_memory_cuda": "python benchmarks/low_memory.py --device cuda",
    "checkpoint": "python benchmarks/checkpoint.py",
    "memory_cuda": "python benchmarks/memory.py --device cuda",
}
"""What this part is made of, and the commands that measure it."""


def document(results: dict[str, Row]) -> list[str]:
    """The lines of all sections; what was not measured names the command that does."""
    lines = []
    for name, command in FILES.items():
        title, section = SECTIONS[name.removesuffix("_cpu").removesuffix("_cuda")]
        device = DEVICES.get(name.rsplit("_", 1)[-1])
        lines += [f"## {title}{f', {device}' if device else ''}", ""]
        if name in results:
            lines += [*section(results[name]), where(results[name]), ""]
        else:
            lines += [f"Not measured yet: `uv run {command}` does.", ""]
    return lines


# -------------------------------------------------------------------------------------------------------------- targets


def targets(results: dict[str, Row]) -> list[Target]:
    """What was to be reached by whole runs, and what was measured."""
    cpu, gpu = results.get("train_step_cpu"), results.get("train_step_cuda")
    cpu = cpu if cpu and cpu["hardware"]["cores"] == 2 else None
    on_h200 = gpu if gpu and gpu["hardware"]["gpu"]["name"] == "NVIDIA H200" else None
    small = "2 CPU cores, the quickstart: 1.5 times stock LitGPT by "
    rows = [
        at_least(f"{small}tokens/s", times_stock(cpu, "quickstart", "tokens_per_second"), 1.5),
        at_least(f"{small}the time of the whole command", times_stock(cpu, "quickstart", "whole_command"), 1.5),
        at_least("H200, MoE-200M: 4 times stock LitGPT", times_stock(on_h200, "moe-200m", "tokens_per_second"), 4),
    ]
    for model in ("moe-200m", "gpt2-124m"):
        reached = utilization(on_h200, model, "ours")
        shown = reached and reached["measured"]
        rows.append(at_least(f"H200, {model}: MFU of 45% of the measured 790 TFLOP/s", shown, 0.45))
    for name, place in MOE_VS_DENSE.items():
        text = f"{place}: MoE below its dense twin at equal seconds, bits per byte"
        if difference := results.get(name, {}).get("equal_seconds", {}).get("difference"):
            reached = Spread(**difference).clear and difference["mean"] < 0
            rows.append(Target(text, signed(difference), reached))
        else:
            rows.append(Target(text, None, False))
    for device, where_it_is in DEVICES.items():
        found = results.get(f"data_loading_{device}", {"rows": []})
        waits = [row["waiting"] for row in found["rows"] if "waiting" in row and row["shipped"]]
        place = where_it_is.removeprefix("on a ")
        text = f"{place}: the runs' own readers keep the loop waiting for less than 1% of its time"
        rows.append(Target(text, f"{max(waits):.2%}" if waits else None, bool(waits) and max(waits) < 0.01))
    rows += generation_targets(results.get("generation"), results.get("generation_cuda"))
    rows += memory_targets(results.get("low_memory"), results.get("low_memory_cuda"))
    rows.append(plan_target(results.get("memory_cuda")))
    return [*rows, checkpoint_target(results.get("checkpoint"))]


def generation_targets(cpu: Row | None, gpu: Row | None) -> list[Target]:
    """Of one text at a time."""

    def speed(result: Row | None) -> float | None:
        is_it = result and result["model"] == "quickstart" and result["trained"]
        return result["batches"]["1"]["ours"]["speedup"]["median"] if result and is_it else None

    text = "the quickstart, batch 1: 3 times litgpt generate"
    return [at_least(f"CPU, {text}", speed(cpu), 3), at_least(f"GPU, {text}", speed(gpu), 3)]


def memory_targets(loss: Row | None, peak: Row | None) -> list[Target]:
    """Of training in 6 GB: its loss, and that it fits."""
    text = (
        "CPU, the quickstart: the 6 GB run's way (bf16, 8-bit Adam, stochastic rounding) within 1% of fp32 AdamW's loss"
    )
    over = loss and list(loss["ways"].values())[1].get("loss_over_fp32")
    seen = peak and f"{peak['peak_reserved_gib']} GiB and {peak['outside_allocator_gib']} outside the allocator"
    outside = bool(peak and peak["outside_allocator_gib"] <= CUDA_CONTEXT)
    return [
        Target(text, percent(over) if over else None, bool(over) and over["mean"] + over["interval"] <= 0.01),
        Target(
            f"GPU: MoE-200M trains in 6 GB, of which Windows and the display have {DISPLAY}",
            seen if peak and peak["fits"] else peak and "out of memory",
            outside and bool(peak and peak["fits"]),
        ),
    ]


def plan_target(result: Row | None) -> Target:
    """Of the memory that a plan foresees, on a card."""
    misses = [abs(row["peak"] / row["measured"] - 1) for row in result["rows"]] if result else []
    text = "GPU: a plan's memory within 5% of what the card's allocator gave at most (worst case)"
    return Target(text, f"{max(misses):.1%}" if misses else None, bool(misses) and max(misses) <= 0.05)


def checkpoint_target(result: Row | None) -> Target:
    """What was to be reached of saving."""
    share = result and result["share_at_one_a_minute"]
    return Target(
        "CPU, the quickstart: a save a minute takes less than 2% of the run",
        f"{100 * share['mean']:.2f}% ± {100 * share['interval']:.2f}%" if share else None,
        bool(share and share["mean"] + share["interval"] < 0.02),
    )


def at_least(text: str, value: float | None, bound: float) -> Target:
    return Target(text, None if value is None else f"{value:.2f}", value is not None and value >= bound)


def times_stock(result: Row | None, model: str, by: str) -> float | None:
    """The median over the rounds; None where it was not measured."""
    found = ((result or {}).get("models", {}).get(model) or {}).get("summary", {}).get("times_stock", {}).get(by)
    return found and found[1]


def utilization(result: Row | None, model: str, name: str) -> dict[str, float] | None:
    """Operations per second, causal convention, as a share of each known peak; None where it was not measured.

    A GPU's peaks are those of bf16: there is None for another precision.
    """
    of_model = (result or {}).get("models", {}).get(model)
    speed = of_model and of_model["summary"].get(name, {}).get("tokens_per_second")
    if not (speed and result and result["peaks"] and peak_counts(result, of_model)):
        return None
    flops = speed[1] * of_model["flops_per_token"]["causal"]
    return {peak: flops / value for peak, value in result["peaks"].items()}


def percent(spread: Row) -> str:
    return f"{spread['mean']:+.2%} ± {spread['interval']:.2%}"


def peak_counts(result: Row, model: Row) -> bool:
    """Whether the model computes in the precision that the peaks are of."""
    return result["device"] == "cpu" or model["precision"].startswith("bf16")


def signed(spread: Row) -> str:
    return f"{spread['mean']:+.4f} ± {spread['interval']:.4f}"


# ------------------------------------------------------------------------------------------------------- training steps


def train_step(result: Row) -> list[str]:
    """Ours, stock and the limit of each model."""
    lines = []
    for name, model in result["models"].items():
        lines += [f"### {name}", "", *train_step_table(result, name, model)]
    on_gpu = result["device"] == "cuda"
    memory = "that of CUDA's allocator" if on_gpu else "the resident memory of all processes"
    lines += [
        "Median of the rounds (lowest to highest). *Times stock* is formed within a round, beside each number that it",
        f"is of. Peak memory is {memory}. Both sides:",
        f"{', '.join(f'`{key} {value}`' for key, value in result['same_on_both_sides'].items())}.",
    ]
    if result["peaks"]:
        peaks = " and ".join(f"{value / 1e12:,.3g} TFLOP/s ({kind})" for kind, value in result["peaks"].items())
        of_what = "matrices in bf16" if on_gpu else "large matrices in fp32, just before"
        lines += [
            "MFU counts the operations of litmoe/flops.py, causal attention by half, as a share of",
            f"{peaks} for products of {of_what}. *The limit* is nothing but those operations at the first rate.",
        ]
    else:
        lines += ["This card's peak is not known, so there is no MFU and no limit."]
    return [*lines, ""]


def train_step_table(result: Row, name: str, model: Row) -> list[str]:
    """One model."""
    rows = []
    for who, way in model["ways"].items():
        numbers = model["summary"].get(who)
        if not numbers or (who == "stock by the whole command" and way == model["ways"]["stock"]):
            continue
        times = model["summary"]["times_stock"] if who == "ours" else {}
        shares = utilization(result, name, who) or {}
        rows.append(
            [
                f"{'**ours**' if who == 'ours' else who}, micro batch {way['micro_batch']}{compiled(way)}",
                ends(numbers["tokens_per_second"], "{:,.0f}"),
                ends(times.get("tokens_per_second"), "{:.2f}"),
                " / ".join(f"{share:.1%}" for share in shares.values()),
                f"{numbers['peak_bytes'][2] / 2**30:.2f}",
                ends(numbers["first_step_seconds"], "{:.1f}"),
                ends(numbers["seconds"], "{:.1f}"),
                ends(times.get("whole_command"), "{:.2f}"),
            ]
        )
    if result["peaks"] and peak_counts(result, model):
        peak = next(iter(result["peaks"].values()))
        rows.append(["the limit", f"{peak / model['flops_per_token']['causal']:,.0f}", "", "100%", "", "", "", ""])
    heads = ("", "tokens/s", "times stock", "MFU", "peak, GiB", "first step, s", "whole command, s", "times stock")
    size = f"{model['tokens']:,} tokens, context {model['context']:,}, {model['batch']} sequences a step"
    intro = f"`{model['run_file']}`, {model['precision']}: {size}{at_commit(model)}."
    trials = [
        (trial["who"], trial["micro_batch"], compiled(trial).removeprefix(", ") or "as it chooses", outcome(trial))
        for trial in model["trials"]
    ]
    tried = table(("tried", "micro batch", "torch.compile", "tokens/s"), trials)
    return [
        intro,
        "",
        *table(heads, rows),
        "<details><summary>Settings that were tried</summary>",
        "",
        *tried,
        "</details>",
        "",
    ]


def at_commit(row: Row) -> str:
    """Of a row that an earlier run measured."""
    return f", at commit {row['commit']}" if "commit" in row else ""


def compiled(way: Row) -> str:
    return {None: "", True: ", compiled", False: ", not compiled"}[way["compile"]]


def outcome(trial: Row) -> str:
    return f"{trial['tokens_per_second']:,.0f}" if trial["status"] == "measured" else trial["status"]


def ends(values: Sequence[float] | None, form: str) -> str:
    """Median (lowest to highest); empty for none."""
    if values is None:
        return ""
    low, middle, high = map(form.format, values)
    return middle if low == high else f"{middle} ({low} to {high})"


# ----------------------------------------------------------------------------------------------------------------- data


def data_loading(result: Row) -> list[str]:
    """The reader alone, against what the steps take."""
    rows = [
        (
            f"{row['model']}: {row['micro_batch']} x {row['context']:,}",
            f"**{row['workers']}**" if row["shipped"] else row["workers"],
            f"{row['tokens_per_second']:,}",
            f"{1000 * row['first_batch_seconds']:,.1f}",
            f"{row['needed']:,.0f} ({row['needed_by']})" if row["needed"] else "",
            f"{row['tokens_per_second'] / row['needed']:,.0f}" if row["needed"] else "",
            f"{row['waiting']:.3%}" if "waiting" in row else "",
        )
        for row in result["rows"]
    ]
    heads = (
        "micro batch",
        "workers",
        "reader alone, tokens/s",
        "first batch, ms",
        "steps need",
        "times that",
        "waiting",
    )
    note = "*Waiting* is the share of its time that a loop spends in the loader whose steps are as fast as needed;"
    return [*table(heads, rows), note, "workers in bold are those of the run file.", ""]


# --------------------------------------------------------------------------------------------------------- MoE vs dense


def moe_vs_dense(result: Row, plotted: str = "moe_vs_dense") -> list[str]:
    """Both comparisons, on the way and at the end; ``plotted`` begins the name of the plot."""
    failed = [
        f"Failed: {row['model']}, learning rate {row['learning_rate']:g}, seed {row['seed']}: {row['status']}"
        for row in result.get("failed", [])
    ]
    if "difference" not in result["equal_seconds"]:
        return ["Cut short before the first comparison at equal seconds.", *failed, ""]
    moe, dense = result["models"]["MoE"], result["models"]["dense"]
    sizes = [
        f"{model['name']} ({model['total'] / 1e6:.1f} M, {model['active'] / 1e6:.1f} M active)"
        for model in (moe, dense)
    ]
    rows = []
    for equal in ("tokens", "seconds"):
        found = result[f"equal_{equal}"]
        means = [
            f"{found['means'][name]['mean']:.4f} ± {found['means'][name]['deviation']:.4f}" for name in ("MoE", "dense")
        ]
        runs = {name: [run for run in found["runs"] if run["model"] == name] for name in ("MoE", "dense")}
        spent = [
            f"{average(runs[name], 'tokens'):,.0f} in {average(runs[name], 'seconds'):.1f} s"
            for name in ("MoE", "dense")
        ]
        way = found["difference_on_the_way"]
        middle = f"{way['50%']['mean']:+.4f}" if "50%" in way else ""
        rows.append(
            (f"equal {equal}", *means, signed(found["difference"]), verdict(found["difference"]), middle, *spent)
        )
    heads = ("", "MoE", "dense", "difference", "", "half-way", "tokens of the MoE", "of the dense one")
    rates = ", ".join(f"{rate:g} for the {name}" for name, rate in result["learning_rates"].items())
    tried = sorted({row["learning_rate"] for row in [*result["grid"], *result.get("failed", [])]})
    edge = f"; on the edge of the grid: {', '.join(result['on_the_edge'])}" if result["on_the_edge"] else ""
    speeds = result["tokens_per_second"]
    seeds = len({run["seed"] for run in result["equal_tokens"]["runs"]})
    return [
        f"{' against '.join(sizes)}; {seeds} seeds, validation bits per byte.",
        f"Both by `{' '.join([result['run_file'], *result['flags']])}`.",
        "",
        *table(heads, rows),
        "Means and standard deviations over the seeds; the difference is MoE less dense of the same seed, with the 95%",
        "interval of its mean. Best learning rates for seed 0 (which counts, too) of",
        f"{', '.join(f'{rate:g}' for rate in tried)}: {rates}{edge}.",
        f"The MoE trains {speeds['MoE']:,.0f} tokens/s, the dense model {speeds['dense']:,.0f}: to be ahead by the",
        f"clock it must come to the same loss in less than {speeds['MoE'] / speeds['dense']:.0%} of the tokens. What",
        "would have to change stands in [LOG](LOG.md#benchmarks-of-whole-runs).",
        *failed,
        "",
        f"![bits per byte over tokens and seconds]({plotted}_{result['device']}.svg)",
        "",
    ]


def average(runs: Sequence[Row], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def verdict(difference: Row) -> str:
    """In words; below 0 is better."""
    if not Spread(**difference).clear:
        return "within the noise"
    return "better" if difference["mean"] < 0 else "worse"


def plot(result: Row, path: Path) -> None:
    """Bits per byte over tokens and over seconds, a line for each seed."""
    plt = plotting()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for column, (axis, equal) in enumerate(zip(axes, ("tokens", "seconds"), strict=True)):
        for run in result[f"equal_{equal}"]["runs"]:
            values = [(point[column] / (1e6 if equal == "tokens" else 1), point[2]) for point in run["curve"]]
            color = {"MoE": "#c0392b", "dense": "#1b4f72"}[run["model"]]
            label = result["models"][run["model"]]["name"] if run["seed"] == 0 else None
            axis.plot(*zip(*values, strict=True), color=color, alpha=0.7, marker=".", label=label)
        axis.set(xlabel={"tokens": "million tokens", "seconds": "seconds of training"}[equal], title=f"equal {equal}")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="validation, bits per byte")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ ablations


def ablations(result: Row) -> list[str]:
    """Each choice against the default, and what chose the defaults."""
    rows, reasons = [], []
    for name, row in result["rows"].items():
        if row["status"] != "measured":
            rows.append((name, row["status"], "", "", "", "", ""))
            continue
        tuned = f" ({row['tuned'].removeprefix('--')} {row['chosen']:g})" if row["tuned"] else ""
        score, speed = row["bits_per_byte"], row["tokens_per_second"]["mean"]
        difference = row.get("difference")
        rows.append(
            (
                (f"**{name}**" if name == "default" else name + tuned) + at_commit(row),
                f"{score['mean']:.4f} ± {score['deviation']:.4f}",
                signed(difference) if difference else "",
                verdict(difference) if difference else "",
                f"{speed:,.0f}",
                f"{average(row['runs'], 'busiest_expert'):.2f}",
                f"{average(row['runs'], 'dead_experts'):.1f}",
            )
        )
        if difference:
            relative = speed / result["rows"]["default"]["tokens_per_second"]["mean"]
            reasons.append(f"- {row['question']}: {reason(name, difference, relative)}")
    heads = (
        "",
        "bits per byte",
        "less the default's",
        "",
        "tokens/s",
        "busiest expert, times the mean",
        "dead experts",
    )
    default = result["rows"].get("default", {}).get("question")
    searched = any(len(row.get("grid", ())) > 1 for row in result["rows"].values())
    rates = ["A rate in brackets is the best for seed 0, which counts, too, and favours its row a little."]
    return [
        f"`{result['run_file']}` with {result['tokens']:,} tokens a run, {result['seeds']} seeds each, on the same",
        f"validation text. The default: {default}.",
        "",
        *table(heads, rows),
        "Means and standard deviations over the seeds; the difference is to the default's run of the same seed, with",
        "the 95% interval of its mean, equally many tokens each.",
        *(rates if searched else ()),
        "These are short runs, in which the loss is still falling fast, so that whatever takes larger steps is ahead;",
        "what the quickstart's own length said stands in [LOG](LOG.md#the-training-step). Every default and the row",
        "that chose it:",
        "",
        *reasons,
        "",
    ]


def reason(name: str, difference: Row, speed: float) -> str:
    """What a row says of the default that it was held against; ``speed`` in times the default's."""
    said = {"better": "speaks against the default", "worse": "chose the default"}
    found = said.get(verdict(difference), "tells no clear difference from the default, which stays")
    return f"the row *{name}* {found} (equal tokens, at {speed:.2f} times its speed)."


# ------------------------------------------------------------------------------------------------ generation and memory


def low_memory(result: Row) -> list[str]:
    """What it costs in loss, on a CPU; whether it fits, on a GPU."""
    if "ways" not in result:
        seen = (
            f"{result['peak_reserved_gib']} GiB reserved, {result['peak_allocated_gib']} GiB of them allocated at most"
        )
        end = f"ended after {result['steps']} steps" if result["fits"] else "ran out of memory"
        return [
            f"{result['model']} at context {result['context']:,} on {result['gpu']['name']}, its allocator held to"
            f" {result['cap_gib']} GiB of a card's {result['card_gib']}: {end}; {seen}, and beside the allocator",
            f"{result['outside_allocator_gib']} GiB.",
            "",
        ]
    rows = [
        (
            name,
            f"{mean(way['val_losses']):.4f}",
            percent(way["loss_over_fp32"]) if "loss_over_fp32" in way else "",
            f"{way['weights_mb']:,}",
            f"{way['optimizer_mb']:,}",
            f"{way['seconds']:.0f}",
        )
        if way["status"] == "measured"
        else (name, way["status"], "", "", "", "")
        for name, way in result["ways"].items()
    ]
    heads = ("", "validation loss", "over fp32's", "weights, MB", "optimizer, MB", "seconds")
    return [
        f"The quickstart's model, {result['tokens']:,} tokens a run, means of {result['seeds']} seeds. *Over fp32's*",
        "is that of the same seed, with the 95% interval of its mean.",
        "",
        *table(heads, rows),
    ]


def checkpoint(result: Row) -> list[str]:
    """What a save costs."""
    cost, share = result["seconds_a_save"], result["share_at_one_a_minute"]
    return [
        f"The quickstart, {result['tokens']:,} tokens a run, with a save of {result['checkpoint_mb']} MB every"
        f" {result['every_seconds']:g} seconds and without any: {mean(result['seconds']['saving']):.1f} s and",
        f"{mean(result['seconds']['not']):.1f} s of training in the mean of {len(result['saves'])} pairs, so that one"
        f" of {mean(result['saves']):.0f} saves costs {1000 * cost['mean']:.0f} ms ± {1000 * cost['interval']:.0f} ms,",
        f"and one a minute {100 * share['mean']:.2f}% ± {100 * share['interval']:.2f}% of the run.",
        "",
    ]


def generation(result: Row) -> list[str]:
    """Ours and the peers, at each batch."""

    def line(batch: str, name: str, row: Row) -> tuple[str, ...]:
        rate, ratio = ([row[key][end] for end in ("min", "median", "max")] for key in ("tokens_per_second", "speedup"))
        first = f"{1000 * row['first_token_seconds']['median']:.1f}"
        shares = f"{row['bandwidth_share']:.1%}", f"{row['rows_as_litgpt']} of {batch}"
        bold = f"**{name}**" if name == "ours" else name
        return batch, bold, ends(rate, "{:,.0f}"), ends(ratio, "{:.2f}"), first, *shares

    rows = [line(batch, *row) for batch, measured in result["batches"].items() for row in measured.items()]
    weights = "trained" if result["trained"] else "random weights"
    heads = ("batch", "", "tokens/s", "times litgpt generate", "first token, ms", "of the bandwidth", "LitGPT's ids")
    size = f"{result['new_tokens']} tokens after {result['prompt_tokens']}"
    return [
        f"{result['model']} ({weights}, {result['dtype']}), {size}, at temperature 0; median (lowest to highest).",
        "*Of the bandwidth*: what a step must read at least, as a share of the limit,",
        f"{result['copy_bytes_per_second'] / 1e9:,.1f} GB/s, which copying a large tensor reads and writes.",
        "",
        *table(heads, rows),
    ]


def cross_entropy(result: Row) -> list[str]:
    """Speed, memory and exactness of each way."""
    rows = []
    for case in result["cases"]:
        size = f"{case['n_embd']:,} x {case['padded_vocab_size']:,}, {case['tokens']:,} tokens, {case['precision']}"
        for name, way in case["ways"].items():
            shown = f"**{name}**" if name == "ours" else name
            if way["status"] != "measured":
                rows.append((size, shown, way["status"], "", "", ""))
                continue
            times = f"{way['speedup'][1]:.2f}" if "speedup" in way else ""
            memory = f"{way['peak_bytes'] / 2**20:,.0f}"
            far = f"{max(way['deviation'].values()):.0e}"
            rows.append((size, shown, f"{1000 * way['seconds'][1]:.1f}", times, memory, far))
    heads = ("output layer", "", "ms", "times LitGPT's", "memory, MiB", "deviation")
    return [
        *table(heads, rows),
        "Hidden states to the mean loss and back, with gradients to both factors. *Memory*: the most that torch's",
        "allocator held beside what was there before, gradients included. *Deviation*: the largest of the loss and the",
        f"gradients from those in {'fp64' if result['device'] == 'cpu' else 'fp32'}, relative. Training takes *ours*.",
        "",
    ]


def memory(result: Row) -> list[str]:
    """What was planned against what a card allocated."""
    from benchmarks.memory import comparison  # with all of training, which nothing else here needs

    return [f"{result['how'].capitalize()}.", "", *comparison(result["rows"]).splitlines(), ""]


SECTIONS = {
    "train_step": ("Whole training steps", train_step),
    "data_loading": ("Reading the data", data_loading),
    "moe_vs_dense": ("A mixture of experts against its dense twin", moe_vs_dense),
    "moe_vs_dense_long": (
        "The same at the quickstart's own length",
        partial(moe_vs_dense, plotted="moe_vs_dense_long"),
    ),
    "ablations": ("What the defaults are worth", ablations),
    "generation": ("Generation", generation),
    "generation_moe-200m": ("Generation of MoE-200M", generation),
    "cross_entropy": ("The output layer with its loss", cross_entropy),
    "low_memory": ("Training in little memory", low_memory),
    "checkpoint": ("Saving during a run", checkpoint),
    "memory": ("The memory that a plan foresees", memory),
}
