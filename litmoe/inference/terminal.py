"""The chat in a terminal: answers to stdout, all else to stderr. Without a terminal, each line is a question."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from litmoe.cli import UserError, harmless, nearest
from litmoe.inference.chat import NOT_TUNED, Chat, describe
from litmoe.inference.generate import Sampling, check_sampling, check_seed

HINT = "/help lists the commands. Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves."


class Terminal:
    """Reads questions and commands, writes answers. Each ``do_`` method is a command, its docstring the help text."""

    def __init__(self, chat: Chat, sampling: Sampling) -> None:
        self.chat = chat
        self.sampling = sampling
        self.interactive = sys.stdin.isatty()
        self.console = Console(stderr=True, highlight=False)
        self.commands = ["/" + name[3:] for name in dir(self) if name.startswith("do_")]

    def run(self) -> None:
        """Talks until the input ends.

        Raises:
            UserError: a question can't be answered or a command not be done, and nobody sits there to try again.
        """
        self.say(describe(self.chat.model))
        if not self.chat.is_tuned:
            self.say(NOT_TUNED)
        if self.interactive:
            self.say(HINT)
        for line in self._typed() if self.interactive else sys.stdin:
            if not line.strip():
                continue
            try:
                if any(0xDC80 <= ord(character) < 0xDD00 for character in line):  # what Python makes of such bytes
                    raise UserError(
                        f"the line {line.strip()!r} holds bytes that are not UTF-8; save the text as UTF-8."
                    )
                if line.startswith("/"):
                    self.command(line)
                else:
                    self.answer(line.rstrip("\r\n"))
            except UserError as error:
                if not self.interactive:
                    raise
                self.say(str(error), style="red")
            except EOFError:  # /quit
                return

    def say(self, text: str, style: str = "dim") -> None:
        """A line about the chat."""
        self.console.print(harmless(text), style=style, markup=False, soft_wrap=True)

    def answer(self, question: str) -> None:
        """Streams the answer to stdout. Ctrl-C stops it; what was written stays in the conversation."""
        reply = self.chat.ask(question, **self.sampling)
        try:
            with closing(reply.__iter__()) as pieces:
                for text in pieces:
                    print(harmless(text) if sys.stdout.isatty() else text, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        print(flush=True)
        self.say(reply.summary() + ("\n" if self.interactive else ""))

    def command(self, line: str) -> None:
        """Does ``/name argument``.

        Raises:
            UserError: there is no such command, or it can't be done.
            EOFError: it was /quit.
        """
        name, _, argument = line.strip().partition(" ")
        if name not in self.commands:
            guess = next((known for known in self.commands if known.startswith(name)), nearest(name, self.commands))
            raise UserError(
                f"there is no {name}; " + (f"did you mean {guess}?" if guess else "/help lists what there is.")
            )
        getattr(self, "do_" + name[1:])(argument.strip())

    # -------------------------------------------------------------------------------------------------------- commands

    def do_help(self, _: str) -> None:
        """list the commands"""
        for name in self.commands:
            usage, _, text = getattr(self, "do_" + name[1:]).__doc__.rpartition(": ")
            self.say(f"  {name + ' ' + usage:<24}{text}")

    def do_reset(self, _: str) -> None:
        """forget what was said"""
        self.chat.messages.clear()
        self.say("Forgotten.")

    def do_undo(self, _: str) -> None:
        """take the last question and its answer back"""
        question = self.chat.undo()
        self.say("There is nothing to take back." if question is None else f"Taken back: {question}")

    def do_retry(self, _: str) -> None:
        """answer the last question again"""
        pair = self.chat.messages[-2:]
        question = self.chat.undo()
        if question is None:
            raise UserError("there is nothing to answer again.")
        before = len(self.chat.messages)
        try:
            self.answer(question)
        finally:
            if len(self.chat.messages) == before:  # nothing was written
                self.chat.messages += pair

    def do_temperature(self, value: str) -> None:
        """X: 0 takes the most probable token, 1 samples as the model has it"""
        self._set("temperature", value)

    def do_top_k(self, value: str) -> None:
        """N: sample among so many tokens; `all` for all"""
        self._set("top_k", value)

    def do_top_p(self, value: str) -> None:
        """X: sample among the fewest tokens of more than this probability; 1 for all"""
        self._set("top_p", value)

    def do_max_new_tokens(self, value: str) -> None:
        """N: how long an answer may be"""
        self._set("max_new_tokens", value)

    def do_seed(self, value: str) -> None:
        """N: the same answers to the same questions from here on"""
        try:
            seed = int(value)
        except ValueError:
            raise UserError(f"/seed takes a whole number, not {value!r}.") from None
        self.chat.generator.manual_seed(check_seed(seed))

    def do_system(self, text: str) -> None:
        """TEXT: what the model is told before the first question; nothing to drop it"""
        self.chat.system = text
        self.say(f"System message: {text}" if text else "No system message.")

    def do_save(self, argument: str) -> None:
        """FILE: the conversation as .jsonl or Markdown; `/save FILE overwrite` replaces a file"""
        name = argument.removesuffix(" overwrite")
        if not name:
            raise UserError('say where to: /save chat.md, or chat.jsonl for {"messages": [...]}.')
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:  # ~ of somebody who is not known
            raise UserError(f"cannot write {name}: {error}") from None
        self.chat.save(path, overwrite=name != argument)
        self.say(f"Saved {name}")

    def do_quit(self, _: str) -> None:
        """leave; Ctrl-D too"""
        raise EOFError

    def _set(self, name: str, value: str) -> None:
        """Sets one of the sampling settings, or shows it where no value is given."""
        if value:
            convert = float if name in ("temperature", "top_p") else int
            try:
                changed = None if name == "top_k" and value in ("all", "null") else convert(value)
            except ValueError:
                raise UserError(f"/{name} takes a number, not {value!r}.") from None
            sampling: Sampling = {**self.sampling, name: changed}  # type: ignore[misc]
            check_sampling(1, sampling["max_new_tokens"], sampling["temperature"], sampling["top_k"], sampling["top_p"])
            self.sampling = sampling
        self.say(f"{name} {self.sampling[name]}")  # type: ignore[literal-required]

    # ------------------------------------------------------------------------------------------------------------ input

    def _typed(self) -> Iterator[str]:
        """What is typed, with history, several lines by Alt-Enter, and completion of commands."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        session: PromptSession[str] = PromptSession(
            message=[("bold", "> ")],
            multiline=True,
            key_bindings=keys,
            completer=WordCompleter(self.commands, sentence=True),
            output=create_output(always_prefer_tty=True),  # stderr where stdout goes into a file
        )
        while True:
            try:
                yield session.prompt()
            except KeyboardInterrupt:
                self.say(HINT)
            except EOFError:
                return
