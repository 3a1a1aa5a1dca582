"""The step of generation against LitGPT's forward: kinds of models, prompts of different lengths, precisions."""

from concurrent.futures import ThreadPoolExecutor

import litgpt.lora
import pytest
import torch
from litgpt import GPT, Config
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_moe import use_custom_moe
from litmoe.inference import decode
from litmoe.inference.decode import Decoder, is_plain
from litmoe.inference.generate import generate_tokens
from tests.tiny_checkpoint import tiny_gpt

KINDS = {
    "moe": {},
    "partial rotation": {"rotary_percentage": 0.5},
    "norms of queries and keys": {"norm_qk": True},
    "one group": {"n_query_groups": 1},
    "no groups": {"n_query_groups": 4},
    "GPT-2": {
        "mlp_class_name": "GptNeoxMLP",
        "n_expert": 0,
        "intermediate_size": 64,
        "norm_class_name": "LayerNorm",
        "bias": True,
    },
    "biases": {"bias": True},
    "scaled scores": {"attention_scores_scalar": 16},
    "capped logits": {"final_logit_softcapping": 5.0},
}
UNUSUAL = {
    "sliding window": {"sliding_window_size": 16, "sliding_window_indices": [1, 0]},
    "parallel": {"parallel_residual": True},
    "norms after": {"post_attention_norm": True, "post_mlp_norm": True},
    "olmo2's norms": {"norm_qk": True, "norm_qk_type": "olmo2"},
    "scaled embeddings": {"scale_embeddings": True},
}
PROMPTS = [torch.tensor(ids) for ids in ([5, 17, 300, 42], [7], [300, 42, 7, 9, 11, 2, 3, 4, 100], [1, 2, 3, 4])]


def ours(fields: dict) -> GPT:
    """The tiny model with the layers of custom_moe."""
    with use_custom_moe():
        gpt = GPT(Config(**fields)).eval()
    gpt.load_state_dict(tiny_gpt(fields).state_dict())
    return gpt


def forwards(gpt: GPT, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gpt(row.unsqueeze(0))[0, -1] for row in rows])


@pytest.mark.parametrize("kind", [*KINDS, *UNUSUAL])
@torch.inference_mode()
def test_each_row_is_as_by_a_plain_forward(moe_fields: dict, kind: str) -> None:
    """Two copies of prompts of four lengths; the longest fills the cache while the others go on."""
    fields = {**moe_fields, **KINDS.get(kind, UNUSUAL.get(kind, {}))}
    gpt = ours(fields)
    assert is_plain(gpt.config) == (kind in KINDS)
    decoder = Decoder(gpt, PROMPTS, copies=2, size=15)
    rows = [prompt for prompt in PROMPTS for _ in range(2)]
    torch.testing.assert_close(decoder.logits, forwards(gpt, rows), atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        tokens = torch.randint(384, (8,), generator=generator)
        logits = decoder.step(tokens)
        rows = [torch.cat((row, token.view(1))) for row, token in zip(rows, tokens, strict=True)]
        fits = torch.tensor([len(row) <= 15 for row in rows])
        torch.testing.assert_close(logits[fits], forwards(gpt, rows)[fits], atol=1e-4, rtol=1e-4)


class GraphOnTheCPU:
    """What the graph of a GPU computes: the whole cache is looked at, and a mask hides what is not filled."""

    def __init__(self, step: decode._PlainStep, positions: torch.Tensor) -> None:
        assert decode._one_at_a_time.locked(), "a process may record one graph at a time"
        self.step, self.tokens, self.positions = step, torch.zeros_like(positions), positions.clone()
        for _ in range(3):
            self.logits = step(self.tokens, self.positions, step.size, masked=True)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        return self.logits.copy_(self.step(self.tokens, self.positions, self.step.size, masked=True))


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@torch.inference_mode()
def test_a_graph_would_compute_the_same(moe_fields: dict, monkeypatch: pytest.MonkeyPatch, prompts: list) -> None:
    gpt = ours(moe_fields)
    sliced = Decoder(gpt, prompts, copies=3, size=25)
    monkeypatch.setattr(decode, "_Graph", GraphOnTheCPU)
    monkeypatch.setattr(decode, "_can_be_recorded", lambda gpt: True)
    whole = Decoder(gpt, prompts, copies=3, size=25)
    assert isinstance(whole._graph, GraphOnTheCPU)
    for token in range(5):
        tokens = torch.arange(3 * len(prompts)) * 30 + token
        expected = sliced.step(tokens)
        torch.testing.assert_close(whole.step(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@torch.inference_mode()
def test_in_bf16(moe_fields: dict, autocast: bool) -> None:
    gpt = ours(moe_fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not autocast:
            gpt = gpt.to(torch.bfloat16)
        decoder = Decoder(gpt, PROMPTS[:1], copies=1, size=20)
        assert decoder.kv_caches[0].k.dtype == torch.bfloat16
        logits = decoder.step(torch.tensor([9]))
        expected = gpt(torch.tensor([[*PROMPTS[0].tolist(), 9]]))[:, -1]
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@torch.inference_mode()
def test_with_lora(moe_fields: dict, dropout: float) -> None:
    """In training, whose dropout is none of generation's: it would also move the random state."""
    options = {"lora_r": 4, "lora_query": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}
    torch.manual_seed(0)
    with use_custom_moe():
        gpt = litgpt.lora.GPT(litgpt.lora.Config(**moe_fields, **options, lora_dropout=dropout)).train()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    random_state = torch.get_rng_state()
    decoder = Decoder(gpt, PROMPTS[:2], copies=1, size=20)
    logits = decoder.step(torch.tensor([9, 10]))
    assert torch.equal(torch.get_rng_state(), random_state)
    gpt.eval()
    rows = [torch.cat((prompt, torch.tensor([token]))) for prompt, token in zip(PROMPTS[:2], (9, 10), strict=True)]
    torch.testing.assert_close(logits, forwards(gpt, rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("copies", [1, 3])
@torch.inference_mode()
def test_prompts_of_one_length_are_read_in_groups(
    moe_fields: dict, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    """Of so many tokens that the logits of all of them fit; the last group is the smaller one."""
    gpt, prompts = ours(moe_fields), list(torch.randint(384, (7, 5), generator=torch.Generator().manual_seed(0)))
    read: list[int] = []
    gpt.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    whole = Decoder(gpt, prompts, copies, size=10)
    monkeypatch.setattr(decode, "_READ_TOGETHER", 17)
    grouped = Decoder(gpt, prompts, copies, size=10)
    assert read == [35, 5, 15, 15]
    torch.testing.assert_close(grouped.logits, whole.logits)
    for _ in range(5):
        tokens = torch.randint(384, (7 * copies,), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(grouped.step(tokens), whole.step(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["moe", "GPT-2", "parallel"])
def test_a_row_writes_what_it_would_alone(moe_fields: dict, kind: str) -> None:
    """Prompts of different lengths in one batch, up to the end of their contexts; one fills its own from the start."""
    gpt = ours({**moe_fields, **KINDS.get(kind, UNUSUAL.get(kind, {}))})
    prompts = [*PROMPTS, torch.arange(64)]
    rows = torch.stack(list(generate_tokens(gpt, prompts, max_new_tokens=60, temperature=0.0)), dim=1)
    assert rows.size(1) == 60
    for prompt, row in zip(prompts, rows, strict=True):
        alone = torch.cat(list(generate_tokens(gpt, prompt, max_new_tokens=60, temperature=0.0)))
        assert len(alone) == min(60, 64 - len(prompt) + 1)
        assert torch.equal(row[: len(alone)], alone)
        assert set(row[len(alone) :].tolist()) <= {alone[-1].item()}, "a row whose context is full stays at its last"


@pytest.mark.parametrize(("changed", "recorded"), [({}, False), ({"mlp_class_name": "LLaMAMLP", "n_expert": 0}, True)])
def test_litgpts_own_experts_are_not_recorded(moe_fields: dict, changed: dict, recorded: bool) -> None:
    """They wait for the device, which ends a recording. Without a GPU: fake tensors say that they lie on one."""
    with FakeTensorMode(), torch.device("cuda"):
        gpt = GPT(Config(**{**moe_fields, "intermediate_size": 64, **changed}))
        assert gpt.cos.is_cuda
        assert decode._can_be_recorded(gpt) == recorded


@torch.inference_mode()
def check_graph(moe_fields: dict, device: str) -> None:
    fields = {**moe_fields, "n_embd": 64, "moe_intermediate_size": 64}
    gpt = ours(fields).to(device, torch.bfloat16)
    prompts = [prompt.to(device) for prompt in PROMPTS]
    decoder = Decoder(gpt, prompts, copies=2, size=40)
    assert decoder._graph is not None
    recorded = [decoder.step(torch.full((8,), token, device=device)).clone() for token in range(20)]
    decoder = Decoder(gpt, prompts, copies=2, size=40)
    decoder._graph = None
    for token, logits in enumerate(recorded):
        expected = decoder.step(torch.full((8,), token, device=device))
        torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_on_the_gpu(moe_fields: dict) -> None:
    check_graph(moe_fields, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_graph_on_another_gpu_than_the_current_one(moe_fields: dict) -> None:
    check_graph(moe_fields, "cuda:0")  # whose stream torch would keep for the graphs of all
    check_graph(moe_fields, "cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_threads_record_and_replay_side_by_side(moe_fields: dict) -> None:
    gpt = ours({**moe_fields, **KINDS["GPT-2"]}).to("cuda")

    def write(prompt: torch.Tensor) -> list[int]:
        return torch.cat(list(generate_tokens(gpt, prompt.cuda(), max_new_tokens=50, temperature=0.0))).tolist()

    expected = [write(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, PROMPTS * 3)) == expected * 3
