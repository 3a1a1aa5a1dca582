"""Whether a LitGPT model and a transformers model are the same: logits, greedy text, tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from litgpt import GPT, Tokenizer
from torch import Tensor

from litmoe.cli import UserError
from litmoe.data.tokenizers import text_ids
from litmoe.inference.generate import TextStream, generate_tokens, room_after

TOLERANCE = 1e-4
"""Of the largest difference between two logits in fp32."""
PROMPTS = ("Once upon a time", "The", "Hello, I am", "What is a fox?")
TEXTS = (
    *PROMPTS,
    "Mia's dog isn't here;  it ran\taway.\n\n\"Why?\" - 3,141.59",
    "  Füchse, naïve café, 日本語 🦊 \u200d!",
    "def f(x):\n    return x[0] + {'a': 1}  # <b>",
)
_NEW_TOKENS = 32


class Check(NamedTuple):
    """A line of the table."""

    what: str
    result: str


@torch.no_grad()
def same_logits(gpt: GPT, theirs: Any, *, seed: int = 0) -> Check:
    """Compares logits on random tokens, both models in fp32 on the CPU.

    Raises:
        UserError: the model's output is not a number.
        RuntimeError: they differ.
    """
    length = min(gpt.config.block_size, 256)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(gpt.config.padded_vocab_size, (2, length), generator=generator)
    ours, others = gpt(ids), theirs(ids).logits
    if not ours.isfinite().all():
        raise UserError("the model's output is not a number: its training diverged. Use an earlier checkpoint.")
    difference = (ours - others).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the logits of both models differ by {difference:.2g}; expected {TOLERANCE:g} at most")
    return Check("logits", f"differ by {difference:.1e} at most, on {ids.numel()} tokens ({TOLERANCE:.0e} is allowed)")


@torch.no_grad()
def same_text(gpt: GPT, tokenizer: Tokenizer, theirs: Any, their_tokenizer: Any) -> Check:
    """Compares greedy continuations by litmoe.inference and by transformers' generate.

    Raises:
        RuntimeError: they differ.
    """
    count = 0
    for prompt in PROMPTS:
        ids = torch.tensor(text_ids(tokenizer, prompt))
        if not 1 <= len(ids) <= gpt.config.block_size:
            continue
        limit = min(_NEW_TOKENS, room_after(len(ids), gpt.config.block_size))
        steps = generate_tokens(gpt, ids, max_new_tokens=limit, temperature=0.0, eos_id=tokenizer.eos_id)
        ours = torch.cat([ids, *steps])
        others = _greedy(theirs, ids, limit, tokenizer.eos_id)
        # What generate.py prints: the pieces as they are streamed, after the prompt's own text.
        stream = TextStream(tokenizer, ids.tolist())
        streamed = "".join(map(stream.push, ours[len(ids) :].tolist())) + stream.flush()
        text, other = (their_tokenizer.decode(part, skip_special_tokens=True) for part in (others, ids))
        # Bytes that are no characters are decoded by what comes after them, which no stream can know.
        same = ours.tolist() == others.tolist() and ("\ufffd" in text or other + streamed == text)
        if not same:
            raise RuntimeError(
                f"after {prompt!r} both models write different texts: {other + streamed!r} here, {text!r} in "
                "transformers"
            )
        count += 1
    return Check("greedy text", f"the same after {count} prompts, up to {_NEW_TOKENS} tokens each")


def _greedy(theirs: Any, ids: Tensor, limit: int, eos_id: int | None) -> Tensor:
    prompt = ids[None]
    written: Tensor = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=limit,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )[0]
    return written


def same_tokens(tokenizer: Tokenizer, theirs: Any, texts: Sequence[str] = TEXTS, *, may_end: bool = False) -> Check:
    """Compares ids and decoded text.

    Args:
        may_end: theirs may put the end-of-text token after each text, which ours never does.

    Raises:
        RuntimeError: they differ.
    """
    ended = ""
    for text in texts:
        ours, others = text_ids(tokenizer, text), theirs(text)["input_ids"]
        if may_end and others == [*ours, tokenizer.eos_id]:
            others, ended = ours, f"; without the {theirs.convert_ids_to_tokens(tokenizer.eos_id)} after each of theirs"
        if ours != others:
            raise RuntimeError(f"of {text!r} the tokenizers make different tokens: {ours} here, {others} there")
        # LitGPT's own decode treats a single token differently.
        decoded, other = tokenizer.processor.decode(ours), theirs.decode(others, skip_special_tokens=True)
        if decoded != other:
            raise RuntimeError(f"the tokenizers decode {ours} differently: {decoded!r} here, {other!r} there")
    return Check("tokenizer", f"the same ids of {len(texts)} texts, and back{ended}")
