"""Is everything that runs on a GPU right? The checks that come before any measurement.

    uv run python benchmarks/gpu_checks.py --device cuda     # a minute
    uv run python benchmarks/gpu_checks.py --device cpu      # the same code without a GPU

1. The layer with each of its backends against LitGPT's, output and all gradients, in fp32 and bf16.
2. The losses and gradients of a compiled training step against those of an eager one.
3. Gradients of several micro batches, with weights that are cast once, against those of autocast.
4. A step whose gradient is not finite: the device skips it.
5. A run that was resumed in the middle against the same run without a break.
6. Generated tokens (by a CUDA graph on a GPU) against a forward pass without a cache.

Exits with 1 if a check fails.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import common
from benchmarks.common import Row, make_table
from benchmarks.moe_layer import BOUNDS, Case, measure, quickstart_size
from benchmarks.moe_peers import Size
from benchmarks.runs import NOTHING_ELSE, Corpus, find_corpus, train
from litmoe.checkpoints import load_weights
from litmoe.hardware import compiler_settings
from litmoe.inference.generate import generate_tokens
from litmoe.layers import use_our_layers
from litmoe.train.model import PretrainingModel, as_batch, cast_matrices, matrices_to_cast
from litmoe.train.optimizers import step_unless

MODEL = ROOT / "configs/models/quickstart.yaml"
BACKENDS = ("LitGPT", "ours", "ours: grouped_mm", "ours: triton", "ours: loop", "ours compiled")
LAYERS: list[Size] = [(256, 256, 32, 4), quickstart_size()]
STEPS, BREAK = 8, 4  # of the resumed run


def main() -> None:
    parser = common.make_parser(__doc__, "gpu_checks_DEVICE", runs=True)
    args = parser.parse_args()
    result = common.start(args, "torch", "litgpt", "triton")
    result["checks"] = []
    for name, deviation, bound in checks(args.device, find_corpus(args.data_dir)):
        # `<=` is false for NaN.
        status = "passed" if isinstance(deviation, float) and deviation <= bound else "failed"
        result["checks"].append({"check": name, "deviation": deviation, "bound": bound, "status": status})
        print(f"{status}: {name} ({deviation})", flush=True)
        add_table(result)
        common.write_result(result, args.output)
    failed = [row["check"] for row in result["checks"] if row["status"] != "passed"]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(result['checks'])} checks failed: {'; '.join(failed)}")


def checks(device: str, corpus: Corpus) -> Iterator[tuple[str, float | str, float]]:
    """Yield each check with its largest relative deviation, or the reason why it has none, and the allowed one."""
    for precision in BOUNDS:
        for size in LAYERS:
            yield from check_layer(device, size, precision)
    # fp32 sums in another order; bf16 rounds what the compiler keeps exact.
    for precision, bound in (("fp32", 1e-4), ("bf16", 2e-2)):
        yield f"compiled step, {precision}", attempt(check_compiled_step, device, precision == "bf16"), bound
    yield "cast once, two micro batches", attempt(check_cast_once, device), 1e-2
    yield "step with NaN is skipped", attempt(check_skipped_step, device), 0.0
    # On a CPU the weights are identical bits. On a GPU some sums of gradients have no fixed order.
    yield "resumed run", attempt(check_resume, corpus), 0.0 if device == "cpu" else 1e-2
    for rows in (1, 16):
        yield f"generation, {rows} rows", attempt(check_generation, device, rows), 1e-4


def attempt(check: Callable[..., float], *args: Any) -> float | str:
    """Return the result of a check, or the error that it raised: the other checks must still run."""
    try:
        return check(*args)
    except Exception as error:  # compilers raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_layer(device: str, size: Size, precision: str) -> Iterator[tuple[str, float | str, float]]:
    """Compare each backend with LitGPT's layer in fp32. Backends that this machine can't run are left out."""
    case = Case(size, 2048, precision, BACKENDS, rounds=1)
    for layer, row in measure(case, device, seconds=0)["layers"].items():
        if row["status"] == "needs a GPU":
            continue
        deviation = max(row["deviation"].values()) if "deviation" in row else row["status"]
        yield f"layer {size}, {layer}, {precision}", deviation, BOUNDS[precision]


def build_model(device: str) -> PretrainingModel:
    """Return the quickstart's model with the weights of a fixed seed."""
    torch.manual_seed(0)
    with torch.device(device), use_our_layers():
        return PretrainingModel(GPT(Config.from_file(MODEL)))


def random_tokens(device: str) -> Tensor:
    """Return windows of the quickstart's context: ``(4, T + 1)``."""
    config = Config.from_file(MODEL)
    return torch.randint(config.vocab_size, (4, config.block_size + 1), device=device)


def flat_gradient(model: nn.Module) -> Tensor:
    """Return all gradients together: in bf16 those of a router alone are little more than rounding."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def check_compiled_step(device: str, autocast: bool) -> float:
    """Return the deviation of the loss and of the gradients of a compiled step from those of an eager one."""
    eager_model, tokens = build_model(device), random_tokens(device)

    def step(model: PretrainingModel) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            losses = model(*as_batch(tokens, tokens.size(1) - 1))
        losses.cross_entropy.backward()
        return losses.cross_entropy.detach(), flat_gradient(model)

    eager = step(eager_model)
    with compiler_settings():
        compiled = step(PretrainingModel(eager_model.gpt, compiler=partial(torch.compile, fullgraph=True)))
    return max(deviation(ours, exact) for ours, exact in zip(compiled, eager, strict=True))


def check_cast_once(device: str) -> float:
    """Return the deviation of the gradients of two micro batches, which are added in place, from those of autocast."""
    model, tokens = build_model(device), random_tokens(device)

    def gradient(precision: str) -> Tensor:
        model.zero_grad()
        weights = cast_matrices(matrices_to_cast(model, precision, "none"), precision)
        for part in tokens.chunk(2):
            with torch.autocast(device, torch.bfloat16):
                losses = functional_call(model, weights, (*as_batch(part, part.size(1) - 1),), tie_weights=False)
            losses.cross_entropy.backward()
        return flat_gradient(model)

    # Without "mixed" in its name nothing is cast once.
    return deviation(gradient("bf16-mixed"), gradient("32-true"))


def check_skipped_step(device: str) -> float:
    """Return the largest change of a weight by a step with NaN as gradient."""
    fabric = L.Fabric(accelerator="gpu" if device == "cuda" else device, devices=1)
    model = build_model(device)
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = fabric.setup_optimizers(adamw)
    for is_finite in (True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if is_finite else torch.nan)
        step_unless(optimizer, torch.tensor(not is_finite, device=device))
    return max(
        float((parameter.detach() - earlier).abs().max())
        for parameter, earlier in zip(model.parameters(), before, strict=True)
    )


def check_resume(corpus: Corpus) -> float:
    """Return the deviation of the weights after a run that was resumed from those after one without a break."""
    config = Config.from_file(MODEL)
    tokens = STEPS * 4 * config.block_size
    flags = ["--config=configs/quickstart.yaml", *corpus.flags, f"--train.max_tokens={tokens}", "--eval.max_iters=1"]
    flags += ["--train.lr_warmup_steps=2", "--train.log_interval=1", *NOTHING_ELSE]
    with tempfile.TemporaryDirectory() as folder:
        whole, second = Path(folder, "whole"), Path(folder, "second")
        train([*flags, f"--train.save_interval={BREAK}"], out_dir=whole)
        train([*flags, f"--resume={whole / f'step-{BREAK:08d}'}"], out_dir=second)
        exact, resumed = (load_weights(run / "final") for run in (whole, second))
        return max(deviation(resumed[name], tensor) for name, tensor in exact.items())


def check_generation(device: str, rows: int) -> float:
    """Return how far generated tokens are from the most probable ones of a forward pass without a cache.

    Other sums may flip a close choice, so the difference of the two logits is compared: 0 for the same token.
    """
    gpt = build_model(device).gpt.eval()
    vocab_size = gpt.config.vocab_size
    prompts = torch.randint(vocab_size, (rows, 16), device=device)
    with torch.no_grad():
        new = torch.stack(list(generate_tokens(gpt, list(prompts), max_new_tokens=64, temperature=0.0)), dim=1)
        logits = gpt(torch.cat([prompts, new], dim=1))[:, prompts.size(1) - 1 : -1, :vocab_size].float()
    chosen = logits.gather(2, new.unsqueeze(2)).squeeze(2)
    return float(((logits.amax(dim=2) - chosen) / logits.std()).max())


def deviation(actual: Tensor, exact: Tensor) -> float:
    """Return the relative deviation in the Frobenius norm."""
    return float((actual.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-20))


def add_table(result: Row) -> None:
    rows = []
    for row in result["checks"]:
        number = row["deviation"]
        rows.append([row["check"], f"{number:.1e}" if isinstance(number, float) else number, f"{row['bound']:.0e}"])
        rows[-1].append(row["status"])
    result["table"] = make_table(("check", "deviation", "allowed", ""), rows)


if __name__ == "__main__":
    main()
