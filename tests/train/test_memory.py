"""The memory that is worked out from the settings against what a real step allocates."""

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
    """The most bytes that there are in the second optimizer step of a run, to the byte."""
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    train = run.settings.train
    with use_custom_moe(), use_fast_layers(), fabric.init_module():
        gpt = GPT(run.settings.model)
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    model = PretrainingModel(gpt, run.settings.activation_checkpointing)
    optimizer = make_optimizer(run.optimizer, model, fused=True)
    tokens = torch.randint(64, (train.micro_batch_size, train.max_seq_length))

    def step() -> None:
        weights = cast_matrices(matrices_to_cast(model, precision, run.settings.activation_checkpointing), precision)
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
    lasting = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *state))
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return lasting + most


@pytest.mark.parametrize("vocabulary", [64, 2048], ids=["most in a layer", "most at the logits"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_step_allocates_what_was_worked_out(kind: str, precision: str, vocabulary: int) -> None:
    """The loop's shared buffers, which an operator of its own hides, and casts within sums are found too."""
    run = parsed(*KINDS[kind], f"--model.padded_vocab_size={vocabulary}", f"--model.vocab_size={vocabulary}")
    assert training_memory(run, precision).peak == pytest.approx(allocated(run, precision), rel=0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ["--global-batch-size=2"],
        ["--train.tie_embeddings=true"],
        ["--micro-batch-size=1", "--max-seq-length=16"],
        ["--optimizer.class_path=torch.optim.SGD", "--optimizer.init_args.momentum=0.9"],
        ["--optimizer.class_path=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.02"],
        ["--activation_checkpointing=block"],
        ["--activation_checkpointing=moe", "--model.padded_vocab_size=64", "--model.vocab_size=64"],
    ],
    ids=str,
)
def test_so_does_one_that(flags: list[str]) -> None:
    """does not accumulate, ties its embeddings, has its most in the update, has another optimizer, computes twice"""
    run = parsed(*KINDS["moe"], *flags)
    assert training_memory(run, "32-true").peak == pytest.approx(allocated(run, "32-true"), rel=0.02)


def test_muon_in_bf16_has_moments_in_fp32() -> None:
    run = parsed(*KINDS["moe"], "--optimizer.class_path=litmoe.train.muon.Muon", "--optimizer.init_args.lr=0.02")
    found = training_memory(run, "bf16-true")
    assert found.peak == pytest.approx(allocated(run, "bf16-true"), rel=0.02)
    assert found.optimizer == training_memory(run, "32-true").optimizer


def test_the_parts() -> None:
    run = parsed(*KINDS["moe"])
    found = training_memory(run, "32-true")
    with use_custom_moe():
        gpt = GPT(run.settings.model)
    parameters = sum(parameter.nbytes for parameter in gpt.parameters())
    assert found.weights == parameters + gpt.cos.nbytes + gpt.sin.nbytes
    assert found.gradients == parameters
    assert found.optimizer == 2 * parameters + 4 * len(list(gpt.parameters()))
    assert found.activations > 2 * 2 * 256 * 128 * 4  # at least each layer's input
    assert found.peak == sum(found)
    tied = training_memory(parsed(*KINDS["moe"], "--train.tie_embeddings=true"), "32-true")
    assert found.weights - tied.weights == 2048 * 128 * 4


def test_the_state_of_an_8_bit_optimizer() -> None:
    """A byte for each moment and a scale for each block of 256, where a tensor is as large as 4,096 numbers."""
    flags = ["--optimizer.class_path=torchao.optim.AdamW8bit", "--model.n_layer=1"]
    found = training_memory(parsed(*KINDS["dense"], *flags), "bf16-true", ADA)
    matrices = 2 * 2048 * 128 + 128 * (256 + 128 + 3 * 384)
    small = 3 * 128 * 2  # three norms in bf16
    assert found.optimizer == 2 * (matrices + matrices // 256 * 4 + 5 * 256 * 4 + small) + 2 * 2 * 256 * 4


def test_fp16_makes_all_logits() -> None:
    """In 16 bits, in 32, and their gradient: a loss in blocks could not be scaled."""
    found = training_memory(parsed(*KINDS["dense"]), "16-mixed", Hardware((7, 5), triton=True))
    assert found.logits >= 2 * 256 * 2048 * (2 + 4)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0)])
def test_any_card_can_be_worked_out_without_one(capability: tuple[int, int]) -> None:
    """Under a gradient scaler the update takes many tensors at once, which needs memory of its own."""
    card = Hardware(capability, triton=True)
    found = {
        precision: training_memory(
            parsed(*KINDS["moe"], "--max-seq-length=32", "--activation_checkpointing=block"), precision, card
        )
        for precision in ("bf16-mixed", "16-mixed", "32-true")
    }
    assert found["16-mixed"].workspace > found["bf16-mixed"].workspace + found["bf16-mixed"].weights * 0.4
    assert all(part % 512 == 0 for part in found["32-true"])
