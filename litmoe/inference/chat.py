"""A conversation with a trained model; the terminal and the page in the browser both talk through it.

>>> from litmoe.inference.chat import Chat
>>> from litmoe import load
>>> chat = Chat(load("checkpoints/final"))
>>> for text in chat.ask("Write a story about a cat.", temperature=0.5):
...     print(text, end="", flush=True)
"""

import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

import torch

from litmoe import checkpoints
from litmoe.cli import UserError
from litmoe.data.conversations import Message, encode_newest, is_tuned, load_prompt_style, stop_sequences
from litmoe.data.tokenizers import text_ids
from litmoe.flops import count_parameters
from litmoe.inference.generate import End, Model, Sampling, check_sampling, check_seed, stream_pieces

NOT_TUNED = (
    "This model was not tuned to answer: it goes on with what you write, and remembers nothing of it."
    " `uv run python finetune.py` tunes it."
)


class Chat:
    """A model, its prompt style and what was said.

    A model that was not tuned to answer reads only the newest text, as it was typed, and goes on with it: a history
    would be a text of several beginnings to it.
    """

    def __init__(self, model: Model, messages: Sequence[Message] = (), *, seed: int | None = None) -> None:
        """Takes up a conversation.

        Args:
            messages: what was said before, questions and answers in turn, without a system message.
            seed: the same one gives the same answers to the same questions on the same machine; without one they
                differ each time.
        """
        self.model = model
        self.messages = list(messages)
        self.style = load_prompt_style(model.folder)
        self.is_tuned = is_tuned(self.style)
        self._system = ""
        self.generator = torch.Generator(model.gpt.lm_head.weight.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(check_seed(seed))

    @property
    def system(self) -> str:
        """What the model is told before the first question; empty for nothing."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        if text and not self.is_tuned:
            raise UserError("this model was not tuned to answer, so no system message can guide it; tune it first.")
        self._system = _clean(text)

    def ask(self, question: str, **sampling: Unpack[Sampling]) -> "Reply":
        """The answer to ``question``, written while one iterates over it.

        Where history and question outgrow the context, the oldest turns are left out (`Reply.forgotten`).

        Raises:
            UserError: the question alone is too long or empty, or sampling settings are out of range.
        """
        limit = sampling.get("max_new_tokens", 256)
        check_sampling(1, limit, sampling.get("temperature", 0.8), sampling.get("top_k"), sampling.get("top_p", 1.0))
        question = _clean(question)
        if not question.strip():
            raise UserError("there is nothing to answer: the question is empty.")
        prompt, forgotten = self._fit(question, limit)
        return Reply(self, question, prompt, forgotten, sampling)

    def undo(self) -> str | None:
        """Takes the newest question and its answer back; the question, or None where there is none."""
        question = self.messages[-2]["content"] if self.messages else None
        del self.messages[-2:]
        return question

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Writes the conversation: as a line of ``{"messages": [...]}`` into .json and .jsonl, else as Markdown.

        Raises:
            UserError: nothing was said, the file is there already, or it can't be written.
        """
        if not self.messages:
            raise UserError("there is nothing to save yet.")
        messages = self._with_system(self.messages)
        if path.suffix.lower() in (".json", ".jsonl"):
            text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        else:
            text = f"# A chat with {self.model.folder.as_posix()}\n"
            text += "".join(f"\n**{message['role'].capitalize()}**\n\n{message['content']}\n" for message in messages)
        try:
            with path.open("w" if overwrite else "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{path} is there already; name another file, or overwrite it.") from None
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot write {str(path)!r}: {reason}.") from None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message(role="system", content=self.system)] if self.system else []), *messages]

    def _fit(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """The prompt with as many of the newest turns as leave room for an answer, and how many were left out."""
        context = self.model.gpt.max_seq_length
        room = min(max_new_tokens, max(1, context // 4))
        longest = context - room + 1  # the last token of an answer is not read
        said = self.messages if self.is_tuned else []
        if self.is_tuned:
            messages = [*said, Message(role="user", content=question)]
            kept, prompt = encode_newest(self._with_system([]), messages, self.model.tokenizer, self.style, longest)
        else:  # as generate.py, special tokens among it
            kept, prompt = 0, text_ids(self.model.tokenizer, question)
        if len(prompt) > longest:
            beside = " and the system message" if self.system else ""
            raise UserError(
                f"the question{beside} has {len(prompt):,} tokens; expected at most {longest:,}: the model's context"
                f" is {context:,}, of which {room:,} are kept for the answer. Shorten it."
            )
        return prompt, len(said) // 2 - kept


class Reply:
    """An answer: iterate over it once for its text, piece by piece. Stop early by closing or dropping the iterator.

    What was written by then stands in the conversation; where that is nothing, so does the question not.
    """

    def __init__(self, chat: Chat, question: str, prompt: list[int], forgotten: int, sampling: Sampling) -> None:
        self.chat, self.question, self.prompt, self.sampling = chat, question, prompt, sampling
        self.forgotten = forgotten
        """How many of the oldest turns the model does not read: they no longer fit its context."""
        self.text = ""
        self.end: End | None = None
        """Why it ended; None while it goes on, and where it was stopped."""
        self.tokens = 0
        self.seconds = 0.0
        """Time that the model took; what happens between two pieces does not count."""

    def __iter__(self) -> Generator[str, None, None]:
        model, chat = self.chat.model, self.chat
        stop = stop_sequences(chat.style, model.tokenizer)
        sampling: Sampling = {**self.sampling, "num_samples": 1}
        pieces = stream_pieces(
            model.gpt,
            model.tokenizer,
            self.prompt,
            stop=stop,
            seed=chat.generator,
            join=not chat.is_tuned,  # an answer was encoded by itself in training
            **sampling,  # type: ignore[misc]
        )
        try:
            with closing(pieces):
                while self.end is None:
                    start = time.perf_counter()
                    piece = next(pieces)
                    self.seconds += time.perf_counter() - start
                    self.text += piece.text
                    self.tokens, self.end = piece.tokens, piece.end
                    if piece.text:
                        yield piece.text
        finally:
            if self.text or self.end is not None:
                chat.messages.append(Message(role="user", content=self.question))
                chat.messages.append(Message(role="assistant", content=self.text))

    def summary(self) -> str:
        """Length, speed and what a reader should know of how it ended, in one line."""
        parts = [
            f"{self.tokens:,} token{'s' * (self.tokens != 1)}, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        ]
        if self.end is None:
            parts.append("stopped")
        elif self.end == "max_new_tokens":
            parts.append("cut at max_new_tokens")
        elif self.end == "block_size":
            parts.append(f"cut: the context of {self.chat.model.gpt.max_seq_length:,} tokens is full")
        if self.forgotten:
            one = self.forgotten == 1
            turns = "the oldest turn was" if one else f"the {self.forgotten:,} oldest turns were"
            parts.append(f"{turns} left out: {'it' if one else 'they'} no longer fit{'s' * one} the context")
        return "; ".join(parts)


def describe(model: Model) -> str:
    """A model's name, its size and how long it was trained, in one line."""
    gpt, config = model.gpt, model.config
    embedding, output = gpt.transformer.wte.weight, gpt.lm_head.weight
    counts = count_parameters(config, tie_embeddings=torch.equal(embedding, output))
    size = f"{counts.total / 1e6:,.1f} M parameters"
    if counts.active < counts.total:
        size += f", {counts.active / 1e6:,.1f} M active"
    return f"{config.name}: {size}, step {checkpoints.read_mark(model.folder).step:,}"


def _clean(text: str) -> str:
    """Text that can be encoded: a lone half of a surrogate pair, as terminals and JSON let through, becomes ``?``."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
