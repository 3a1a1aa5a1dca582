"""The memory that is worked out from a config against what a real step allocates."""

import lightning as L
import pytest
import torch
from litgpt import GPT, Config

from custom_moe import use_custom_moe
from recipe.training.memory import training_memory
from recipe.training.model import PretrainingModel
from recipe.training.optimizers import make_optimizer

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}}
BATCH, CONTEXT = 4, 256
KINDS = {
    "dense": dict(mlp_class_name="LLaMAMLP", intermediate_size=384),
    "moe": dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, moe_intermediate_size=192),
}


def allocated(config: Config, precision: str) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer, and the most that a further micro batch allocates beside them."""
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    with use_custom_moe(), fabric.init_module():
        model = PretrainingModel(GPT(config))
    optimizer = make_optimizer(ADAMW, model, fused=True)
    tokens = torch.randint(config.padded_vocab_size, (BATCH, CONTEXT))

    def micro_batch() -> None:
        with fabric.autocast():
            losses = model(tokens, tokens)
        (losses.cross_entropy + losses.load_balancing + losses.z_loss).backward()

    micro_batch()
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    lasting = sum(2 * p.nbytes for p in model.parameters()) + sum(value.nbytes for value in state)
    with torch.profiler.profile(profile_memory=True) as profile:
        micro_batch()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return lasting, most


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_step_allocates_what_was_worked_out(kind: str, precision: str) -> None:
    fields = dict(n_layer=5, n_embd=128, n_head=4, block_size=CONTEXT, vocab_size=2048, padded_vocab_size=2048)
    config = Config(bias=False, norm_class_name="RMSNorm", parallel_residual=False, **fields, **KINDS[kind])
    lasting, most = allocated(config, precision)
    found = training_memory(config, optimizer=ADAMW, micro_batch_size=BATCH, seq_length=CONTEXT, precision=precision)
    assert found.weights + found.gradients + found.optimizer == lasting
    assert found.activations == pytest.approx(most, rel=0.005)
    assert found.peak == lasting + found.activations


def test_tied_embeddings_are_counted_once() -> None:
    config = Config(n_layer=2, n_embd=32, n_head=4, block_size=64, vocab_size=384, padded_vocab_size=384)
    untied, tied = (
        training_memory(config, optimizer=ADAMW, micro_batch_size=1, seq_length=64, tie_embeddings=tie)
        for tie in (False, True)
    )
    assert untied.weights - tied.weights == 384 * 32 * 4
