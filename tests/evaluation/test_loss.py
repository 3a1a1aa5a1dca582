"""Loss on validation text: every token is predicted once, and the numbers follow their definition."""

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Tokenizer

from litmoe import checkpoints
from litmoe.cli import UserError, run_cli
from litmoe.data import manifest
from litmoe.data.loader import TokenWindows
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.evaluation.loss import batched, evaluate, read_tokens, sum_loss, windows
from tests.helpers import CPU_FP32, load_script, save_tiny, tiny_gpt


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer_dir: Path) -> Path:
    """A prepared corpus of three validation stories, one of them not ASCII."""
    source = tmp_path_factory.mktemp("source")
    for split, texts in (("train", stories), ("val", [*stories[:2], "Mia saw a 🦊."])):
        (source / split).mkdir()
        (source / split / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    data_dir = tmp_path_factory.mktemp("data") / "corpus"
    prepare(
        PrepareArgs(
            source=str(source),
            data_dir=data_dir,
            tokenizer=str(tokenizer_dir),
            tokenizer_dir=data_dir.parent / "tokenizer",
            num_workers=0,
        )
    )
    return data_dir


@pytest.fixture
def checkpoint(tmp_path: Path, gpt: GPT, corpus: Path) -> Path:
    """A checkpoint that names the corpus as its training data."""
    return save_trained(tmp_path / "checkpoints" / "final", gpt, corpus)


def save_trained(folder: Path, gpt: GPT, corpus: Path, document_masking: bool = False, **train: int) -> Path:
    paths = {"train_data_path": str(corpus / "train"), "val_data_path": str(corpus / "val")}
    settings = {"data": {"class_path": "litmoe.data.TokenizedText", "init_args": paths}, "train": train}
    settings["document_masking"] = document_masking
    return save_tiny(
        folder,
        gpt,
        corpus.parent / "tokenizer",
        hyperparameters=settings,
        manifest_path=manifest.manifest_path(corpus),
    )


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("sizes", [[23], [10, 13], [1, 1, 2, 19], [5, 5, 5]])
@pytest.mark.parametrize("context", [1, 4, 5, 23, 100])
def test_each_token_is_predicted_once(sizes: list[int], context: int) -> None:
    text = torch.arange(1, sum(sizes) + 1)
    cut = list(windows(text.split(sizes), context, first=0))
    assert torch.equal(torch.cat([window[1:] for window in cut]), text)
    assert torch.equal(torch.stack([window[0] for window in cut]), torch.arange(len(cut)) * context)
    assert all(window.numel() == context + 1 for window in cut[:-1])


def test_batches_have_windows_of_one_length() -> None:
    rows = [torch.full((3,), value) for value in range(5)] + [torch.tensor([9, 9])]
    assert [tuple(batch.shape) for batch in batched(rows, 2)] == [(2, 3), (2, 3), (1, 3), (1, 2)]
    assert [tuple(batch.shape) for batch in batched(rows[:4], 2)] == [(2, 3), (2, 3)]


def test_tokens_equal_those_of_training(corpus: Path, stories: list[str]) -> None:
    tokens = torch.cat(list(read_tokens(corpus, "val")))
    split = manifest.read(corpus).splits["val"]  # type: ignore[union-attr]
    assert tokens.numel() == split.tokens
    tokenizer = Tokenizer(corpus.parent / "tokenizer")
    texts = tokenizer.processor.decode(tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert texts == [*stories[:2], "Mia saw a 🦊.", ""]
    assert split.bytes == sum(len(text.encode()) for text in texts)
    seen = torch.cat([TokenWindows(corpus, "val", 7)[index] for index in range(3)])
    assert torch.equal(seen, tokens[: 3 * 8])


# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_by_hand(gpt: GPT, corpus: Path, checkpoint: Path) -> None:
    """Token by token, from the definition: tokens before it in its window, log-softmax, sum."""
    tokens = [0, *torch.cat(list(read_tokens(corpus, "val"))).tolist()]
    nats = 0.0
    for position in range(1, len(tokens)):
        start = (position - 1) // 16 * 16
        with torch.no_grad():
            logits = gpt(torch.tensor([tokens[start:position]]))[0, -1].double()
        nats -= logits.log_softmax(-1)[tokens[position]].item()
    split = manifest.read(corpus).splits["val"]  # type: ignore[union-attr]
    result = evaluate(checkpoint, max_seq_length=16, batch_size=3, **CPU_FP32)
    assert result.tokens == len(tokens) - 1 == split.tokens
    assert result.bytes == split.bytes
    assert result.windows == math.ceil(split.tokens / 16)
    assert result.loss == pytest.approx(nats / split.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / split.tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / split.bytes, rel=1e-5)


def test_untrained_model_has_uniform_loss(tmp_path: Path, gpt: GPT, corpus: Path) -> None:
    torch.nn.init.zeros_(gpt.lm_head.weight)
    result = evaluate(save_trained(tmp_path / "final", gpt, corpus), **CPU_FP32)
    assert result.loss == pytest.approx(math.log(384))
    assert result.perplexity == pytest.approx(384)


def test_batch_size_does_not_change_the_loss(gpt: GPT, checkpoint: Path) -> None:
    results = [evaluate(checkpoint, max_seq_length=16, batch_size=size, **CPU_FP32) for size in (1, 4, None)]
    assert len({(result.tokens, result.windows) for result in results}) == 1
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6) == pytest.approx(results[2].loss, rel=1e-6)


def test_documents_by_themselves(gpt: GPT, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    masked = evaluate(checkpoint, document_masking=True, **CPU_FP32)
    end = manifest.checked_manifest(corpus).tokenizer.eos_id
    nats = 0.0
    for window in windows(read_tokens(corpus, "val"), 64, end):
        inputs, targets = window[:-1], window[1:]
        # A document ends with the end-of-text token.
        ends = [0, *((inputs == end).nonzero().flatten() + 1).tolist(), len(inputs)]
        for start, stop in pairwise(ends):
            if start < stop:
                with torch.no_grad():
                    logits = gpt(inputs[None, start:stop])[0]
                nats += float(F.cross_entropy(logits, targets[start:stop], reduction="sum"))
    assert masked.loss * masked.tokens == pytest.approx(nats, rel=1e-5)
    assert masked.loss != pytest.approx(evaluate(checkpoint, **CPU_FP32).loss, rel=1e-4)
    # Without the flag as in training.
    trained = save_trained(tmp_path / "masked", gpt, corpus, document_masking=True)
    assert evaluate(trained, **CPU_FP32).loss == masked.loss
    assert not evaluate(trained, document_masking=False, **CPU_FP32).document_masking


def test_max_iters_counts_what_was_read(checkpoint: Path, corpus: Path) -> None:
    complete = evaluate(checkpoint, max_seq_length=16, batch_size=2, **CPU_FP32)
    part = evaluate(checkpoint, max_seq_length=16, batch_size=2, max_iters=1, **CPU_FP32)
    assert (part.windows, part.tokens) == (2, 32)
    assert part.bytes == round(complete.bytes * 32 / complete.tokens)


def test_uses_the_context_of_training(tmp_path: Path, gpt: GPT, corpus: Path, checkpoint: Path) -> None:
    assert evaluate(checkpoint, **CPU_FP32).context == 64
    assert evaluate(save_trained(tmp_path / "short", gpt, corpus, max_seq_length=24), **CPU_FP32).context == 24
    with pytest.raises(UserError, match="expected 1 to 64"):
        evaluate(checkpoint, max_seq_length=65, **CPU_FP32)


def test_reads_a_checkpoint_of_litgpt(checkpoint: Path, corpus: Path) -> None:
    expected = evaluate(checkpoint, corpus, **CPU_FP32)
    for name in ("complete.json", "training_state.pth", "manifest.json"):
        (checkpoint / name).unlink()
    result = evaluate(checkpoint, corpus, **CPU_FP32)
    assert (result.loss, result.step, result.same_data) == (expected.loss, 0, None)


def test_half_precision_is_close(checkpoint: Path) -> None:
    exact = evaluate(checkpoint, **CPU_FP32).loss
    assert evaluate(checkpoint, device="cpu", precision="bf16-true").loss == pytest.approx(exact, rel=0.02)
    mixed = evaluate(checkpoint, device="cpu", precision="bf16-mixed")
    assert mixed.loss != exact
    assert mixed.loss == pytest.approx(exact, rel=0.02)


def test_keeps_random_state_and_training_mode(gpt: GPT) -> None:
    before = torch.get_rng_state()
    gpt.train()
    sum_loss(gpt, [torch.randint(384, (2, 9), generator=torch.Generator().manual_seed(0))])
    assert gpt.training
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_refuses_another_tokenizer(tmp_path: Path, gpt: GPT, corpus: Path, tokenizer_dir: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (other / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    folder = save_tiny(tmp_path / "final", gpt, other)
    with pytest.raises(UserError, match=r"another tokenizer .* prepare_data\.py"):
        evaluate(folder, corpus, **CPU_FP32)


def test_refuses_a_small_vocabulary(tmp_path: Path, moe_fields: dict, corpus: Path) -> None:
    gpt = tiny_gpt(moe_fields | {"vocab_size": 300, "padded_vocab_size": 300})
    with pytest.raises(UserError, match="has 300 tokens"):
        evaluate(save_tiny(tmp_path / "final", gpt, None), corpus, **CPU_FP32)


def test_refuses_missing_data(tmp_path: Path, gpt: GPT, corpus: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="--data_dir"):
        evaluate(save_tiny(tmp_path / "unknown", gpt, None), **CPU_FP32)
    moved = save_tiny(tmp_path / "moved", gpt, None, hyperparameters={"data": {"val_data_path": "nowhere/val"}})
    with pytest.raises(UserError, match=r"was trained on nowhere, which does not exist .*--data_dir"):
        evaluate(moved, **CPU_FP32)
    with pytest.raises(UserError, match=r"prepare_data\.py --data_dir"):
        evaluate(checkpoint, tmp_path, **CPU_FP32)


def test_refuses_a_diverged_model(tmp_path: Path, gpt: GPT, corpus: Path) -> None:
    torch.nn.init.constant_(gpt.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(save_trained(tmp_path / "final", gpt, corpus), **CPU_FP32)


# --- script


def test_script(checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The newest checkpoint and its training data; a table on stderr, JSON on stdout and in a file."""
    monkeypatch.chdir(tmp_path)
    main = load_script("evaluate").main
    run_cli(main, ["--device=cpu", "--json-file", "result.json"], optional_positional="checkpoint")
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    expected = asdict(evaluate(Path("checkpoints") / "final", **CPU_FP32))
    assert {**shown, "seconds": 0} == {**expected, "seconds": 0}
    assert shown["same_data"] is True
    for part in ("nats per token", "perplexity", "bits per byte", f"{shown['tokens']:,}"):
        assert part in captured.err
    with pytest.raises(SystemExit) as exit_:
        run_cli(main, ["--max_iters", "0"], optional_positional="checkpoint")
    assert exit_.value.code == 1
    assert "max_iters is 0" in capsys.readouterr().err
    assert checkpoints.verify(checkpoint).step == 1
