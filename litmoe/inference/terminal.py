"""The chat in a terminal: answers go to stdout, messages to stderr. In a pipe, each line is a question."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from litmoe.cli import UserError, nearest, strip_control_chars
from litmoe.data.files import undecoded
from litmoe.inference.chat import NOT_TUNED, Chat, describe
from litmoe.inference.generate import Sampling, check_sampling, check_seed

HINT = "/help lists the commands. Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D ends the chat."


class Terminal:
    """Read questions and commands, and write answers.

    Each ``do_`` method is a command; its docstring is the help text, "ARGUMENTS: what it does".
    """

    def __init__(self, chat: Chat, sampling: Sampling) -> None:
        self.chat = chat
        self.sampling = sampling
        self.interactive = sys.stdin.isatty()
        self.console = Console(stderr=True, highlight=False)
        self.commands = ["/" + name[3:] for name in dir(self) if name.startswith("do_")]

    def run(self) -> None:
        """Chat until the input ends.

        Raises:
            UserError: a question or command failed, and the input is a pipe. In a terminal the user can try again.
        """
        self.say(describe(self.chat.model))
        if not self.chat.is_tuned:
            self.say(NOT_TUNED)
        # A pipe is read line by line: prompt_toolkit would need a terminal.
        for line in self._typed_lines() if self.interactive else sys.stdin:
            try:
                self._handle(line)
            except UserError as error:
                if not self.interactive:
                    raise
                self.say(str(error), style="red")
            except EOFError:  # /quit
                return

    def _handle(self, line: str) -> None:
        if not line.strip():
            return
        if undecoded(line):
            raise UserError(f"the line {line.strip()!r} is not UTF-8; save the text as UTF-8.")
        if line.startswith("/"):
            self.command(line)
        else:
            self.answer(line.rstrip("\r\n"))

    def say(self, text: str, style: str = "dim") -> None:
        """Print a message about the chat to stderr."""
        self.console.print(strip_control_chars(text), style=style, markup=False, soft_wrap=True)

    def answer(self, question: str) -> None:
        """Stream the answer to stdout. Ctrl-C stops it; the text so far stays in the conversation."""
        reply = self.chat.ask(question, **self.sampling)
        # A model may write control characters: a terminal would execute them, a file gets them unchanged.
        clean = strip_control_chars if sys.stdout.isatty() else str
        try:
            # closing() stops the model at Ctrl-C and adds the text so far to the conversation.
            with closing(reply.__iter__()) as pieces:
                for text in pieces:
                    print(clean(text), end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        print(flush=True)
        self.say(reply.summary() + ("\n" if self.interactive else ""))

    def command(self, line: str) -> None:
        """Run ``/name argument``.

        Raises:
            UserError: the command does not exist, or failed.
            EOFError: it was /quit.
        """
        name, _, argument = line.strip().partition(" ")
        if name not in self.commands:
            # The beginning of a command is a better guess than the most similar name.
            starting = [command for command in self.commands if command.startswith(name)]
            guess = starting[0] if starting else nearest(name, self.commands)
            hint = f"did you mean {guess}?" if guess else "/help lists the commands."
            raise UserError(f"there is no command {name}; {hint}")
        getattr(self, "do_" + name[1:])(argument.strip())

    # -------------------------------------------------------------------------------------------------------- commands

    def do_help(self, _: str) -> None:
        """list the commands"""
        for name in self.commands:
            usage, _, text = getattr(self, "do_" + name[1:]).__doc__.rpartition(": ")
            self.say(f"  {name + ' ' + usage:<24}{text}")

    def do_reset(self, _: str) -> None:
        """start a new conversation"""
        self.chat.messages.clear()
        self.say("Started a new conversation.")

    def do_undo(self, _: str) -> None:
        """remove the last question and its answer"""
        question = self.chat.undo()
        self.say("There is nothing to remove." if question is None else f"Removed: {question}")

    def do_retry(self, _: str) -> None:
        """answer the last question again"""
        messages = list(self.chat.messages)
        question = self.chat.undo()
        if question is None:
            raise UserError("there is no question to answer again.")
        n_before = len(self.chat.messages)
        try:
            self.answer(question)
        finally:
            # The new answer may fail, for example because the system message has become too long.
            if len(self.chat.messages) == n_before:
                # No new answer: keep the old one.
                self.chat.messages = messages

    def do_temperature(self, value: str) -> None:
        """X: 0 always takes the most probable token, 1 samples from the probabilities of the model"""
        self._set("temperature", value)

    def do_top_k(self, value: str) -> None:
        """N: sample only from the N most probable tokens; `all` for all"""
        self._set("top_k", value)

    def do_top_p(self, value: str) -> None:
        """X: sample only from the fewest tokens with a total probability above X; 1 for all"""
        self._set("top_p", value)

    def do_max_new_tokens(self, value: str) -> None:
        """N: maximum number of tokens in an answer"""
        self._set("max_new_tokens", value)

    def do_seed(self, value: str) -> None:
        """N: from now on, give the same answers to the same questions"""
        try:
            seed = int(value)
        except ValueError:
            raise UserError(f"/seed needs a whole number, not {value!r}.") from None
        self.chat.generator.manual_seed(check_seed(seed))

    def do_system(self, text: str) -> None:
        """TEXT: set the system message, which the model reads before the first question; without TEXT, remove it"""
        self.chat.system = text
        self.say(f"System message: {text}" if text else "No system message.")

    def do_save(self, argument: str) -> None:
        """FILE: save the conversation as .jsonl or Markdown; `/save FILE overwrite` replaces a file"""
        name = argument.removesuffix(" overwrite")
        if not name:
            raise UserError('/save needs a file: /save chat.md, or /save chat.jsonl for {"messages": [...]}.')
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:  # ~ of an unknown user
            raise UserError(f"cannot write {name}: {error}") from None
        self.chat.save(path, overwrite=name != argument)
        self.say(f"Saved {name}")

    def do_quit(self, _: str) -> None:
        """end the chat; Ctrl-D too"""
        raise EOFError

    def _set(self, name: str, value: str) -> None:
        """Change a sampling setting, or show it if no value is given."""
        if value:
            sampling: Sampling = {**self.sampling, name: _parse_setting(name, value)}  # type: ignore[misc]
            check_sampling(**sampling)
            self.sampling = sampling
        self.say(f"{name} {self.sampling[name]}")  # type: ignore[literal-required]

    # ----------------------------------------------------------------------------------------------------------- input

    def _typed_lines(self) -> Iterator[str]:
        """Yield what the user types, with history, Alt-Enter for several lines, and completion of commands."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        self.say(HINT)
        keys = KeyBindings()

        # With multiline=True, Enter alone would start a new line instead of sending the question.
        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        # Terminals send Alt-Enter as Escape and Enter.
        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        session: PromptSession[str] = PromptSession(
            message=[("bold", "> ")],
            multiline=True,
            key_bindings=keys,
            completer=WordCompleter(self.commands, sentence=True),
            # To stderr if stdout is redirected to a file.
            output=create_output(always_prefer_tty=True),
        )
        while True:
            try:
                yield session.prompt()
            except KeyboardInterrupt:
                self.say(HINT)
            except EOFError:
                return


def _parse_setting(name: str, value: str) -> float | int | None:
    if name == "top_k" and value in ("all", "null"):
        return None
    try:
        return float(value) if name in ("temperature", "top_p") else int(value)
    except ValueError:
        raise UserError(f"/{name} needs a number, not {value!r}.") from None
