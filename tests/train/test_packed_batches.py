"""A packed micro batch gives what its conversations give one by one: losses, gradients, expert counts."""

import litgpt.lora
import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor

from custom_moe import MoE
from litmoe.data.sft_data import IGNORE_INDEX, collate
from litmoe.layers import use_our_layers
from litmoe.train.model import Batch, Losses, PretrainingModel

CONTEXT, END = 48, 0
# Two fill the context together, and one does alone.
LENGTHS = [20, CONTEXT, 9, 28, 5, 31]
DENSE = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "n_expert": 0}
LORA = {"lora_r": 4, "lora_dropout": 0.0, "lora_query": True, "lora_value": True, "lora_mlp": True}
KINDS = {
    "dense": DENSE,
    "experts": {},
    "LoRA": LORA,
    "LoRA, dense": DENSE | LORA,
    "partial rotation": {"rotary_percentage": 0.5},
    "capped scores": {"attention_logit_softcapping": 20.0},
}


def build(fields: dict, kind: str) -> GPT:
    fields = {**fields, "block_size": CONTEXT, **KINDS[kind]}
    torch.manual_seed(0)
    with use_our_layers():
        gpt = litgpt.lora.GPT(litgpt.lora.Config(**fields)) if "lora_r" in fields else GPT(Config(**fields))
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    if isinstance(gpt, litgpt.lora.GPT):
        litgpt.lora.mark_only_lora_as_trainable(gpt)
    return gpt


def conversations() -> list[tuple[Tensor, Tensor]]:
    """Token ids and answers, as items of ``EncodedConversations``."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for length in LENGTHS:
        is_answer = torch.rand(length + 1, generator=generator) < 0.5
        is_answer[-1] = True
        items.append((torch.randint(1, 384, (length + 1,), generator=generator), is_answer))
    return items


def answers(batch: Batch) -> int:
    return int((batch.targets != IGNORE_INDEX).sum())


def tokens(batch: Batch) -> int:
    assert batch.lengths is not None
    return int(batch.lengths.sum())


def run(model: PretrainingModel, batches: list[Batch]) -> tuple[Losses, dict[str, Tensor]]:
    """Return the means over all answer tokens (cross-entropy) and all tokens (routers), with their gradients."""
    gpt, parts = model.gpt, []
    gpt.zero_grad()
    n_moe = sum(isinstance(block.mlp, MoE) for block in gpt.transformer.h)
    last_counts = torch.arange(n_moe * 4).view(n_moe, 4) + 1 if n_moe else None
    for batch in batches:
        of_answers = answers(batch) / sum(map(answers, batches))
        of_tokens = tokens(batch) / sum(map(tokens, batches))
        losses = model(*batch, last_counts)
        parts.append(
            Losses(
                losses.cross_entropy * of_answers,
                losses.load_balancing * of_tokens,
                losses.z_loss * of_tokens,
                losses.router_confidence * of_tokens,
                losses.expert_counts,
            )
        )
        (parts[-1].cross_entropy + parts[-1].load_balancing + 0.1 * parts[-1].z_loss).backward()
    gradients = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    return Losses(*(torch.stack(column).sum(0).detach() for column in zip(*parts, strict=True))), gradients


@pytest.mark.parametrize("masked", [False, True], ids=["by documents", "with a mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(moe_fields: dict, kind: str, masked: bool) -> None:
    """With a mask as if compiled on a CPU."""
    model = PretrainingModel(build(moe_fields, kind), compiler=(lambda function: function) if masked else None)
    items = conversations()
    packed = Batch(*collate(items, END, CONTEXT, packed=True))
    # 141 tokens: three full rows, where padding needs six.
    assert packed.input_ids.shape == (3, CONTEXT) and packed.documents is not None
    alone = [Batch(*collate([item], END, CONTEXT, packed=True)) for item in items]
    assert all(batch.documents is None for batch in alone)
    assert tokens(packed) == sum(map(tokens, alone)) == sum(LENGTHS)

    (losses, gradients), (expected, expected_gradients) = run(model, [packed]), run(model, alone)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    # Exactly: padding is no load.
    assert torch.equal(losses.expert_counts, expected.expert_counts)
    if losses.expert_counts.numel():
        assert (losses.expert_counts.sum(1) == 2 * sum(LENGTHS)).all()
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_conversations_do_not_see_each_other(moe_fields: dict) -> None:
    model, items = PretrainingModel(build(moe_fields, "experts")), conversations()
    (ids, is_answer), *others = items
    original, changed = (
        Batch(*collate([first, *others], END, CONTEXT, packed=True))
        for first in ((ids, is_answer), ((ids + 7) % 384, is_answer))
    )
    # The loss of the others only.
    targets = original.targets.masked_fill(original.documents == 0, IGNORE_INDEX)
    with torch.no_grad():
        losses = [model(*batch._replace(targets=targets)).cross_entropy for batch in (original, changed)]
        torch.testing.assert_close(*losses)
        # Without the numbers they would.
        unmasked = [batch._replace(targets=targets, documents=None) for batch in (original, changed)]
        losses = [model(*batch).cross_entropy for batch in unmasked]
    assert not torch.allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("recomputed", ["block", "moe"])
def test_recomputed(moe_fields: dict, recomputed: str) -> None:
    gpt, packed = build(moe_fields, "experts"), [Batch(*collate(conversations(), END, CONTEXT, packed=True))]
    torch.testing.assert_close(run(PretrainingModel(gpt, recomputed), packed), run(PretrainingModel(gpt), packed))
