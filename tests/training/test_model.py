import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Config

from custom_moe import use_custom_moe
from recipe.settings import MoESettings
from recipe.training.loop import total_loss
from recipe.training.model import PretrainingModel

SIZE = dict(block_size=32, n_layer=3, n_embd=32, n_head=4, padded_vocab_size=100, vocab_size=100)
MODELS = {
    "moe": dict(
        **SIZE,
        n_query_groups=2,
        mlp_class_name="LLaMAMoE",
        moe_intermediate_size=24,
        n_expert=4,
        n_expert_per_token=2,
        norm_class_name="RMSNorm",
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
    ),
    "pythia": dict(**SIZE),  # parallel residual, LayerNorm, biases
    "gemma": dict(  # local and global rotations, scaled embeddings, norms behind the layers, softcapping
        **SIZE,
        name="Gemma",
        norm_class_name="RMSNorm",
        mlp_class_name="GemmaMLP",
        intermediate_size=48,
        bias=False,
        parallel_residual=False,
        scale_embeddings=True,
        post_attention_norm=True,
        post_mlp_norm=True,
        norm_qk=True,
        final_logit_softcapping=30.0,
        rope_local_base_freq=10000.0,
        rope_indices=[0, 1, 0],
    ),
    "deepseek": dict(  # a dense first layer, grouped sigmoid routing, a shared expert
        **SIZE,
        mlp_class_name="LLaMAMoE",
        intermediate_size=48,
        moe_intermediate_size=24,
        n_expert=4,
        n_expert_per_token=2,
        n_shared_expert=1,
        n_expert_groups=2,
        n_topk_groups=2,
        n_topk_scores_per_group=2,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        norm_class_name="RMSNorm",
        bias=False,
        parallel_residual=False,
    ),
}


def build(name: str) -> GPT:
    torch.manual_seed(0)
    with use_custom_moe():
        return GPT(Config(**MODELS[name]))


def batch(seq_length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 100, (2, seq_length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy_is_that_of_litgpts_forward(name):
    gpt = build(name)
    input_ids, targets = batch()
    losses = PretrainingModel(gpt)(input_ids, targets)
    expected = F.cross_entropy(gpt(input_ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.cross_entropy, expected)


def test_a_dense_model_has_no_balance_losses():
    losses = PretrainingModel(build("pythia"))(*batch())
    assert (float(losses.load_balancing), float(losses.z_loss), losses.expert_counts.numel()) == (0.0, 0.0, 0)


def test_expert_counts_have_a_row_for_each_moe_layer():
    assert PretrainingModel(build("moe"))(*batch()).expert_counts.shape == (3, 4)
    losses = PretrainingModel(build("deepseek"))(*batch())
    assert losses.expert_counts.shape == (2, 4)
    assert losses.expert_counts.sum(dim=1).tolist() == [2 * 2 * 17] * 2, "each of 2 x 17 tokens to two experts"
    assert losses.router_confidence.shape == (2,)


@pytest.mark.parametrize("weights", [MoESettings(1.0, 0.0), MoESettings(0.0, 1.0)])
def test_balance_losses_reach_every_router_and_nothing_where_they_are_off(weights):
    model = PretrainingModel(build("moe"))
    gates = [block.mlp.gate.weight for block in model.gpt.transformer.h]

    def gradients(settings):
        loss = total_loss(model(*batch()), settings)
        return torch.autograd.grad(loss, gates)

    for without, with_it in zip(gradients(MoESettings(0.0, 0.0)), gradients(weights), strict=True):
        assert (with_it - without).abs().max() > 1e-4


def test_training_on_the_balance_loss_alone_evens_the_load():
    """The loss must be able to do what it is for: experts that start uneven end nearly even."""
    torch.manual_seed(0)
    model = PretrainingModel(build("moe"))
    with torch.no_grad():
        for block in model.gpt.transformer.h:
            block.mlp.gate.weight[0] += 0.5 * block.mlp.gate.weight[1:].abs().mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    input_ids, targets = batch(32)
    before = model(input_ids, targets).load_balancing.item()
    for _ in range(40):
        loss = model(input_ids, targets).load_balancing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < min(before, 1.15)


def test_one_graph_for_torch_compile():
    model = PretrainingModel(build("moe"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()).cross_entropy, model(*batch()).cross_entropy)
