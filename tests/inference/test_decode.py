"""Decoding equals LitGPT's forward: kinds of models, prompts of different lengths, precisions, CUDA graphs."""

from concurrent.futures import ThreadPoolExecutor

import litgpt.lora
import pytest
import torch
from litgpt import GPT, Config
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_moe import use_custom_moe
from litmoe.inference import decode
from litmoe.inference.decode import Decoder
from litmoe.inference.generate import generate_tokens
from litmoe.layers import use_fast_layers
from tests.helpers import tiny_gpt

USUAL = {
    "moe": {},
    "shared and sigmoid": {
        "n_shared_expert": 1,
        "n_expert_groups": 2,
        "n_topk_groups": 1,
        "n_topk_scores_per_group": 2,
    },
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
    "olmo2's norms": {"norm_qk": True, "norm_qk_type": "olmo2"},
}
UNUSUAL = {
    "partial rotation": {"rotary_percentage": 0.5},
    "sliding window": {"sliding_window_size": 16, "sliding_window_indices": [1, 0]},
    "parallel": {"parallel_residual": True},
    "norms after": {"post_attention_norm": True, "post_mlp_norm": True},
    "scaled embeddings": {"scale_embeddings": True},
}
KINDS = USUAL | UNUSUAL
PROMPTS = [torch.tensor(ids) for ids in ([5, 17, 300, 42], [7], [300, 42, 7, 9, 11, 2, 3, 4, 100], [1, 2, 3, 4])]


def ours(fields: dict) -> GPT:
    """Return the tiny model with this project's layers."""
    with use_custom_moe(), use_fast_layers():
        gpt = GPT(Config(**fields)).eval()
    gpt.load_state_dict(tiny_gpt(fields).state_dict())
    return gpt


def last_logits(gpt: GPT, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gpt(row.unsqueeze(0))[0, -1] for row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::3]], ids=["lengths differ", "one length"])
@torch.inference_mode()
def test_each_row_equals_a_plain_forward(moe_fields: dict, kind: str, prompts: list[torch.Tensor]) -> None:
    """Two copies of each prompt. The longest row fills its cache while the others continue."""
    gpt = ours({**moe_fields, **KINDS[kind]})
    decoder = Decoder(gpt, prompts, copies=2, size=15)
    assert (decoder.layers is not None) == (kind in USUAL)
    rows = [prompt for prompt in prompts for _ in range(2)]
    torch.testing.assert_close(decoder.logits, last_logits(gpt, rows), atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        tokens = torch.randint(384, (len(rows),), generator=generator)
        logits = decoder.step(tokens)
        rows = [torch.cat((row, token.view(1))) for row, token in zip(rows, tokens, strict=True)]
        fits = torch.tensor([len(row) <= 15 for row in rows])
        torch.testing.assert_close(logits[fits], last_logits(gpt, rows)[fits], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_stock_model_equals_a_plain_forward(moe_fields: dict) -> None:
    gpt = tiny_gpt(moe_fields)
    decoder = Decoder(gpt, PROMPTS, copies=1, size=15)
    logits = decoder.step(torch.tensor([9, 10, 11, 12]))
    rows = [torch.cat((prompt, torch.tensor([9 + row]))) for row, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(logits, last_logits(gpt, rows), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoders_take_turns_on_a_model_in_training(moe_fields: dict) -> None:
    """The model keeps its mode, and has no caches; nor do the decoders share any."""
    gpt = ours(moe_fields).train()
    decoders = [Decoder(gpt, [prompt], copies=1, size=15) for prompt in PROMPTS]
    logits = torch.cat([decoder.step(torch.tensor([9])) for decoder in decoders])
    assert all(module.training for module in gpt.modules())
    assert all(block.attn.kv_cache is None for block in gpt.transformer.h)
    rows = [torch.cat((prompt, torch.tensor([9]))) for prompt in PROMPTS]
    torch.testing.assert_close(logits, last_logits(gpt, rows), atol=1e-4, rtol=1e-4)


class GraphOnCPU:
    """Computes what a CUDA graph computes: it looks at the full cache, with a mask."""

    def __init__(self, step, positions: torch.Tensor) -> None:
        self.step, self.tokens, self.positions = step, torch.zeros_like(positions), positions.clone()
        for _ in range(3):
            self.logits = step(self.tokens, self.positions)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        return self.logits.copy_(self.step(self.tokens, self.positions))


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@torch.inference_mode()
def test_graph_computes_the_same(moe_fields: dict, monkeypatch: pytest.MonkeyPatch, prompts: list) -> None:
    gpt = ours(moe_fields)
    plain = Decoder(gpt, prompts, copies=3, size=25)
    monkeypatch.setattr(decode, "_CUDAGraph", GraphOnCPU)
    monkeypatch.setattr(decode, "_can_be_recorded", lambda gpt: True)
    graphed = Decoder(gpt, prompts, copies=3, size=25)
    assert isinstance(graphed._graph, GraphOnCPU)
    for token in range(5):
        tokens = torch.arange(3 * len(prompts)) * 30 + token
        torch.testing.assert_close(graphed.step(tokens), plain.step(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@torch.inference_mode()
def test_bf16(moe_fields: dict, autocast: bool) -> None:
    gpt = ours(moe_fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not autocast:
            gpt = gpt.to(torch.bfloat16)
        decoder = Decoder(gpt, PROMPTS[:1], copies=1, size=20)
        assert decoder.gpt.transformer.h[0].attn.kv_cache.k.dtype == torch.bfloat16
        logits = decoder.step(torch.tensor([9]))
        expected = gpt(torch.tensor([[*PROMPTS[0].tolist(), 9]]))[:, -1]
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@torch.inference_mode()
def test_lora_in_training(moe_fields: dict, dropout: float) -> None:
    """Dropout does not apply to generation, where it would also change the random state."""
    options = {"lora_r": 4, "lora_query": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}
    torch.manual_seed(0)
    with use_custom_moe(), use_fast_layers():
        gpt = litgpt.lora.GPT(litgpt.lora.Config(**moe_fields, **options, lora_dropout=dropout)).train()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    random_state = torch.get_rng_state()
    decoder = Decoder(gpt, PROMPTS[:2], copies=1, size=20)
    logits = decoder.step(torch.tensor([9, 10]))
    assert torch.equal(torch.get_rng_state(), random_state)
    gpt.eval()
    rows = [torch.cat((prompt, torch.tensor([token]))) for prompt, token in zip(PROMPTS[:2], (9, 10), strict=True)]
    torch.testing.assert_close(logits, last_logits(gpt, rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("copies", [1, 3])
@torch.inference_mode()
def test_prompts_are_read_in_several_passes(moe_fields: dict, monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    gpt, prompts = ours(moe_fields), list(torch.randint(384, (7, 5), generator=torch.Generator().manual_seed(0)))
    one_pass = Decoder(gpt, prompts, copies, size=10)
    monkeypatch.setattr(decode, "_TOKENS_PER_PASS", 17)
    three_passes = Decoder(gpt, prompts, copies, size=10)
    torch.testing.assert_close(three_passes.logits, one_pass.logits)
    for _ in range(5):
        tokens = torch.randint(384, (7 * copies,), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(three_passes.step(tokens), one_pass.step(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["moe", "GPT-2", "parallel"])
def test_batch_writes_what_each_prompt_gets_alone(moe_fields: dict, kind: str) -> None:
    """Prompts of different lengths in one batch, up to the end of their contexts; one fills its own at the start."""
    gpt = ours({**moe_fields, **KINDS[kind]})
    prompts = [*PROMPTS, torch.arange(64)]
    rows = torch.stack(list(generate_tokens(gpt, prompts, max_new_tokens=60, temperature=0.0)), dim=1)
    assert rows.size(1) == 60
    for prompt, row in zip(prompts, rows, strict=True):
        alone = torch.cat(list(generate_tokens(gpt, prompt, max_new_tokens=60, temperature=0.0)))
        assert len(alone) == min(60, 64 - len(prompt) + 1)
        assert torch.equal(row[: len(alone)], alone)
        assert set(row[len(alone) :].tolist()) <= {alone[-1].item()}, "a row with a full context repeats its last token"


@pytest.mark.parametrize(
    ("changed", "recorded"),
    [({}, False), ({"mlp_class_name": "LLaMAMLP", "n_expert": 0}, True), ({"rotary_percentage": 0.5}, False)],
)
def test_layers_that_synchronize_are_not_recorded(moe_fields: dict, changed: dict, recorded: bool) -> None:
    """LitGPT's own layers wait for the device, which ends a recording. Fake tensors stand in for a GPU."""
    with FakeTensorMode(), torch.device("cuda"), use_fast_layers():
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
def test_graph_on_the_gpu(moe_fields: dict) -> None:
    check_graph(moe_fields, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_graph_on_a_gpu_that_is_not_current(moe_fields: dict) -> None:
    check_graph(moe_fields, "cuda:0")  # torch would use this stream for the graphs of all GPUs
    check_graph(moe_fields, "cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_threads_record_and_replay_concurrently(moe_fields: dict) -> None:
    gpt = ours({**moe_fields, **KINDS["GPT-2"]}).to("cuda")

    def write(prompt: torch.Tensor) -> list[int]:
        return torch.cat(list(generate_tokens(gpt, prompt.cuda(), max_new_tokens=50, temperature=0.0))).tolist()

    expected = [write(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, PROMPTS * 3)) == expected * 3
