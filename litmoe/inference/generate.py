"""Generate text with a model: several samples in one batch, with a KV cache.

>>> from litmoe import load
>>> model = load("checkpoints/final")
>>> print(model.generate("Once upon a time", max_new_tokens=50))
>>> for piece in model.stream("Once upon a time", temperature=0.5):
...     print(piece, end="", flush=True)

Shape suffixes: B rows, T time, V padded vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from litgpt import GPT, Config, Tokenizer
from torch import Tensor

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.tokenizers import text_ids
from litmoe.inference.decode import Decoder
from litmoe.inference.text_stream import StopSequences, TextStream

End = Literal["end_of_text", "max_new_tokens", "block_size"]
Precision = Literal["auto", "32-true", "bf16-true", "16-true"]

_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Piece(NamedTuple):
    """Some text of one sample. All pieces of sample 0 come before those of sample 1, in reading order."""

    sample: int
    text: str
    end: End | None  # why the sample ends with this piece; None if it continues
    tokens: int  # tokens of the sample so far, including those that ended it


class Sample(NamedTuple):
    """What a model wrote after a prompt."""

    text: str  # without the prompt and the end-of-text token
    end: End | None


class Sampling(TypedDict, total=False):
    """How to sample; `stream_pieces` has the defaults."""

    max_new_tokens: int
    num_samples: int
    seed: int
    temperature: float
    top_k: int | None
    top_p: float


# ------------------------------------------------------------------------------------------------------------ sampling


def restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Divide logits by the temperature and set those that must not be sampled to -inf, each row on its own.

    In the order of `litgpt.generate.base.sample`: keep the ``top_k`` largest, apply the temperature, then keep the
    fewest tokens with a total probability above ``top_p``.

    Args:
        logits: ``(B, V)``; the result has the same shape.
        temperature: above 0.
        top_k: number of tokens; None keeps all.
        top_p: probability; 1 keeps all.
    """
    if top_k is not None and top_k < logits.size(-1):
        largest, indices = torch.topk(logits, top_k)
        # By index: a threshold would keep more than top_k tokens if their logits are equal.
        logits = torch.full_like(logits, float("-inf")).scatter(-1, indices, largest)
    logits = logits / temperature
    if top_p < 1.0:
        # Ascending, so that the tokens to remove are the first ones, with a total of at most 1 - top_p.
        ascending, indices = torch.sort(logits)
        remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        # Always keep the most probable token.
        remove[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, indices, remove), float("-inf"))
    return logits


def sample_tokens(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Return the next token of each row: ``(B, V) -> (B,)``. With temperature or top_p 0, the most probable one.

    With one generator for each row, the result of a row equals that of `torch.multinomial` for this row alone.
    """
    # Dividing by a smaller temperature would make logits infinite.
    if temperature < 1e-30 or top_p == 0.0:
        return logits.argmax(dim=-1)
    # In fp32, because the probabilities of a large vocabulary lose too many digits in 16 bits.
    probabilities_BV = restrict(logits.float(), temperature, top_k, top_p).softmax(dim=-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities_BV, num_samples=1, generator=generator).squeeze(-1)
    # What torch.multinomial computes for one sample: the largest ratio of probability and exponential noise.
    noise_BV = torch.empty_like(probabilities_BV)
    for noise_V, row_generator in zip(noise_BV, generator, strict=True):
        # One draw per row, in the order in which a row alone would take them from its generator.
        noise_V.exponential_(generator=row_generator)
    return (probabilities_BV / noise_BV).argmax(dim=-1)


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
    """Continue each prompt ``num_samples`` times, all in one batch; yield the next token of each row, ``(B,)``.

    The rows of the first prompt come first. A prompt is computed once for all its samples. A row that has reached
    ``eos_id``, or the end of its context, repeats its last token. Generation ends when all rows have ended, or after
    ``max_new_tokens``.

    The model is not changed, also if the caller stops early, so it may be the one in training. Pass the plain
    `litgpt.GPT`, without the wrapper of `torch.compile` or Fabric.

    Args:
        gpt: model.
        prompt: token ids, ``(T,)`` with ``1 <= T <= gpt.max_seq_length``, on the device of the model; or several.
        num_samples: samples for each prompt.
        max_new_tokens: maximum number of tokens.
        temperature: see `restrict`.
        top_k: see `restrict`.
        top_p: see `restrict`.
        eos_id: token that ends a row.
        generator: on the device of the model. If None, the global random state is used. With one for each row, a row
            is sampled as it would be alone.

    Raises:
        UserError: a setting is out of range, a prompt is too long, or the output of the model is not finite.
    """
    check_sampling(num_samples, max_new_tokens, temperature, top_k, top_p)
    prompts = [prompt] if isinstance(prompt, Tensor) else prompt
    # Prompts of different lengths leave different room for new tokens.
    steps = [min(max_new_tokens, room_after(len(ids), gpt.max_seq_length)) for ids in prompts]
    # The last token of a row is not read, so it needs no place in the cache.
    cache_size = max(len(ids) + count - 1 for ids, count in zip(prompts, steps, strict=True))
    decoder = Decoder(gpt, prompts, num_samples, cache_size)
    logits_BV = decoder.logits
    check_finite(logits_BV)
    device = logits_BV.device
    last_step_B = torch.tensor(steps, device=device).repeat_interleave(num_samples)
    ended_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=device)
    tokens_B = None
    for step in range(1, max(steps) + 1):
        # Rows that have ended are computed too: to remove them from the batch would cost a copy of the caches.
        next_tokens_B = sample_tokens(logits_BV, temperature, top_k, top_p, generator)
        tokens_B = next_tokens_B if tokens_B is None else torch.where(ended_B, tokens_B, next_tokens_B)
        yield tokens_B
        # There is no use for the logits after the last token.
        if step == max(steps):
            return
        if eos_id is not None:
            ended_B |= tokens_B == eos_id
            if ended_B.all():
                return
        # No row reaches its limit before the smallest one, so the comparison is skipped until then.
        if step >= min(steps):
            ended_B |= last_step_B <= step
        logits_BV = decoder.step(tokens_B)


def room_after(length: int, context: int) -> int:
    """Return how many tokens can follow a prompt: one more than fit, because the last one is not read.

    Raises:
        UserError: the prompt does not fit.
    """
    if not 1 <= length <= context:
        raise UserError(
            f"the prompt has {length:,} tokens; expected 1 to {context:,}, the context of the model. Shorten it."
        )
    return context - length + 1


def check_sampling(
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 42,
) -> None:
    """Raise UserError with a list of the settings that are out of range; the arguments are those of `Sampling`."""
    check_seed(seed)
    checks = (
        (num_samples >= 1, f"num_samples is {num_samples}; expected 1 or more"),
        (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; expected 1 or more"),
        (
            0.0 <= temperature <= 1e6,  # far above, -inf divided by the temperature is NaN
            f"temperature is {temperature}; expected 0 (always the most probable token) to 1,000,000",
        ),
        (top_k is None or top_k >= 1, f"top_k is {top_k}; expected 1 or more, or null for all tokens"),
        (0.0 <= top_p <= 1.0, f"top_p is {top_p}; expected 0 to 1, where 1 means all tokens"),
    )
    problems = [problem for is_fine, problem in checks if not is_fine]
    if problems:
        raise UserError("; ".join(problems) + ".")


def check_finite(values: Tensor) -> None:
    """Raise UserError if the output of the model contains NaN or infinity."""
    if not values.isfinite().all():
        raise UserError(
            "the output of the model is NaN or infinite, because its training diverged. Use an earlier checkpoint."
        )


def check_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        UserError: torch does not accept it, because it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise UserError("the seed is too large; expected an integer of at most 64 bits: -2**63 to 2**64 - 1.")
    return seed


# ---------------------------------------------------------------------------------------------------------------- text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """Return the token ids of a prompt, ``(T,)``, starting as a document of the training text does.

    An empty prompt is the begin-of-text token, or without one the end-of-text token, after which documents start.

    Raises:
        UserError: the prompt is empty and the tokenizer has neither token.
    """
    ids = text_ids(tokenizer, prompt)
    if not ids:
        if tokenizer.eos_id is None:
            raise UserError("the prompt is empty, and the tokenizer has no end-of-text token to start from.")
        ids = [tokenizer.eos_id]
    return torch.tensor(ids)


class _SampleState:
    """One sample while it grows: from tokens to the text that can be handed out."""

    def __init__(self, number: int, stop: Sequence[Sequence[int]], stream: TextStream, room: int, limit: int) -> None:
        self.number = number
        self.stops = StopSequences(stop)
        self.stream = stream
        self.max_tokens = min(room, limit)
        self.end_at_max: End = "max_new_tokens" if limit <= room else "block_size"
        self.text = ""  # not handed out yet
        self.tokens = 0
        self.end: End | None = None

    def push(self, token: int) -> None:
        """Add a token, unless the sample has ended."""
        if self.end is not None:
            return
        self.tokens += 1
        # A token may be part of a stop sequence. Then it waits until that is certain.
        certain, stopped = self.stops.push(token)
        if stopped:
            self.end = "end_of_text"
        elif self.tokens == self.max_tokens:
            self.end = self.end_at_max
            # No stop sequence can be completed any more, so the tokens that were held back are text.
            certain = certain + self.stops.held
        self.text += "".join(self.stream.push(token) for token in certain)
        if self.end is not None:
            self.text += self.stream.flush()

    def take(self) -> Piece:
        """Hand out the text so far."""
        piece = Piece(self.number, self.text, self.end, self.tokens)
        self.text = ""
        return piece


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
    """Yield what the model writes after a prompt: sample 0 as it grows, then the others from the same batch.

    All samples of the first prompt come first. The global random state is neither used nor changed. Other arguments and
    errors as `generate_tokens`.

    Args:
        gpt: model.
        tokenizer: of the model.
        prompt: text, token ids, or several texts.
        seed: sample i equals the one that seed ``seed + i`` gives alone. Or a generator on the device of the model.
        stop: token sequences that end a sample as the end-of-text token does; they are not part of the text.
        join: decode samples as the continuation of their prompt. False: as a text of its own, such as an answer.
    """
    device = gpt.transformer.wte.weight.device
    prompts = [_prompt_ids(tokenizer, one).to(device) for one in _as_list(prompt)]
    if tokenizer.eos_id is not None:
        stop = [[tokenizer.eos_id], *stop]
    samples: list[_SampleState] = []
    for ids in prompts:
        room = room_after(len(ids), gpt.max_seq_length)
        context = ids.tolist() if join else []
        for _ in range(num_samples):
            stream = TextStream(tokenizer, context)
            samples.append(_SampleState(len(samples), stop, stream, room, max_new_tokens))
    generator = seed if isinstance(seed, torch.Generator) else _generators(seed, len(samples), device)
    # Without eos_id: the end-of-text token is one of the stop sequences, and _in_turn stops when all samples have
    # ended.
    steps = generate_tokens(
        gpt,
        prompts,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    # If the caller stops early, the caches are freed at once.
    with closing(steps):
        yield from _in_turn(samples, steps)


def _in_turn(samples: list[_SampleState], steps: Iterator[Tensor]) -> Iterator[Piece]:
    """Give each sample its next token at each step, and yield the texts of the samples one after the other."""
    current = 0
    for tokens_B in steps:
        # tolist waits for the device once for all samples.
        for sample, token in zip(samples, tokens_B.tolist(), strict=True):
            sample.push(token)
        # Samples after the current one may have ended too: they follow at once.
        while samples[current].text or samples[current].end is not None:
            piece = samples[current].take()
            yield piece
            if piece.end is None:
                break
            current += 1
            if current == len(samples):
                return


def _as_list(prompt: str | Sequence[int] | Sequence[str]) -> Sequence[str | Sequence[int]]:
    # An empty list is a prompt without tokens, which room_after refuses.
    is_several = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], str)
    return prompt if is_several else [prompt]  # type: ignore[list-item, return-value]


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Tensor:
    return encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else torch.tensor(prompt)


def _generators(seed: int, rows: int, device: torch.device) -> list[torch.Generator]:
    """Return one generator for each row, so that a sample does not depend on the others."""
    # Check before the seeds are added up, so that the message names the seed of the user.
    check_seed(seed)
    return [torch.Generator(device).manual_seed(check_seed(seed + row)) for row in range(rows)]


def draw_samples(
    gpt: GPT, tokenizer: Tokenizer, prompt: str | Sequence[str], **sampling: Unpack[Sampling]
) -> list[Sample]:
    """Return ``num_samples`` continuations of each prompt, all samples of the first prompt first.

    Neither the global random state nor the model is changed.
    """
    # Pieces come in the order of the samples, and a dictionary keeps it.
    texts: dict[int, str] = {}
    ends: dict[int, End | None] = {}
    for piece in stream_pieces(gpt, tokenizer, prompt, **sampling):
        texts[piece.sample] = texts.get(piece.sample, "") + piece.text
        ends[piece.sample] = piece.end
    return [Sample(text, ends[sample]) for sample, text in texts.items()]


def sample_text(gpt: GPT, tokenizer: Tokenizer, prompt: str | Sequence[str], **sampling: Unpack[Sampling]) -> list[str]:
    """Return the samples of `draw_samples` with their prompts before them."""
    samples = draw_samples(gpt, tokenizer, prompt, **sampling)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    samples_per_prompt = len(samples) // len(prompts)
    return [prompts[index // samples_per_prompt] + sample.text for index, sample in enumerate(samples)]


# --------------------------------------------------------------------------------------------------------------- model


class Model:
    """A trained model with its tokenizer, from `load`."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, folder: Path) -> None:
        self.gpt = gpt
        self.tokenizer = tokenizer
        self.folder = folder

    @property
    def config(self) -> Config:
        """Return the LitGPT config."""
        return self.gpt.config

    def generate(self, prompt: str | Sequence[str] = "", **sampling: Unpack[Sampling]) -> str | list[str]:
        """Return the prompt with its continuation; a list of them for several prompts, or with ``num_samples``.

        A text ends at the end-of-text token, after ``max_new_tokens``, or at the end of the context.

        Raises:
            UserError: a setting is out of range, or a prompt is longer than the context.
        """
        texts = sample_text(self.gpt, self.tokenizer, prompt, **sampling)
        return texts[0] if isinstance(prompt, str) and "num_samples" not in sampling else texts

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Yield what `generate` returns in pieces, several samples one after the other."""
        yield prompt
        yield from (piece.text for piece in stream_pieces(self.gpt, self.tokenizer, prompt, **sampling))


def load(
    folder: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_seq_length: int | None = None,
    router: str | None = None,
) -> Model:
    """Load a checkpoint for generation; the files that are read are verified.

    Args:
        folder: checkpoint folder; the newest complete one under ``checkpoints/`` if None.
        device: a torch device; "auto" takes a GPU if there is one.
        precision: "auto" is bf16-true on a GPU with bf16 support, else 32-true.
        max_seq_length: tokens of prompt and text together; as many as in training if None.
        router: see `checkpoints.load_model`.

    Raises:
        UserError: the checkpoint is missing, damaged, has no tokenizer or another router, or the context is too long
            for the model.
    """
    path = checkpoints.resolve(None if folder is None else Path(folder))
    # The tokenizer first: it is small, and a missing one is a common mistake.
    tokenizer = checkpoints.load_tokenizer(path)
    torch_device = checkpoints.choose_device(device)
    gpt = checkpoints.load_model(path, torch_device, choose_dtype(precision, torch_device), max_seq_length, router)
    return Model(gpt, tokenizer, path)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights; "auto" is bf16 on a GPU with bf16 support, else fp32."""
    if precision == "auto":
        precision = "bf16-true" if supports_bf16(device) else "32-true"
    return _DTYPES[precision]


def supports_bf16(device: torch.device) -> bool:
    """Return whether the device is a CUDA GPU that computes in bf16 without emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
