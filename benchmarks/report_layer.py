"""The part of docs/PERFORMANCE.md about one layer, from the results of benchmarks/moe_layer.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import NO_BF16, Target, plotting, table, where

DEVICES = {"cpu": "The layer on a CPU", "cuda": "The layer on a GPU"}
PEERS = ("Hugging Face eager", "Hugging Face grouped_mm", "Liger-Kernel", "scattermoe", "sonic-moe")
PLAIN = "plain grouped_mm"
LARGE, FINE = (768, 2048, 8, 2), (256, 256, 32, 4)

HEAD = """## The layer

From `moe_layer_cpu.json` and `moe_layer_cuda.json`. One layer, forward and backward, with gradients to the input and to
all weights. All numbers of a device are from one run, in which the layers took turns; how it is done stands at the top
of [benchmarks/moe_layer.py](../benchmarks/moe_layer.py).

**LitGPT** is `litgpt.model.LLaMAMoE`; **ours** is `custom_moe.MoE` with the backend that it chooses, `ours: NAME` with
that one; **plain grouped_mm** is the shortest grouped layer by plain autograd; **dense** is a SwiGLU as wide as the
chosen experts together, as many operations for each token with nothing to route: the limit. A size is (n_embd, expert
width, experts, experts per token).

On a CPU the process keeps the memory that it frees, for all layers alike. A process that gives large blocks back, as is
usual on Linux, pays for fresh pages at each step, and more so where gradients are one large block: on the virtual
machine of this table ours was then slower than LitGPT's at the two widest sizes ([LOG](LOG.md#the-layer)).
"""

Row = dict[str, Any]


def document(results: dict[str, Row]) -> list[str]:
    """Its lines; ``results`` by device."""
    lines = [HEAD]
    for device, title in DEVICES.items():
        lines += [f"## {title}", "", *(section(results[device]) if device in results else ["Not measured yet.", ""])]
    return lines


def flat(result: Row | None) -> list[Row]:
    """One row for each layer of each case; ``speed`` is the median of its ratios to LitGPT's."""
    rows = []
    for case in result["cases"] if result else ():
        size = tuple(case[key] for key in ("n_embd", "intermediate_size", "n_expert", "n_expert_per_token"))
        for layer, numbers in case["layers"].items():
            speed = {"speed": numbers["speedup"][1]} if "speedup" in numbers else {}
            rows.append({**case, "size": size, "layer": layer, **numbers, **speed})
    return rows


def names(result: Row, rows: list[Row]) -> list[str]:
    """The layers in these rows, in the order of the case that has most."""
    return [name for name in max((case["layers"] for case in result["cases"]), key=len) if select(rows, layer=name)]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


# -------------------------------------------------------------------------------------------------------------- targets


def targets(results: dict[str, Row]) -> list[Target]:
    """What was to be reached, and what was measured."""
    cpu, gpu = (flat(results.get(device)) for device in DEVICES)
    small = tuple(results["cpu"]["quickstart"]) if cpu else None
    at_most = "activation memory at most 60% of the plain grouped layer's (worst case)"
    never = "never more than 5% slower than LitGPT's layer (worst case)"
    place = f"H200, {LARGE}, bf16, 16,384 tokens: "
    is_h200 = bool(gpu) and "H200" in results["cuda"]["hardware"]["gpu"]["name"]
    main_case = select(gpu if is_h200 else [], size=LARGE, precision="bf16", tokens=16384, routing="even")
    per_second = {row["layer"]: row["tokens_per_second"] for row in main_case if "speed" in row}
    ours, peers = per_second.get("ours"), {name: per_second[name] for name in PEERS if name in per_second}
    no_faster = f"no peer faster, as times the fastest's speed ({', '.join(peers) or ', '.join(PEERS)})"

    def worst(rows: list[Row]) -> float | None:
        return min((row["speed"] for row in select(rows, layer="ours") if "speed" in row), default=None)

    def kept(device: str) -> float | None:
        cases = results.get(device, {"cases": []})["cases"]
        pairs = [
            [case["layers"].get(name, {}).get("saved_bytes_per_token") for name in ("ours", PLAIN)] for case in cases
        ]
        return max((ours / plain for ours, plain in pairs if ours and plain), default=None)

    times = "times LitGPT's layer"
    rows = [
        (f"CPU, the quickstart's size, fp32: 1.3 {times}", worst(select(cpu, size=small, precision="fp32")), 1.3),
        (f"CPU, the quickstart's size, bf16: 1.3 {times}", worst(select(cpu, size=small, precision="bf16")), 1.3),
        (f"CPU, {FINE}, bf16: 1.8 {times}", worst(select(cpu, size=FINE, precision="bf16")), 1.8),
        (f"CPU, freed memory kept: {never}", worst(cpu), 0.95),
        (f"CPU: {at_most}", kept("cpu"), -0.6),
        (f"{place}8 {times}", worst(main_case), 8),
        (f"{place}{no_faster}", ours / max(peers.values()) if ours and "Liger-Kernel" in peers else None, 1),
        (
            f"{place}75% of the dense layer's speed",
            ours / per_second["dense"] if ours and "dense" in per_second else None,
            0.75,
        ),
        (f"GPU: {never}", worst(gpu), 0.95),
        (f"GPU: {at_most}", kept("cuda"), -0.6),
    ]
    return [  # a negative bound is one from above
        Target(text, value and f"{value:.2f}", value is not None and (value >= bound if bound > 0 else value <= -bound))
        for text, value, bound in rows
    ]


# --------------------------------------------------------------------------------------------------------------- tables


def section(result: Row) -> list[str]:
    """All of one device."""
    lines = [where(result), ""]
    lines += [f"![speed and memory of the layers](moe_layer_{result['device']}.svg)", ""]
    rows = flat(result)
    if not any(row["precision"] == "bf16" for row in rows):
        lines += [f"No bf16: {NO_BF16}.", ""]
    timed = [row for row in rows if "speed" in row]
    for routing, precision, tokens in dict.fromkeys((r["routing"], r["precision"], r["tokens"]) for r in timed):
        here = select(timed, routing=routing, precision=precision, tokens=tokens)
        sizes = list(dict.fromkeys(row["size"] for row in here))
        title = f"{precision}, {tokens:,} tokens" + (", skewed routing" if routing == "skewed" else "")
        lines += [f"### {title}: times LitGPT's speed", ""]
        chosen = list(dict.fromkeys(row["backend"] for row in here))
        lines += [f"The backend that our layer chooses: {' or '.join(chosen)}.", ""]
        cells = {(row["layer"], row["size"]): f"{row['speed']:.2f}" for row in here}
        speeds = (
            [f"**{name}**" if name == "ours" else name, *(cells.get((name, size), "") for size in sizes)]
            for name in names(result, here)
        )
        lines += [*table(("", *map(str, sizes)), speeds), "<details><summary>All numbers</summary>", ""]
        for size in sizes:
            lines += details(size, select(here, size=size))
        lines += ["</details>", ""]
    return [*lines, *remarks(rows, result["bounds"]), *kernels(result["profile"])]


def details(size: tuple[int, ...], rows: list[Row]) -> list[str]:
    """All numbers of one case."""

    def line(row: Row) -> list[str]:
        low, mid, high = (f"{1000 * value:.4g}" for value in row["seconds"])
        slow, typical, fast = (f"{value:.2f}" for value in row["speedup"])
        speed = [f"{mid} ({low} to {high})", f"{row['tokens_per_second']:,}", f"{row['tflops']:.3g}"]
        memory = [f"{row['saved_bytes_per_token']:,.0f}", f"{row['peak_bytes'] / 2**20:,.1f}"]
        return [row["layer"], *speed, f"{typical} ({slow} to {fast})", *memory]

    heads = (
        "",
        "ms (quartiles)",
        "tokens/s",
        "TFLOP/s",
        "times LitGPT (quartiles)",
        "kept, bytes per token",
        "peak, MiB",
    )
    share = f"{rows[0]['largest_share']:.0%} of the assignments are the busiest expert's (even: {1 / size[2]:.0%})"
    return [f"{size}; {share}:", "", *table(heads, map(line, rows))]


def remarks(rows: list[Row], bounds: dict[str, float]) -> list[str]:
    """How far the layers are from LitGPT's, what the numbers of memory are, and what could not be timed."""
    far: dict[str, float] = {}
    for row in rows:
        if row["status"] in ("measured", "compared") and "deviation" in row:
            far[row["precision"]] = max(far.get(row["precision"], 0.0), *row["deviation"].values())
    said = ", ".join(f"{value:.1e} in {name} (allowed: {bounds[name]:.0e})" for name, value in far.items())
    lines = [f"Largest relative deviation of any output or gradient from LitGPT's layer in fp32: {said}.", ""]
    lines += [
        "*Kept* is what autograd saves for the backward, each storage once, with the input and without parameters;"
    ]
    lines += ["*peak* is the most that torch's allocator held beside weights and tokens, gradients included.", ""]
    synced = select(rows, precision="bf16", routing="even")
    if waiting := [row for row in synced if "host_sync" in row]:
        free = [
            n
            for n in dict.fromkeys(r["layer"] for r in waiting)
            if all(r["host_sync"] is None for r in select(waiting, layer=n))
        ]
        lines += [f"Without a host sync in bf16, by torch's sync debug mode: {', '.join(free) or 'none'}.", ""]
    absent = dict.fromkeys(
        f"- {r['layer']}: {r['status']}" for r in rows if r["status"] not in ("measured", "compared")
    )
    return [*lines, *(["Not timed:", "", *absent, ""] if absent else [])]


def kernels(profile: Row | None) -> list[str]:
    """The kernels of our layer, where they were profiled."""
    if profile is None:
        return []
    total = profile["microseconds"]
    rows = [
        (f"`{k['name']}`", k["calls"], f"{k['microseconds']:,.1f}", f"{k['microseconds'] / total:.0%}")
        for k in profile["kernels"]
    ]
    title = f"### Where our layer's time goes: {tuple(profile['size'])}, {profile['tokens']:,} tokens"
    return [title, "", *table(("kernel", "calls", "µs", "share"), rows)]


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(result: Row, path: Path) -> None:
    """For each size the speed of the layers, with quartiles, and what they keep for the backward."""
    plt = plotting()

    rows = [r for r in flat(result) if "speed" in r and r["routing"] == "even" and r["precision"] != "bf16-mixed"]
    sizes, layers = list(dict.fromkeys(row["size"] for row in rows)), names(result, rows)
    series = sorted({(row["precision"] != "fp32", row["tokens"]) for row in rows})
    figure, axes = plt.subplots(2, len(sizes), figsize=(13, 6.5), layout="constrained", sharey=True, squeeze=False)
    for (speed, memory), size in zip(axes.T, sizes, strict=True):
        for number, (is_bf16, tokens) in enumerate(series):
            precision = "bf16" if is_bf16 else "fp32"
            here = select(rows, size=size, precision=precision, tokens=tokens)
            heights = [layers.index(row["layer"]) + 0.2 * (number - (len(series) - 1) / 2) for row in here]
            spread = [[abs(row["speedup"][end] - row["speed"]) for row in here] for end in (0, 2)]
            style = dict(fmt="o", markersize=5, color=("#5dade2", "#1b4f72", "#c0392b")[number])
            speed.errorbar(
                [row["speed"] for row in here], heights, xerr=spread, label=f"{precision}, {tokens:,} tokens", **style
            )
            memory.errorbar([row["saved_bytes_per_token"] / 1024 for row in here], heights, **style)
        speed.axvline(1, color="gray", linewidth=1)
        speed.set_xscale("log", base=2)
        speed.xaxis.set_major_formatter("{x:g}")
        speed.set(title=str(size), xlabel="times LitGPT's speed")
        memory.set(xlabel="KiB kept per token", xlim=(0, None), yticks=range(len(layers)), yticklabels=layers)
        speed.grid(alpha=0.3)
        memory.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
