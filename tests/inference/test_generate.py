"""Generation: the sampling of LitGPT in one batch, streamed, without changing the model."""

import io
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config, Tokenizer
from litgpt.generate.base import generate as litgpt_generate
from litgpt.generate.base import sample as litgpt_sample
from litgpt.generate.base import sample_top_p
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from custom_moe import use_custom_moe
from litmoe import checkpoints
from litmoe.cli import UserError, run_cli
from litmoe.config import PROJECT
from litmoe.data.tokenizers import text_ids
from litmoe.inference.generate import (
    Model,
    draw_samples,
    encode_prompt,
    generate_tokens,
    load,
    restrict,
    sample_text,
    sample_tokens,
    stream_pieces,
)
from litmoe.inference.generate_cli import read_prompts
from litmoe.inference.text_stream import TextStream
from tests.helpers import load_script, save_tiny, tiny_gpt, wordy_gpt

# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.7, 1.0])  # 1 - 1e-9 is 1 in fp32
def test_restrict_equals_litgpt(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    ours = restrict(logits, temperature, top_k, top_p)
    for row, kept in zip(logits, ours, strict=True):
        # the code of litgpt.generate.base.sample before it samples
        if top_k is not None:
            values, indices = torch.topk(row, min(top_k, row.size(-1)))
            row = torch.full_like(row, float("-inf")).scatter_(-1, indices, values)
        row = row / temperature
        if top_p < 1.0:
            row = sample_top_p(row, top_p)
        assert torch.equal(kept.isfinite(), row.isfinite())
        torch.testing.assert_close(kept, row)


def test_one_row_samples_as_litgpt() -> None:
    logits = torch.randn(200, 1, 50) * 2
    for seed, row in enumerate(logits):
        torch.manual_seed(seed)
        expected = litgpt_sample(row.unsqueeze(0), temperature=0.7, top_k=20, top_p=0.9)
        drawn = sample_tokens(row, 0.7, 20, 0.9, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-31, 1e-30, 1e6])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_temperatures(temperature: float, top_p: float) -> None:
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)) * 100
    tokens = sample_tokens(logits, temperature, 20, top_p, torch.Generator().manual_seed(0))
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(dim=-1))
    assert (tokens.unsqueeze(1) == logits.topk(20).indices).any(dim=1).all()


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    tokens = sample_tokens(logits, 1.0, None, 1.0, torch.Generator().manual_seed(0))
    shares = tokens.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


@pytest.mark.parametrize("stock", [True, False], ids=["litgpt", "custom_moe"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.0)])
def test_greedy_text_equals_litgpt(moe_fields: dict, stock: bool, temperature: float, top_p: float) -> None:
    gpt, prompt = tiny_gpt(moe_fields), torch.tensor([5, 17, 300, 42])
    ours = gpt
    if not stock:
        with use_custom_moe():
            ours = GPT(Config(**moe_fields)).eval()
        ours.load_state_dict(gpt.state_dict())
    tokens = generate_tokens(
        ours, prompt, num_samples=3, max_new_tokens=40, temperature=temperature, top_p=top_p, top_k=None
    )
    rows = torch.stack(list(tokens), dim=1)
    gpt.set_kv_cache(batch_size=1)
    expected = litgpt_generate(gpt, prompt, max_returned_tokens=44, temperature=0.0)[4:]
    assert rows.shape == (3, 40)
    assert all(torch.equal(row, expected) for row in rows)


def test_cache_equals_a_plain_forward_pass(gpt: GPT) -> None:
    """Each token is the most probable one by a forward pass over all earlier tokens."""
    prompt = torch.tensor([7, 8, 9])
    generator = torch.Generator().manual_seed(0)
    drawn = list(generate_tokens(gpt, prompt, num_samples=4, max_new_tokens=12, top_k=1, generator=generator))
    rows = torch.stack(drawn, dim=1)
    for row in rows:
        for position in range(12):
            logits = gpt(torch.cat((prompt, row[:position])).unsqueeze(0))[0, -1]
            assert logits.argmax() == row[position]


def test_batched_samples_have_separate_caches(gpt: GPT) -> None:
    """A row of a batch continues as it would alone."""
    prompt = torch.tensor([1, 2, 3, 4, 5])
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack(
        list(generate_tokens(gpt, prompt, num_samples=5, max_new_tokens=20, temperature=3.0, generator=generator)),
        dim=1,
    )
    assert len({tuple(row.tolist()) for row in rows}) == 5
    for row in rows:
        plain = gpt(torch.cat((prompt, row)).unsqueeze(0))[0, 4:-1]  # (20, V): the distribution of each next token
        kept = restrict(plain, 3.0, 50, 1.0)
        assert kept.gather(1, row.unsqueeze(1)).isfinite().all()


def test_ended_samples_repeat_the_end_of_text(gpt: GPT) -> None:
    with torch.no_grad():
        gpt.lm_head.weight[0] += 0.4  # the end-of-text token is sampled now and then
    prompt = torch.tensor([1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    tokens = generate_tokens(
        gpt, prompt, num_samples=8, max_new_tokens=60, temperature=2.0, top_k=None, eos_id=0, generator=generator
    )
    rows = torch.stack(list(tokens), dim=1)
    ended = [row.tolist().index(0) for row in rows if 0 in row]
    assert len(set(ended)) > 1, "the samples should end at different places"
    for row in rows:
        row = row.tolist()
        if 0 in row:
            assert set(row[row.index(0) :]) == {0}
    if len(ended) == 8:
        assert rows.size(1) == max(ended) + 1


# --------------------------------------------------------------------------------------------- no change of the model


def test_model_in_training_is_not_changed(moe_fields: dict, tokenizer: Tokenizer) -> None:
    with use_custom_moe():
        gpt = GPT(Config(**moe_fields))
    gpt.train()
    gpt.transformer.h[0].eval()  # not the same mode everywhere
    gpt.lm_head.weight.requires_grad_(False)
    gpt.max_seq_length = 48  # train.max_seq_length
    ids = torch.randint(384, (2, 48), generator=torch.Generator().manual_seed(0))
    gpt(ids).sum().backward()

    def state() -> dict:
        return {
            "modules": list(dict(gpt.named_modules())),
            "attributes": [sorted(vars(block.attn)) for block in gpt.transformer.h],
            "training": [module.training for module in gpt.modules()],
            "kv_cache": [block.attn.kv_cache for block in gpt.transformer.h],
            "mask_cache": gpt.mask_cache,
            "max_seq_length": gpt.max_seq_length,
            "rope": (gpt.cos.data_ptr(), gpt.sin.data_ptr(), tuple(gpt.cos.shape)),
            "requires_grad": [parameter.requires_grad for parameter in gpt.parameters()],
            "inference": [tensor.is_inference() for tensor in (*gpt.parameters(), *gpt.buffers())],
            "grads": [None if p.grad is None else p.grad.sum().item() for p in gpt.parameters()],
            "weights": [parameter.sum().item() for parameter in gpt.parameters()],
        }

    before, random_state, output = state(), torch.get_rng_state(), gpt(ids)
    sample_text(gpt, tokenizer, "Once", num_samples=2, max_new_tokens=20)
    assert state() == before
    stopped = stream_pieces(gpt, tokenizer, "Once", max_new_tokens=20)
    next(stopped)
    stopped.close()
    assert state() == before
    with pytest.raises(UserError):
        sample_text(gpt, tokenizer, "word " * 100)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(gpt(ids), output)
    assert gpt(ids).requires_grad


def test_cache_of_the_caller_is_kept(gpt: GPT) -> None:
    gpt.set_kv_cache(batch_size=1)
    caches, mask = [block.attn.kv_cache for block in gpt.transformer.h], gpt.mask_cache
    list(generate_tokens(gpt, torch.tensor([1, 2]), max_new_tokens=5))
    assert [block.attn.kv_cache for block in gpt.transformer.h] == caches
    assert gpt.mask_cache is mask


def test_texts_of_one_model_are_independent(gpt: GPT) -> None:
    """In turn, from threads, and next to an unfinished one: each equals the text alone."""
    prompts = [torch.tensor(ids) for ids in ([1, 2, 3], [300, 42, 7, 9, 11], [5])]

    def alone(prompt: torch.Tensor) -> list[int]:
        return torch.cat(list(generate_tokens(gpt, prompt, max_new_tokens=40, temperature=0.0))).tolist()

    expected = [alone(prompt) for prompt in prompts]
    abandoned = generate_tokens(gpt, prompts[0], max_new_tokens=40, temperature=0.0)
    first = next(abandoned)
    steps = zip(*(generate_tokens(gpt, p, max_new_tokens=40, temperature=0.0) for p in prompts), strict=True)
    assert [torch.cat(row).tolist() for row in zip(*steps, strict=True)] == expected
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(alone, prompts * 2)) == expected * 2
    assert all(block.attn.kv_cache is None for block in gpt.transformer.h) and gpt.mask_cache is None
    assert torch.cat([first, *abandoned]).tolist() == expected[0], "the unfinished one can continue"


# ---------------------------------------------------------------------------------------------------------------- text


def test_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    """Byte-level tokens cut characters, but no piece does, and together they are the text."""
    text = "Mia saw a 🦊 and a 鲸鱼, naïve. \ufffd!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text).tolist()]
    assert "".join(pieces) + stream.flush() == text
    assert [piece for piece in pieces if "\ufffd" in piece] == ["\ufffd!"]
    assert "🦊" in pieces


def test_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    tokens = tokenizer.encode("hi 🦊").tolist()[:-1]
    assert "".join(stream.push(token) for token in tokens) == "hi "
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def _sentencepiece_like(kind: str, stories: list[str]) -> HFTokenizer:
    """Tokenizers with decoders that drop or add the space before the first word."""
    if kind == "metaspace":
        tokenizer = HFTokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["llama", "metaspace", "wordpiece", "byte-level"])
def test_streamed_text_equals_decoded_text(
    kind: str, tokenizer_dir: Path, llama_tokenizer_dir: Path, stories: list[str]
) -> None:
    """With and without a prompt, for any tokens."""
    tokenizer = Tokenizer(llama_tokenizer_dir if kind == "llama" else tokenizer_dir)
    if kind in ("metaspace", "wordpiece"):
        tokenizer.processor = _sentencepiece_like(kind, stories)
    processor, dice = tokenizer.processor, random.Random(0)
    texts = ["Once upon a time, Mia went to the sea.", "  two  blanks ", "a 🦊🏳️‍🌈 naïve 日本語!", "x\n\n\ty  \n"]
    texts += [" ".join(dice.sample(stories[0].split(), 5)) for _ in range(20)]
    cases = [processor.encode(text, add_special_tokens=False).ids for text in texts]
    words = [id for token, id in processor.get_vocab().items() if "<0x" not in token and token.isascii()]
    cases += [[dice.choice(words) for _ in range(12)] for _ in range(50)]
    for tokens in cases:
        for cut in range(len(tokens)):
            before = processor.decode(tokens[:cut])
            if before.endswith("\ufffd"):
                continue
            stream = TextStream(tokenizer, tokens[:cut])
            streamed = "".join(map(stream.push, tokens[cut:])) + stream.flush()
            assert before + streamed == processor.decode(tokens)


def test_stream_continues_after_stray_bytes(llama_tokenizer_dir: Path) -> None:
    """A stray byte changes the text of the bytes before it, and DecodeStream raises an error."""
    tokenizer, dice = Tokenizer(llama_tokenizer_dir), random.Random(0)
    for _ in range(200):
        tokens = [dice.choice((dice.randrange(3, 259), dice.randrange(363))) for _ in range(20)]
        stream = TextStream(tokenizer, tokens[:3])
        text = "".join(map(stream.push, tokens[3:])) + stream.flush()
        assert len(text) >= len(tokenizer.processor.decode(tokens)) - len(tokenizer.processor.decode(tokens[:3]))


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_stream_holds_back_few_tokens(kind: str, tokenizer_dir: Path, llama_tokenizer_dir: Path) -> None:
    """Also with many stray bytes and special tokens; spaces after them are kept."""
    tokenizer = Tokenizer(llama_tokenizer_dir if kind == "llama" else tokenizer_dir)
    words, fox = (text_ids(tokenizer, text, begin=False) for text in ("Once upon a time", "🦊"))
    stream, special = TextStream(tokenizer), 0
    tokens = [words[0], *[special] * 200, *fox, *words[1:]]
    assert "".join(map(stream.push, tokens)) == tokenizer.processor.decode(tokens)
    pieces = [stream.push(fox[-1]) for _ in range(200)]
    assert 150 < len("".join(pieces)) < 200
    text = "".join(pieces) + "".join(map(stream.push, words[1:])) + stream.flush()
    assert text.lstrip("\ufffd") == " upon a time" and text.count("\ufffd") == 200


def test_llama_text_keeps_spaces_and_letters(moe_fields: dict, llama_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(llama_tokenizer_dir)
    model = Model(wordy_gpt(moe_fields), tokenizer, Path())
    prompt = encode_prompt(tokenizer, "Once upon a time")
    tokens = torch.cat([prompt, *generate_tokens(model.gpt, prompt, max_new_tokens=40, temperature=0.0)])
    text = model.generate("Once upon a time", max_new_tokens=40, temperature=0.0)
    assert text == tokenizer.processor.decode(tokens.tolist())
    assert text.count(" ") > 10
    assert "".join(model.stream("Once upon a time", max_new_tokens=40, temperature=0.0)) == text


def test_prompts_start_like_documents(llama_tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    llama = Tokenizer(llama_tokenizer_dir)
    once = encode_prompt(llama, "Once upon").tolist()
    assert once == llama.encode("Once upon").tolist() and once[0] == llama.bos_id
    assert encode_prompt(llama, "<s>Once upon").tolist()[0] == llama.bos_id != encode_prompt(llama, "<s>Once")[1]
    assert encode_prompt(llama, "").tolist() == [llama.bos_id]
    assert encode_prompt(tokenizer, "").tolist() == [tokenizer.eos_id]


@pytest.mark.parametrize("prompt", ["<|endoftext|>Once", "Once<|endoftext|>", "<|endoftext|><|endoftext|>"])
def test_special_tokens_in_a_prompt_are_kept(tokenizer: Tokenizer, prompt: str) -> None:
    """``encode`` of LitGPT removes begin- and end-of-text tokens at both ends."""
    tokens = encode_prompt(tokenizer, prompt).tolist()
    assert tokens == tokenizer.processor.encode(prompt).ids
    assert tokens.count(tokenizer.eos_id) == prompt.count("<|endoftext|>")


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud83d", "a\udfffb"])
def test_refuses_a_prompt_that_is_not_utf8(gpt: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(UserError, match="expected UTF-8"):
        sample_text(gpt, tokenizer, prompt)


def test_stream_equals_generate(gpt: GPT, tokenizer: Tokenizer) -> None:
    model = Model(gpt, tokenizer, Path())
    options = {"max_new_tokens": 50, "temperature": 3.0, "top_k": None, "seed": 5}
    text = model.generate("Once upon", **options)
    assert text.startswith("Once upon") and len(text) > 20
    assert "".join(model.stream("Once upon", **options)) == text
    samples = model.generate("Once upon", num_samples=3, **options)
    assert len(set(samples)) == 3
    pieces = list(stream_pieces(gpt, tokenizer, "Once upon", num_samples=3, **options))
    assert [piece.sample for piece in pieces] == sorted(piece.sample for piece in pieces)
    for sample in range(3):
        own = [piece for piece in pieces if piece.sample == sample]
        assert "Once upon" + "".join(piece.text for piece in own) == samples[sample]
        assert [piece.end is None for piece in own] == [True] * (len(own) - 1) + [False]
    assert len([piece for piece in pieces if piece.sample == 0]) > 10, "the first sample streams"


def test_seed_decides_the_text(gpt: GPT, tokenizer: Tokenizer) -> None:
    def texts(seed: int) -> list[str]:
        return sample_text(gpt, tokenizer, "Once", num_samples=2, max_new_tokens=10, temperature=2.0, seed=seed)

    torch.manual_seed(0)
    first = texts(1)
    torch.manual_seed(1)
    assert texts(1) == first
    assert texts(2) != first


def test_each_sample_equals_its_seed_alone(gpt: GPT, tokenizer: Tokenizer) -> None:
    """Several prompts of different lengths in one batch."""
    prompts, options = ["Once", "Once upon a time, Mia", ""], {"max_new_tokens": 70, "temperature": 2.0}
    texts = sample_text(gpt, tokenizer, prompts, num_samples=2, seed=5, **options)
    assert len(set(texts)) == 6
    for row, text in enumerate(texts):
        assert [text] == sample_text(gpt, tokenizer, prompts[row // 2], seed=5 + row, **options)
    assert Model(gpt, tokenizer, Path()).generate(prompts[:1], **options) == sample_text(
        gpt, tokenizer, "Once", **options
    )


def test_reason_of_the_end(gpt: GPT, tokenizer: Tokenizer) -> None:
    assert draw_samples(gpt, tokenizer, "Once", max_new_tokens=3)[0].end == "max_new_tokens"
    prompt_length = tokenizer.encode("Once").numel()
    full = draw_samples(gpt, tokenizer, "Once", max_new_tokens=1000, temperature=3.0)[0]
    assert full.end == "block_size"
    tokens = list(generate_tokens(gpt, tokenizer.encode("Once").long(), max_new_tokens=1000))
    assert len(tokens) == 64 - prompt_length + 1  # the last one is never read
    with torch.no_grad():
        gpt.lm_head.weight.zero_()  # all logits are equal: argmax takes the first id, end-of-text
    assert draw_samples(gpt, tokenizer, "Once", temperature=0.0)[0] == ("", "end_of_text")


def test_empty_prompt_starts_a_document(gpt: GPT, tokenizer: Tokenizer) -> None:
    expected = list(generate_tokens(gpt, torch.tensor([tokenizer.eos_id]), max_new_tokens=5, temperature=0.0))
    for prompt in ("", "<|endoftext|>"):
        sample = draw_samples(gpt, tokenizer, prompt, max_new_tokens=5, temperature=0.0)[0]
        assert sample.text == tokenizer.decode(torch.cat(expected))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_new_tokens": 0, "top_k": -1}, "max_new_tokens is 0.*; top_k is -1"),
    ],
)
def test_refuses_settings_out_of_range(gpt: GPT, tokenizer: Tokenizer, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_text(gpt, tokenizer, "Once", **wrong)


def test_refuses_a_long_prompt(gpt: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="expected 1 to 64"):
        sample_text(gpt, tokenizer, "cat " * 65)


def test_refuses_a_diverged_model(gpt: GPT, tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        gpt.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(UserError, match="diverged"):
        sample_text(gpt, tokenizer, "Once")


# ---------------------------------------------------------------------------------------------------------------- load


def test_load(tmp_path: Path, gpt: GPT, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    import litmoe

    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    (folder / "training_state.pth").unlink()  # not needed
    model = litmoe.load(folder, precision="32-true")
    assert model.config == gpt.config
    expected = sample_text(gpt, tokenizer, "Once", max_new_tokens=20, temperature=0.0)[0]
    assert model.generate("Once", max_new_tokens=20, temperature=0.0) == expected
    half = load(folder, device="cpu", precision="bf16-true")
    assert {parameter.dtype for parameter in half.gpt.parameters()} == {torch.bfloat16}
    assert half.gpt.cos.dtype == torch.float32
    assert half.generate("Once", max_new_tokens=5).startswith("Once")


def test_load_uses_the_context_of_training(tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> None:
    settings = {"train": {"max_seq_length": 24}}
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir, hyperparameters=settings)
    model = load(folder, device="cpu")
    assert (model.gpt.max_seq_length, model.config.block_size) == (24, 64)
    sample = draw_samples(model.gpt, model.tokenizer, "Once", max_new_tokens=100, temperature=3.0)[0]
    assert sample.end == "block_size"
    longer = load(folder, device="cpu", max_seq_length=64)
    assert longer.gpt.max_seq_length == 64 == len(longer.gpt.cos)
    with pytest.raises(UserError, match="expected 1 to 64"):
        load(folder, device="cpu", max_seq_length=65)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 24


def test_load_refuses_damaged_folders(tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> None:
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir)
    with pytest.raises(UserError, match="--device cpu"):
        load(folder, device="warp")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is truncated"):
        load(folder)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load(save_tiny(tmp_path / "bare", gpt, None))


# --- script


def test_script(tmp_path: Path, gpt: GPT, tokenizer_dir: Path) -> None:
    """The newest checkpoint under checkpoints/, only text on stdout, headers for several samples."""
    save_tiny(tmp_path / "checkpoints" / "final", gpt, tokenizer_dir, step=3)
    command = [
        sys.executable,
        str(PROJECT / "generate.py"),
        "--prompt",
        "Once",
        "--num-samples",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--max_new_tokens=70", "--temperature", "2", "--top_k", "null", "--seed", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=200)
    assert result.returncode == 0, result.stderr
    texts = sample_text(
        gpt, Tokenizer(tokenizer_dir), "Once", num_samples=2, max_new_tokens=70, temperature=2.0, top_k=None, seed=3
    )
    out = io.StringIO(newline=None)
    for number, text in enumerate(texts, start=1):
        print(f"--- sample {number} of 2 ---\n{text}", file=out)
    assert result.stdout.replace("\r\n", "\n") == out.getvalue().replace("\r\n", "\n")
    assert f"{Path('checkpoints') / 'final'}, step 3" in result.stderr
    assert "filled the context of 64 tokens" in result.stderr


def test_script_with_several_prompts(
    tmp_path: Path, gpt: GPT, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = save_tiny(tmp_path / "final", gpt, tokenizer_dir), tmp_path / "prompts.txt"
    file.write_text("Once\nMia was happy\n", encoding="utf-8")
    argv = [str(folder), "--prompts", str(file), "--device", "cpu", "--max_new_tokens", "9"]
    run_cli(load_script("generate").main, argv, optional_positional="checkpoint")
    texts = sample_text(gpt, Tokenizer(tokenizer_dir), ["Once", "Mia was happy"], max_new_tokens=9)
    expected = "".join(f"--- sample {number} of 2 ---\n{text}\n" for number, text in enumerate(texts, start=1))
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit):
        run_cli(load_script("generate").main, [*argv, "--prompt", ""], optional_positional="checkpoint")
    assert "got both --prompt and --prompts" in capsys.readouterr().err


def test_file_of_prompts(tmp_path: Path) -> None:
    """From any editor: byte order marks and empty lines are skipped, only line breaks separate prompts."""
    file, read = tmp_path / "prompts.txt", read_prompts
    file.write_bytes(b"\xef\xbb\xbf" + "Once\r\n\r\n \nMia\u2028was\fhappy \n\n".encode())
    assert read(file) == ["Once", "Mia\u2028was\fhappy "]
    file.write_bytes("Once\r\n\r\nMia \r\n".encode("utf-16"))
    assert read(file) == ["Once", "Mia "]
    file.write_bytes(b"\n \n")
    with pytest.raises(UserError, match=r"prompts\.txt is empty; expected one prompt per line"):
        read(file)
    with pytest.raises(UserError, match="found no file "):
        read(tmp_path / "nowhere")


def test_script_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        ([], "found no complete checkpoint under checkpoints"),
        (["nowhere"], "found no checkpoint at nowhere"),
        (["--prompt", "caf\udce9"], r"the argument 'caf\udce9' holds bytes that are not UTF-8"),
        (["--prompt=caf\udce9"], r"the argument '--prompt=caf\udce9' holds bytes that are not UTF-8"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_cli(load_script("generate").main, argv, optional_positional="checkpoint")
        captured = capsys.readouterr()
        assert exit_.value.code == 1
        assert captured.err.startswith(f"error: {message}")
        assert captured.out == ""
    assert checkpoints.newest(tmp_path) is None
