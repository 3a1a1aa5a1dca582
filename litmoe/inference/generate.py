"""Text from a model: several samples in one batch, with LitGPT's KV cache.

>>> from litmoe import load
>>> model = load("checkpoints/final")
>>> print(model.generate("Once upon a time", max_new_tokens=50))
>>> for piece in model.stream("Once upon a time", temperature=0.5):
...     print(piece, end="", flush=True)
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from litgpt import GPT, Config, Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.tokenizers import text_ids
from litmoe.inference.decode import Decoder

End = Literal["end_of_text", "max_new_tokens", "block_size"]
Precision = Literal["auto", "32-true", "bf16-true", "16-true"]

_LONGEST_WAIT = 32
"""Tokens in a row that end within a character, after which they are handed out as U+FFFD: they are no text. Each step
decodes all tokens that wait, so that a model that writes only such ones would become slower and slower."""

_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Piece(NamedTuple):
    """Some text of one sample, in the order in which a reader wants it: all of sample 0 before any of sample 1."""

    sample: int
    text: str
    end: End | None
    """Why the sample ends with this piece; None while it goes on."""
    tokens: int
    """How many the sample has so far, with those that ended it."""


class Sample(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    """Without the prompt and the end-of-text token."""
    end: End | None


class Sampling(TypedDict, total=False):
    """How to sample; the defaults stand in `stream_pieces`."""

    max_new_tokens: int
    num_samples: int
    seed: int
    temperature: float
    top_k: int | None
    top_p: float


# -------------------------------------------------------------------------------------------------------------- tokens


def restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Scales logits by the temperature and sets those that may not be sampled to -inf, each row by itself.

    In the order of `litgpt.generate.base.sample`: the ``top_k`` best, then the temperature, then the fewest tokens
    whose probability exceeds ``top_p``.

    Args:
        logits: ``(B, V)``; the result has the same shape.
    """
    if top_k is not None and top_k < logits.size(-1):
        best, indices = torch.topk(logits, top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, indices, best)
    logits = logits / temperature
    if top_p < 1.0:
        ascending, indices = torch.sort(logits)
        remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        remove[:, -1] = False  # the most probable one always stays
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, indices, remove), float("-inf"))
    return logits


def sample_tokens(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """The next token of each row, ``(B, V) -> (B,)``; the most probable one where temperature or top_p is 0.

    With a generator for each row, a row's draw is that of `torch.multinomial` for this row alone.
    """
    if temperature < 1e-30 or top_p == 0.0:  # logits divided by less would be infinite
        return logits.argmax(dim=-1)
    probabilities = restrict(logits.float(), temperature, top_k, top_p).softmax(dim=-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)
    noise = torch.empty_like(probabilities)
    for row, own in zip(noise, generator, strict=True):
        row.exponential_(generator=own)
    return (probabilities / noise).argmax(dim=-1)


@torch.inference_mode()
def generate_tokens(
    gpt: GPT,
    prompt: Tensor | Sequence[Tensor],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Generator[Tensor, None, None]:
    """Continues each prompt ``num_samples`` times, all in one batch; yields each row's next token, ``(B,)``.

    The rows of the first prompt come first. A prompt is computed once, whatever the number of its samples. A row that
    has reached ``eos_id``, or whose context is full, stays at its last token. Ends when all rows have, or after
    ``max_new_tokens``.

    Leaves the model as it was found (also when the caller stops early), so that it may be the one in training; pass
    the plain `litgpt.GPT`, not what `torch.compile` or Fabric made of it.

    Args:
        prompt: token ids, ``(T,)`` with ``1 <= T <= gpt.max_seq_length``, on the model's device; or several such.
        generator: on the model's device; with None the global random state is used and changed. With one for each row,
            a row is drawn as it would be alone.

    Raises:
        UserError: sampling settings out of range, a prompt too long, or a model whose output is not a number.
    """
    check_sampling(num_samples, max_new_tokens, temperature, top_k, top_p)
    prompts = [prompt] if isinstance(prompt, Tensor) else prompt
    steps = [min(max_new_tokens, room_after(len(ids), gpt.max_seq_length)) for ids in prompts]
    size = max(len(ids) + count - 1 for ids, count in zip(prompts, steps, strict=True))
    decoder = Decoder(gpt, prompts, num_samples, size)
    logits = decoder.logits
    if not logits.isfinite().all():
        raise UserError("the model's output is not a number: its training diverged. Use an earlier checkpoint.")
    tokens = None
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    last = torch.tensor(steps, device=logits.device).repeat_interleave(num_samples)  # (B,)
    for step in range(1, max(steps) + 1):
        next_tokens = sample_tokens(logits, temperature, top_k, top_p, generator)  # (B,)
        tokens = next_tokens if tokens is None else torch.where(ended, tokens, next_tokens)
        yield tokens
        if step == max(steps):
            return
        if eos_id is not None:
            ended |= tokens == eos_id
            if ended.all():
                return
        if step >= min(steps):
            ended |= last <= step
        logits = decoder.step(tokens)


def room_after(length: int, context: int) -> int:
    """How many tokens can follow a prompt of ``length``: the last one need not be read by the model.

    Raises:
        UserError: the prompt does not fit.
    """
    if not 1 <= length <= context:
        raise UserError(
            f"the prompt has {length:,} tokens; expected 1 to {context:,}, the model's context. Shorten the prompt."
        )
    return context - length + 1


def check_sampling(num_samples: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises UserError for the settings that are out of range, all in one message."""
    problems = []
    if num_samples < 1:
        problems.append(f"num_samples is {num_samples}; expected 1 or more")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if not 0.0 <= temperature <= 1e6:  # all tokens are alike long before; far beyond, -inf divided by it is no number
        problems.append(f"temperature is {temperature}; expected 0 (always the most probable token) to 1,000,000")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k is {top_k}; expected 1 or more, or null for all tokens")
    if not 0.0 <= top_p <= 1.0:
        problems.append(f"top_p is {top_p}; expected 0 to 1, where 1 means all tokens")
    if problems:
        raise UserError("; ".join(problems) + ".")


def check_seed(seed: int) -> int:
    """The seed, where torch takes it.

    Raises:
        UserError: it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise UserError("the seed is too large; expected a whole number of at most 64 bits: -2**63 to 2**64 - 1.")
    return seed


# ---------------------------------------------------------------------------------------------------------------- text


class TextStream:
    """Turns one sample's tokens into text as they come; bytes of an unfinished character wait for the rest of it.

    The pieces together are exactly what decoding all tokens at once gives after the text of ``context``. Decoding each
    token alone does not: SentencePiece-like tokenizers drop the space before the first token that they decode.

    Args:
        tokenizer: one of LitGPT.
        context: the tokens that the sample continues, such as its prompt. Empty for a text of its own, such as an
            answer: it was encoded alone in training, so it is decoded alone.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._processor = tokenizer.processor
        added = self._processor.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}  # without text
        context = [token for token in context if token not in self._special]
        # A character of at most four bytes that the context leaves unfinished belongs to the sample.
        size = len(context)
        whole = (
            end for end in range(size, max(size - 4, -1), -1) if not self._decode(context[:end]).endswith("\ufffd")
        )
        self._before = context[: next(whole, size)]
        """The last tokens whose text was handed out; how the waiting ones are decoded depends on them"""
        self._waiting: list[int] = []
        self._repeated = 0
        """Characters that the decoder gives once more, since its first tokens end within a character"""
        self._stream = DecodeStream(self._before, skip_special_tokens=True)
        for token in context[len(self._before) :]:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that has become certain with ``token``; often one word, sometimes none."""
        if token in self._special:
            return ""
        self._waiting.append(token)
        try:
            text = self._stream.step(self._processor, token)
        except Exception:  # a plain one: a byte that fits no character changed how the bytes before it are decoded
            return self._restart()
        if text is None:
            return self._restart() if len(self._waiting) == _LONGEST_WAIT else ""
        text, self._repeated = text[self._repeated :], 0
        self._hand_out()
        return text

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD."""
        text = self._decode([*self._before, *self._waiting])[len(self._decode(self._before)) :]
        self._hand_out()
        return text

    def _hand_out(self) -> None:
        self._before = [*self._before, *self._waiting][-2 * _LONGEST_WAIT :]
        self._waiting = []

    def _restart(self) -> str:
        """Hands out what is left and begins a new decoder after it."""
        text = self.flush()
        self._stream = DecodeStream(self._before, skip_special_tokens=True)
        given = self._decode(self._before)
        self._repeated = len(given) if given.endswith("\ufffd") else 0
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._processor.decode(tokens, skip_special_tokens=True)
        return text


class StopSequences:
    """Finds the end of one sample in its tokens, and holds back what may be the beginning of that end."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [list(sequence) for sequence in sequences]
        self.held: list[int] = []

    def push(self, token: int) -> tuple[list[int], bool]:
        """The tokens that have become certain to be text with ``token``, and whether the sample has ended."""
        self.held.append(token)
        for sequence in self.sequences:
            if self.held[-len(sequence) :] == sequence:
                return self.held[: -len(sequence)], True
        beginnings = (sequence[:size] for sequence in self.sequences for size in range(1, len(sequence)))
        hold = max((len(b) for b in beginnings if self.held[-len(b) :] == b), default=0)
        certain = self.held[: len(self.held) - hold]
        self.held = self.held[len(certain) :]
        return certain, False


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt's token ids, ``(T,)``, as a document of the training text begins.

    Without a begin-of-text token an empty prompt is the end-of-text token, after which the next document begins.

    Raises:
        UserError: the prompt is empty and the tokenizer has neither token.
    """
    ids = text_ids(tokenizer, prompt)
    if not ids:
        if tokenizer.eos_id is None:
            raise UserError(
                "the prompt is empty and the tokenizer has no end-of-text token to start from; give a --prompt."
            )
        ids = [tokenizer.eos_id]
    return torch.tensor(ids)


def stream_pieces(
    gpt: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | Sequence[str],
    *,
    max_new_tokens: int = 256,
    num_samples: int = 1,
    seed: int | torch.Generator = 42,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    stop: Sequence[Sequence[int]] = (),
    join: bool = True,
) -> Generator[Piece, None, None]:
    """What the model writes after ``prompt``: sample 0 as it comes, then the others, which grew in the same batch.

    Of several prompts, all samples of the first come first. The global random state is neither used nor changed.
    Arguments and errors as `generate_tokens`.

    Args:
        prompt: a text, or token ids as they are; or several texts.
        seed: sample i is the one that the seed ``seed + i`` gives alone. Or a generator on the model's device, which
            goes on from where it is.
        stop: sequences of tokens that end a sample as the end-of-text token does; none of them is text.
        join: decode each sample as the continuation of its prompt's text; False: as a text of its own, like an answer.
    """
    device = gpt.transformer.wte.weight.device
    tokens = [
        (encode_prompt(tokenizer, one) if isinstance(one, str) else torch.tensor(one)).to(device)
        for one in _as_list(prompt)
    ]
    rooms = [room_after(len(ids), gpt.max_seq_length) for ids in tokens for _ in range(num_samples)]
    rows = len(rooms)
    if tokenizer.eos_id is not None:
        stop = [[tokenizer.eos_id], *stop]
    stops = [StopSequences(stop) for _ in range(rows)]
    contexts = [ids.tolist() if join else [] for ids in tokens for _ in range(num_samples)]
    streams = [TextStream(tokenizer, context) for context in contexts]
    waiting = [""] * rows
    lengths = [0] * rows
    ends: list[End | None] = [None] * rows
    current = 0
    steps = generate_tokens(
        gpt,
        tokens,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=seed if isinstance(seed, torch.Generator) else _generators(seed, rows, device),
    )
    with closing(steps):
        for step, next_tokens in enumerate(steps, start=1):
            for row, token in enumerate(next_tokens.tolist()):
                if ends[row] is not None:
                    continue
                lengths[row] = step
                certain, ended = stops[row].push(token)
                if ended:
                    ends[row] = "end_of_text"
                elif step == min(max_new_tokens, rooms[row]):
                    ends[row] = "max_new_tokens" if max_new_tokens <= rooms[row] else "block_size"
                    certain = certain + stops[row].held
                waiting[row] += "".join(streams[row].push(token) for token in certain)
                if ends[row] is not None:
                    waiting[row] += streams[row].flush()
            while current < rows:
                if waiting[current] or ends[current] is not None:
                    yield Piece(current, waiting[current], ends[current], lengths[current])
                    waiting[current] = ""
                if ends[current] is None:
                    break
                current += 1
            if None not in ends:
                return


def _as_list(prompt: str | Sequence[int] | Sequence[str]) -> Sequence[str | Sequence[int]]:
    several = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], str)
    return prompt if several else [prompt]  # type: ignore[list-item, return-value]


def _generators(seed: int, rows: int, device: torch.device) -> list[torch.Generator]:
    """One for each row, so that its samples do not depend on the others."""
    check_seed(seed)
    return [torch.Generator(device).manual_seed(check_seed(seed + row)) for row in range(rows)]


def draw_samples(
    gpt: GPT, tokenizer: Tokenizer, prompt: str | Sequence[str], **sampling: Unpack[Sampling]
) -> list[Sample]:
    """``num_samples`` continuations of each prompt, one batch, without touching the global random state or the model.

    All samples of the first prompt come first.
    """
    texts: dict[int, str] = {}
    ends: dict[int, End | None] = {}
    for piece in stream_pieces(gpt, tokenizer, prompt, **sampling):
        texts[piece.sample] = texts.get(piece.sample, "") + piece.text
        ends[piece.sample] = piece.end
    return [Sample(text, ends[sample]) for sample, text in texts.items()]


def sample_text(gpt: GPT, tokenizer: Tokenizer, prompt: str | Sequence[str], **sampling: Unpack[Sampling]) -> list[str]:
    """As `draw_samples`, each with its prompt before it."""
    samples = draw_samples(gpt, tokenizer, prompt, **sampling)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return [prompts[i * len(prompts) // len(samples)] + sample.text for i, sample in enumerate(samples)]


# --------------------------------------------------------------------------------------------------------------- model


class Model:
    """A trained model with its tokenizer, as `load` returns it."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, folder: Path) -> None:
        self.gpt = gpt
        self.tokenizer = tokenizer
        self.folder = folder

    @property
    def config(self) -> Config:
        """The LitGPT config."""
        return self.gpt.config

    def generate(self, prompt: str | Sequence[str] = "", **sampling: Unpack[Sampling]) -> str | list[str]:
        """The prompt and what the model writes after it; a list of them for several prompts, or with ``num_samples``.

        Ends at the end-of-text token, after ``max_new_tokens``, or where the model's context is full.

        Raises:
            UserError: sampling settings out of range, or a prompt longer than the model's context.
        """
        texts = sample_text(self.gpt, self.tokenizer, prompt, **sampling)
        return texts[0] if isinstance(prompt, str) and "num_samples" not in sampling else texts

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """What `generate` returns, in pieces as they are written; several samples one after the other."""
        yield prompt
        yield from (piece.text for piece in stream_pieces(self.gpt, self.tokenizer, prompt, **sampling))


def load(
    folder: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_seq_length: int | None = None,
) -> Model:
    """Loads a checkpoint for generating, after checking the files that it reads.

    Args:
        folder: the newest whole checkpoint under ``checkpoints/`` when None.
        device: as torch names it; "auto" is the GPU where there is one.
        precision: "auto" is bf16-true on a GPU that computes in it, else 32-true.
        max_seq_length: tokens of prompt and text together; as many as in training when None.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it was saved without a tokenizer; or the model has no
            room for that many tokens.
    """
    path = checkpoints.resolve(None if folder is None else Path(folder))
    tokenizer = checkpoints.load_tokenizer(path)
    where = checkpoints.choose_device(device)
    gpt = checkpoints.load_model(path, where, choose_dtype(precision, where), max_seq_length)
    return Model(gpt, tokenizer, path)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the weights: "auto" is bf16 on a CUDA GPU that computes in it, else fp32."""
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-true" if bf16 else "32-true"
    return _DTYPES[precision]
