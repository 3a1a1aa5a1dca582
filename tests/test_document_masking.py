"""Attention within documents: every way to compute it against each document on its own."""

import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from litmoe import documents
from litmoe.cli import UserError
from litmoe.documents import DocumentLengths, document_mask, number_documents
from litmoe.layers import hidden_states, mask_for, run_block, use_our_layers
from litmoe.train.model import PretrainingModel

END = 7


def build(fields, **changes) -> GPT:
    torch.manual_seed(0)
    with use_our_layers():
        return GPT(Config(**{**fields, **changes}))


def packed(T: int = 32) -> Tensor:
    """Rows with the end of a document at the start, in the middle, twice in a row, at the end, and nowhere."""
    tokens = torch.randint(END + 1, 90, (4, T), generator=torch.Generator().manual_seed(1))
    for row, column in ((0, 0), (0, 9), (0, 10), (1, T - 1), (2, 3), (2, 20)):
        tokens[row, column] = END
    return tokens


def test_a_document_includes_its_end():
    tokens = torch.tensor([[3, END, 4, 5, END, END, 6]])
    assert number_documents(tokens, END).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    mask = document_mask(number_documents(tokens, END), compiled=False)
    assert isinstance(mask, DocumentLengths) and mask.lengths == [2, 3, 1, 1]


def mask_of_kind(kind: str, numbers: Tensor):
    if kind == "blocks":
        return documents._block_mask(numbers)
    return document_mask(numbers, compiled=kind == "tensor", needs_tensor=kind == "scores", is_added=kind == "scores")


@pytest.mark.parametrize("kind", ["lengths", "tensor", "blocks"])
@pytest.mark.parametrize("groups", [4, 2])
def test_each_document_is_computed_as_if_alone(moe_fields, kind, groups):
    gpt = build(moe_fields, n_head=4, n_query_groups=groups)
    tokens = packed()
    numbers = number_documents(tokens, END)
    # FlexAttention has no backward on a CPU.
    with torch.no_grad():
        together, _ = hidden_states(gpt, tokens, mask=mask_of_kind(kind, numbers))
        for row in range(tokens.size(0)):
            for number in numbers[row].unique().tolist():
                own = numbers[row] == number
                # Alone its positions begin at 0: attention depends on distances only.
                alone, _ = hidden_states(gpt, tokens[row : row + 1, own])
                torch.testing.assert_close(together[row : row + 1, own], alone, rtol=1e-4, atol=1e-5)


class TestGradients:
    @staticmethod
    def step(gpt: GPT, tokens: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
        gpt.zero_grad()
        model = PretrainingModel(gpt, document_end=END, **options)
        losses = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        losses.cross_entropy.backward()
        return losses.cross_entropy.detach(), [p.grad.clone() for p in gpt.parameters() if p.grad is not None]

    @pytest.mark.parametrize("longest", [0, 1024])
    def test_on_a_cpu_as_with_a_mask(self, moe_fields, monkeypatch, longest):
        """In blocks, and rows that are too long for them document by document."""
        monkeypatch.setattr("litmoe.layers.MAX_LENGTH", longest)
        gpt, tokens = build(moe_fields), packed(33)
        # As if compiled on a CPU, where the attention gets a mask.
        masked = self.step(gpt, tokens, compiler=lambda function: function)
        torch.testing.assert_close(self.step(gpt, tokens), masked, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("recomputed", ["block", "moe"])
    def test_recomputed(self, moe_fields, recomputed):
        gpt, tokens = build(moe_fields), packed(33)
        torch.testing.assert_close(self.step(gpt, tokens, recomputed=recomputed), self.step(gpt, tokens))

    @pytest.mark.parametrize(
        "changes",
        [{"rotary_percentage": 0.5}, {"attention_logit_softcapping": 30.0}],
        ids=["partial rotation", "capped scores"],
    )
    def test_by_the_attention_of_litgpt(self, moe_fields, changes):
        gpt, tokens = build(moe_fields, **changes), packed(33)
        assert not any(block.attn.is_fast for block in gpt.transformer.h)
        model = PretrainingModel(gpt, document_end=END)
        # Only what is added to the scores may be fp32 where they are bf16.
        mask = model._document_mask(tokens, None)
        assert isinstance(mask, Tensor) and mask.is_floating_point() == ("attention_logit_softcapping" in changes)
        before, _ = self.step(gpt, tokens)
        # Another first document changes nothing in the second one.
        changed = tokens.clone()
        changed[2, :3] += 1
        with torch.no_grad():
            x, _ = hidden_states(gpt, tokens, mask=model._document_mask(tokens, None))
            y, _ = hidden_states(gpt, changed, mask=model._document_mask(changed, None))
        assert torch.isfinite(before)
        torch.testing.assert_close(x[2, 4:], y[2, 4:])
        assert not torch.allclose(x[2, :3], y[2, :3])

    def test_the_same_in_any_micro_batches(self, moe_fields):
        gpt, tokens = build(moe_fields), packed(33)
        _, together = self.step(gpt, tokens)
        halves = [self.step(gpt, half)[1] for half in tokens.split(2)]
        for whole, first, second in zip(together, *halves, strict=True):
            torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-3, atol=1e-6)


def test_sliding_windows_are_refused(moe_fields):
    """LitGPT's attention would ignore the mask without a word."""
    windows = {"sliding_window_size": 8, "sliding_window_indices": [1] * moe_fields["n_layer"]}
    with pytest.raises(UserError, match="not possible in a model with a sliding window"):
        mask_for(build(moe_fields, **windows), number_documents(packed(), END))


def test_without_masking_documents_see_each_other(moe_fields):
    gpt, tokens = build(moe_fields), packed()
    changed = tokens.clone()
    changed[2, :3] += 1
    with torch.no_grad():
        x, y = hidden_states(gpt, tokens)[0], hidden_states(gpt, changed)[0]
    assert isinstance(gpt.lm_head, nn.Linear)
    assert not torch.allclose(x[2, 4:], y[2, 4:])


def test_compiled_blocks_serve_all_masks(moe_fields):
    """FlexAttention is traced without a graph break, and another batch needs no other graph."""
    gpt = build(moe_fields)
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(run_block, fullgraph=True, backend=counter)
    graphs, results = [], []
    for roll in (0, 5, 11):
        tokens = packed().roll(roll, dims=1)
        numbers = number_documents(tokens, END)
        with torch.no_grad():
            masks = [documents._block_mask(numbers), document_mask(numbers, compiled=True)]
            results.append(hidden_states(gpt, tokens, mask=masks[0], run=run)[0])
            graphs.append(counter.frame_count)
            torch.testing.assert_close(results[-1], hidden_states(gpt, tokens, mask=masks[1])[0], rtol=1e-4, atol=1e-5)
    assert graphs == [graphs[0]] * 3
