"""The memory computed from the settings, compared with what a real step allocates."""

import lightning as L
import pytest
import torch
from litgpt import GPT
from torch.func import functional_call

from custom_moe import use_custom_moe
from custom_moe.backends import Hardware
from litmoe.config import ParsedRun, parse_run
from litmoe.layers import use_fast_layers
from litmoe.train.memory import training_memory
from litmoe.train.model import PretrainingModel, cast_matrices, matrices_to_cast
from litmoe.train.optimizers import make_optimizer

KINDS = {
    "dense": ["--model.mlp_class_name=LLaMAMLP", "--model.intermediate_size=384", "--model.n_expert=0"],
    "moe": ["--model.n_expert=8", "--model.moe_intermediate_size=192"],
    "gpt2-moe": ["--model.n_expert=4", "--model.moe_intermediate_size=192", "--model.bias=true"],
}
SHAPE = {
    **{"model.n_layer": 2, "model.n_embd": 128, "model.n_head": 4, "model.n_query_groups": 2},
    **{"model.block_size": 256, "model.vocab_size": 2048, "model.padded_vocab_size": 2048},
    **{"train.micro_batch_size": 2, "train.global_batch_size": 4, "train.max_seq_length": 256},
}
ADA = Hardware((8, 9), triton=True)


def parsed(*flags: str) -> ParsedRun:
    return parse_run([*(f"--{name}={value}" for name, value in SHAPE.items()), *flags])


def allocated(run: ParsedRun, precision: str) -> int:
    """Return the peak of the bytes allocated in the second optimizer step of a run."""
    torch.manual_seed(0)  # the memory depends on the load of the experts
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    train = run.settings.train
    with use_custom_moe(), use_fast_layers(), fabric.init_module():
        gpt = GPT(run.settings.model)
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    model = PretrainingModel(gpt, run.settings.activation_checkpointing)
    optimizer = make_optimizer(run.optimizer, model, fused=True)
    tokens = torch.randint(64, (train.micro_batch_size, train.max_seq_length))

    # oneDNN would cast the factors of bf16 products to fp32 on CPUs without bf16, which the plan does not count.
    @torch.backends.mkldnn.flags(enabled=False)
    def step() -> None:
        matrices = matrices_to_cast(model, precision, run.settings.activation_checkpointing)
        weights = cast_matrices(matrices, precision)
        for _ in range(train.gradient_accumulation_iters(1)):
            with fabric.autocast():
                losses = functional_call(model, weights, (tokens, tokens), tie_weights=False)
            (losses.cross_entropy + losses.load_balancing + losses.z_loss).backward()
            del losses
        del weights
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    persistent = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *state))
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return persistent + peak


@pytest.mark.parametrize("vocabulary", [64, 2048], ids=["peak in a layer", "peak at the logits"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("dense", "bf16-mixed"),
        ("moe", "32-true"),
        ("moe", "bf16-mixed"),
        pytest.param("moe", "bf16-true", marks=pytest.mark.slow),
        pytest.param("gpt2-moe", "32-true", marks=pytest.mark.slow),
    ],
)
def test_peak_of_a_real_step(kind: str, precision: str, vocabulary: int) -> None:
    """Buffers inside the loop operators and casts inside sums are counted too."""
    run = parsed(*KINDS[kind], f"--model.padded_vocab_size={vocabulary}", f"--model.vocab_size={vocabulary}")
    assert training_memory(run, precision).peak == pytest.approx(allocated(run, precision), rel=0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ["--global-batch-size=2"],
        ["--train.tie_embeddings=true"],
        ["--micro-batch-size=1", "--max-seq-length=16"],
        ["--optimizer.class_path=torch.optim.SGD", "--optimizer.init_args.momentum=0.9"],
        ["--activation_checkpointing=block"],
        ["--activation_checkpointing=moe", "--model.padded_vocab_size=64", "--model.vocab_size=64"],
    ],
    ids=["no accumulation", "tied embeddings", "peak in the update", "SGD", "checkpointing", "MoE checkpointing"],
)
def test_peak_with_other_settings(flags: list[str]) -> None:
    run = parsed(*KINDS["moe"], *flags)
    assert training_memory(run, "32-true").peak == pytest.approx(allocated(run, "32-true"), rel=0.02)


def test_muon_in_bf16_has_fp32_moments() -> None:
    run = parsed(*KINDS["moe"], "--optimizer.class_path=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.02")
    memory = training_memory(run, "bf16-true")
    assert memory.peak == pytest.approx(allocated(run, "bf16-true"), rel=0.02)
    assert memory.optimizer == training_memory(run, "32-true").optimizer


def test_parts() -> None:
    run = parsed(*KINDS["moe"])
    memory = training_memory(run, "32-true")
    with use_custom_moe():
        gpt = GPT(run.settings.model)
    parameters = sum(parameter.nbytes for parameter in gpt.parameters())
    assert memory.weights == parameters + gpt.cos.nbytes + gpt.sin.nbytes
    assert memory.gradients == parameters
    assert memory.optimizer == 2 * parameters + 4 * len(list(gpt.parameters()))
    assert memory.activations > 2 * 2 * 256 * 128 * 4  # at least each layer's input
    assert memory.peak == sum(memory)
    tied = training_memory(parsed(*KINDS["moe"], "--train.tie_embeddings=true"), "32-true")
    assert memory.weights - tied.weights == 2048 * 128 * 4


def test_state_of_8_bit_optimizer() -> None:
    """One byte per moment and a scale per block of 256, for tensors of at least 4,096 numbers."""
    flags = ["--optimizer.class_path=torchao.optim.AdamW8bit", "--model.n_layer=1"]
    memory = training_memory(parsed(*KINDS["dense"], *flags), "bf16-true", ADA)
    matrices = 2 * 2048 * 128 + 128 * (256 + 128 + 3 * 384)
    small = 3 * 128 * 2  # three norms in bf16
    assert memory.optimizer == 2 * (matrices + matrices // 256 * 4 + 5 * 256 * 4 + small) + 2 * 2 * 256 * 4


def test_fp16_keeps_all_logits() -> None:
    """In 16 and 32 bits, because the gradient scaler does not work with a loss in blocks."""
    memory = training_memory(parsed(*KINDS["dense"]), "16-mixed", Hardware((7, 5), triton=True))
    assert memory.logits >= 2 * 256 * 2048 * (2 + 4)


def test_gpu_without_having_one() -> None:
    """With a gradient scaler the update handles many tensors at once, which needs memory."""
    gpu = Hardware((8, 6), triton=True)
    flags = [*KINDS["moe"], "--max-seq-length=32", "--activation_checkpointing=block"]
    mixed, scaled = (training_memory(parsed(*flags), precision, gpu) for precision in ("bf16-mixed", "16-mixed"))
    assert scaled.workspace > mixed.workspace + mixed.weights * 0.4
    assert all(part % 512 == 0 for part in mixed)
