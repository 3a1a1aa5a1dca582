"""A conversation with a trained model, for the terminal and the web page.

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
    "This is a base model: it continues your text and does not remember earlier messages."
    " To get a model that answers, finetune it: `uv run python finetune.py`."
)
NO_SYSTEM_MESSAGE = "this is a base model, which does not use a system message. Finetune it first."


class Chat:
    """A model, its prompt style and the messages so far.

    A base model reads only the newest text, as it was typed, and continues it.
    """

    def __init__(self, model: Model, messages: Sequence[Message] = (), *, seed: int | None = None) -> None:
        """Start or continue a conversation.

        Args:
            model: from `litmoe.load`.
            messages: earlier messages, questions and answers in turn, without a system message.
            seed: the same seed gives the same answers to the same questions on the same machine. If None, the answers
                are different each time.
        """
        self.model = model
        self.messages = list(messages)
        self.style = load_prompt_style(model.folder)
        self.is_tuned = is_tuned(self.style)
        self._system = ""
        # A generator of this conversation: the answers do not depend on others, nor on the global random state.
        self.generator = torch.Generator(model.gpt.lm_head.weight.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(check_seed(seed))

    @property
    def system(self) -> str:
        """Return the system message, which the model reads before the first question; empty for none."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        if text and not self.is_tuned:
            raise UserError(NO_SYSTEM_MESSAGE)
        self._system = encodable(text)

    def ask(self, question: str, **sampling: Unpack[Sampling]) -> "Reply":
        """Return the answer, which is generated during iteration.

        If history and question are longer than the context, the oldest turns are left out (`Reply.forgotten`).

        Raises:
            UserError: the question is empty or too long, or a sampling setting is out of range.
        """
        # Check the settings now. The generator of the answer would raise only when the iteration starts.
        check_sampling(**sampling)
        question = encodable(question)
        if not question.strip():
            raise UserError("the question is empty.")
        prompt, forgotten = self._encode(question, sampling.get("max_new_tokens", 256))
        return Reply(self, question, prompt, forgotten, sampling)

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, or None if there is none."""
        # Questions and answers take turns, so the last turn is the last two messages.
        question = self.messages[-2]["content"] if self.messages else None
        del self.messages[-2:]
        return question

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Save the conversation: .json and .jsonl files get a line of ``{"messages": [...]}``, others Markdown.

        Raises:
            UserError: the conversation is empty, the file exists, or it can't be written.
        """
        if not self.messages:
            raise UserError("there is nothing to save: the conversation is empty.")
        messages = [*self._system_messages(), *self.messages]
        if path.suffix.lower() in (".json", ".jsonl"):
            # The shape of rows that prepare_data.py --instruct reads.
            text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        else:
            text = f"# A chat with {self.model.folder.as_posix()}\n"
            text += "".join(f"\n**{message['role'].capitalize()}**\n\n{message['content']}\n" for message in messages)
        try:
            # Mode "x" fails if the file exists, also if it was created a moment ago.
            with path.open("w" if overwrite else "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{path} exists; use another name, or overwrite it.") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
            raise UserError(f"cannot write {str(path)!r}: {error}.") from None

    def _system_messages(self) -> list[Message]:
        return [Message(role="system", content=self.system)] if self.system else []

    def _encode(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the prompt with as many of the newest turns as leave room for an answer, and how many are left out."""
        context = self.model.gpt.max_seq_length
        # At most a quarter of the context is reserved, so that a long max_new_tokens does not remove the history.
        reserved = min(max_new_tokens, max(1, context // 4))
        # The last token of an answer is not read.
        max_prompt = context - reserved + 1
        if self.is_tuned:
            messages = [*self.messages, Message(role="user", content=question)]
            kept, prompt = encode_newest(
                self._system_messages(), messages, self.model.tokenizer, self.style, max_prompt
            )
            forgotten = len(self.messages) // 2 - kept
        else:
            prompt, forgotten = text_ids(self.model.tokenizer, question), 0
        if len(prompt) > max_prompt:
            parts = "question and system message have" if self.system else "the question has"
            raise UserError(
                f"{parts} {len(prompt):,} tokens; expected at most {max_prompt:,}: the context of the model is"
                f" {context:,}, and {reserved:,} are reserved for the answer. Shorten the text."
            )
        return prompt, forgotten


class Reply:
    """An answer: iterate over it once to get its text in pieces. Close or drop the iterator to stop early.

    The text so far becomes part of the conversation. If there is none, the question is not added either.
    """

    def __init__(self, chat: Chat, question: str, prompt: list[int], forgotten: int, sampling: Sampling) -> None:
        self.chat, self.question, self.prompt, self.sampling = chat, question, prompt, sampling
        # Number of old turns that the model does not read, because they do not fit the context
        self.forgotten = forgotten
        self.text = ""
        self.end: End | None = None  # why it ended; None while it is generated, or if it was stopped
        self.tokens = 0
        self.seconds = 0.0  # time of the model, without the time between two pieces

    def __iter__(self) -> Generator[str, None, None]:
        model, chat = self.chat.model, self.chat
        sampling: Sampling = {**self.sampling, "num_samples": 1}
        pieces = stream_pieces(
            model.gpt,
            model.tokenizer,
            self.prompt,
            stop=stop_sequences(chat.style, model.tokenizer),
            seed=chat.generator,
            # Answers are tokenized on their own in training.
            join=not chat.is_tuned,
            **sampling,  # type: ignore[misc]
        )
        try:
            with closing(pieces):
                # Not a for loop, so that only the time of the model is measured, and not that of the caller.
                while self.end is None:
                    start = time.perf_counter()
                    piece = next(pieces)
                    self.seconds += time.perf_counter() - start
                    self.text += piece.text
                    self.tokens, self.end = piece.tokens, piece.end
                    if piece.text:
                        yield piece.text
        finally:
            # Also if the iterator was closed early: the user has seen the text, so it is part of the conversation.
            if self.text or self.end is not None:
                chat.messages.append(Message(role="user", content=self.question))
                chat.messages.append(Message(role="assistant", content=self.text))

    def summary(self) -> str:
        """Return length, speed and how the answer ended, in one line."""
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        parts = [f"{tokens}, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"]
        if self.end is None:
            parts.append("stopped")
        elif self.end == "max_new_tokens":
            parts.append("cut at max_new_tokens")
        elif self.end == "block_size":
            parts.append(f"cut: the context of {self.chat.model.gpt.max_seq_length:,} tokens is full")
        if self.forgotten:
            turns = "turn" if self.forgotten == 1 else f"{self.forgotten:,} turns"
            parts.append(f"the oldest {turns} left out, because the context is full")
        return "; ".join(parts)


def describe(model: Model) -> str:
    """Return name, size and training step of a model in one line."""
    gpt, config = model.gpt, model.config
    # The config does not say whether the embeddings are tied.
    is_tied = torch.equal(gpt.transformer.wte.weight, gpt.lm_head.weight)
    counts = count_parameters(config, tie_embeddings=is_tied)
    size = f"{counts.total / 1e6:,.1f} M parameters"
    if counts.active < counts.total:
        size += f", {counts.active / 1e6:,.1f} M active"
    return f"{config.name}: {size}, step {checkpoints.read_metadata(model.folder).step:,}"


def encodable(text: str) -> str:
    """Replace half surrogate pairs, which terminals and JSON may contain and UTF-8 can't encode, by ``?``."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
