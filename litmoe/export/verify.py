"""Compare a LitGPT model with a transformers model: logits, greedy text, tokens."""

from typing import Any, NamedTuple

import torch
from litgpt import GPT, Tokenizer
from torch import Tensor

from litmoe.data.tokenizers import text_ids
from litmoe.inference.generate import check_finite, generate_tokens, room_after
from litmoe.inference.text_stream import TextStream

TOLERANCE = 1e-4  # largest allowed difference between two logits in fp32
PROMPTS = ("Once upon a time", "The", "Hello, I am", "What is a fox?")
# Where tokenizers differ: spaces, apostrophes, numbers, accents, other scripts, an emoji, code.
TEXTS = (
    *PROMPTS,
    "Mia's dog isn't here;  it ran\taway.\n\n\"Why?\" - 3,141.59",
    "  Füchse, naïve café, 日本語 🦊 \u200d!",
    "def f(x):\n    return x[0] + {'a': 1}  # <b>",
)
_NEW_TOKENS = 32


class Check(NamedTuple):
    """One line of the table of checks."""

    what: str
    result: str


@torch.no_grad()
def same_logits(gpt: GPT, theirs: Any) -> Check:
    """Compare logits on random tokens, both models in fp32 on the CPU.

    Raises:
        UserError: the output of the model is not finite.
        RuntimeError: the logits differ.
    """
    length = min(gpt.config.block_size, 256)
    generator = torch.Generator().manual_seed(0)
    # Random ids, because a short text uses few rows of the embedding and the output layer.
    ids = torch.randint(gpt.config.padded_vocab_size, (2, length), generator=generator)
    our_logits, their_logits = gpt(ids), theirs(ids).logits
    check_finite(our_logits)
    difference = (our_logits - their_logits).abs().max().item()
    # Written with `not`, so that NaN is an error too.
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the logits of both models differ by {difference:.2g}; expected at most {TOLERANCE:g}")
    return Check("logits", f"differ by {difference:.1e} at most, on {ids.numel()} tokens ({TOLERANCE:.0e} is allowed)")


@torch.no_grad()
def same_text(gpt: GPT, tokenizer: Tokenizer, theirs: Any, their_tokenizer: Any) -> Check:
    """Compare greedy continuations by litmoe.inference and by the generate function of transformers.

    Raises:
        RuntimeError: they differ, other than after two tokens with equal logits.
    """
    count, ties = 0, 0
    for prompt in PROMPTS:
        prompt_ids = torch.tensor(text_ids(tokenizer, prompt))
        if not 1 <= len(prompt_ids) <= gpt.config.block_size:
            # A prompt may be longer than the context of a small model.
            continue
        limit = min(_NEW_TOKENS, room_after(len(prompt_ids), gpt.config.block_size))
        # Greedy, because sampling would use different random numbers in both models.
        steps = generate_tokens(gpt, prompt_ids, max_new_tokens=limit, temperature=0.0, eos_id=tokenizer.eos_id)
        our_ids = torch.cat([prompt_ids, *steps])
        their_ids = _generate_greedily(theirs, prompt_ids, limit, tokenizer.eos_id)
        # What generate.py prints: the prompt, then the streamed pieces.
        stream = TextStream(tokenizer, prompt_ids.tolist())
        streamed = "".join(map(stream.push, our_ids[len(prompt_ids) :].tolist())) + stream.flush()
        our_text = their_tokenizer.decode(prompt_ids, skip_special_tokens=True) + streamed
        # Of the same ids, because the text after a tie may be another one.
        decoded = their_tokenizer.decode(our_ids, skip_special_tokens=True)
        # Bytes that are not characters are decoded depending on later bytes, which a stream can't know.
        same_decoding = "\ufffd" in decoded or our_text == decoded
        same_ids = our_ids.tolist() == their_ids.tolist()
        is_tie = not same_ids and _differ_by_a_tie(gpt, our_ids, their_ids)
        if not same_decoding or not (same_ids or is_tie):
            their_text = their_tokenizer.decode(their_ids, skip_special_tokens=True)
            raise RuntimeError(
                f"after {prompt!r} both models write different texts: {our_text!r} here, {their_text!r} in transformers"
            )
        count += 1
        ties += is_tie
    note = f"; {ties} of them only up to two equally probable tokens" if ties else ""
    return Check("greedy text", f"the same after {count} prompts, up to {_NEW_TOKENS} tokens each{note}")


def _differ_by_a_tie(gpt: GPT, our_ids: Tensor, their_ids: Tensor) -> bool:
    """Return whether the logits of the first two different tokens are as close as `same_logits` allows.

    Then rounding decides which of the two is the larger one. The texts after it can't be compared.
    """
    length = min(len(our_ids), len(their_ids))
    different = (our_ids[:length] != their_ids[:length]).nonzero()
    if len(different) == 0:
        # One text is the beginning of the other.
        return False
    position = int(different[0])
    logits = gpt(our_ids[None, :position])[0, -1]
    gap = logits[our_ids[position]] - logits[their_ids[position]]
    return bool(gap.abs() <= TOLERANCE)


def _generate_greedily(theirs: Any, ids: Tensor, limit: int, eos_id: int | None) -> Tensor:
    prompt = ids[None]
    result: Tensor = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        # None, because transformers warns about settings of sampling that greedy text does not use.
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=limit,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )[0]
    return result


def same_tokens(tokenizer: Tokenizer, theirs: Any, *, may_end: bool = False) -> Check:
    """Compare token ids and decoded text.

    Args:
        tokenizer: of LitGPT.
        theirs: tokenizer of transformers.
        may_end: accept an end-of-text token after each text in transformers, which LitGPT never adds.

    Raises:
        RuntimeError: they differ.
    """
    note = ""
    for text in TEXTS:
        our_ids, their_ids = text_ids(tokenizer, text), theirs(text)["input_ids"]
        if may_end and their_ids == [*our_ids, tokenizer.eos_id]:
            their_ids = our_ids
            note = f"; without the {theirs.convert_ids_to_tokens(tokenizer.eos_id)} that transformers adds at the end"
        if our_ids != their_ids:
            raise RuntimeError(f"the token ids of {text!r} differ: {our_ids} here, {their_ids} in transformers")
        # Not LitGPT's decode, which handles a single token differently.
        our_text = tokenizer.processor.decode(our_ids)
        their_text = theirs.decode(their_ids, skip_special_tokens=True)
        if our_text != their_text:
            raise RuntimeError(f"the text of {our_ids} differs: {our_text!r} here, {their_text!r} in transformers")
    return Check("tokenizer", f"the same ids of {len(TEXTS)} texts, and back{note}")
