"""Conversations: prompts, the end of answers, history; the terminal through pipes and a pty."""

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Tokenizer
from litgpt.prompts import Phi2

from litmoe.cli import UserError, run_cli
from litmoe.config import PROJECT
from litmoe.data.conversations import Message, encode_newest, encode_prompt, prompt_style
from litmoe.inference.chat import Chat, describe
from litmoe.inference.generate import Model, Sampling, generate_tokens, load, stream_pieces
from litmoe.inference.terminal import Terminal
from litmoe.inference.text_stream import StopSequences
from tests.helpers import load_script, save_tiny, tiny_gpt, wordy_gpt

GREEDY = {"temperature": 0.0}


@pytest.fixture
def gpt(moe_fields: dict) -> GPT:
    gpt = tiny_gpt({**moe_fields, "block_size": 256})
    with torch.no_grad():
        gpt.lm_head.weight[0] = 0  # the model never writes end-of-text
    return gpt


@pytest.fixture
def pretrained(tmp_path: Path, gpt: GPT, tokenizer: Tokenizer, tokenizer_dir: Path) -> Model:
    return Model(gpt, tokenizer, save_tiny(tmp_path / "pretrained" / "final", gpt, tokenizer_dir))


@pytest.fixture
def tuned(tmp_path: Path, gpt: GPT, tokenizer: Tokenizer, tokenizer_dir: Path) -> Model:
    folder = save_tiny(tmp_path / "tuned" / "final", gpt, tokenizer_dir, prompt_style=Phi2())
    return Model(gpt, tokenizer, folder)


def _ask(chat: Chat, question: str, **sampling) -> str:
    return "".join(chat.ask(question, **{**GREEDY, "max_new_tokens": 12, **sampling}))


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_answer_equals_its_decoded_tokens(
    kind: str, tmp_path: Path, moe_fields: dict, tokenizer_dir: Path, llama_tokenizer_dir: Path
) -> None:
    """Answers are tokenized on their own in training: white space at the ends is kept, and none is added."""
    folder = llama_tokenizer_dir if kind == "llama" else tokenizer_dir
    gpt, tokenizer = wordy_gpt({**moe_fields, "block_size": 256}), Tokenizer(folder)
    model = Model(gpt, tokenizer, save_tiny(tmp_path / "final", gpt, folder, prompt_style=Phi2()))
    answers = []
    for question in ("Who is Mia?", "Where did Tom go?", "Why?", "And then?", "A cat?", "A dog?", "Sad?", "Shy?"):
        chat = Chat(model)
        answers.append("".join(chat.ask(question, temperature=0.0, max_new_tokens=20)))
        prompt = torch.tensor(encode_prompt([Message(role="user", content=question)], tokenizer, Phi2()))
        tokens = list(generate_tokens(gpt, prompt, max_new_tokens=20, temperature=0.0, eos_id=tokenizer.eos_id))
        assert answers[-1] == tokenizer.processor.decode(torch.cat(tokens).tolist())
        assert chat.messages[-1]["content"] == answers[-1]
    assert len(set(answers)) > 1


# ------------------------------------------------------------------------------------------------------ stop sequences


def test_stop_sequences_end_at_the_first_match() -> None:
    """Compared with a search through all tokens after each one; few different tokens give many overlaps."""
    dice = random.Random(0)
    for _ in range(3000):
        sequences = [[dice.randrange(3) for _ in range(dice.randint(1, 4))] for _ in range(dice.randint(0, 3))]
        tokens = [dice.randrange(3) for _ in range(12)]
        ends = [
            (size, size - len(sequence))
            for size in range(1, 13)
            for sequence in sequences
            if tokens[:size][-len(sequence) :] == sequence and len(sequence) <= size
        ]
        stops, text = StopSequences(sequences), []
        for position, token in enumerate(tokens, start=1):
            certain, ended = stops.push(token)
            text += certain
            assert text == tokens[: len(text)]
            assert ended == (bool(ends) and ends[0][0] == position)
            if ended:
                assert len(text) in [start for size, start in ends if size == position]
                break
        else:
            assert not ends
            assert text + stops.held == tokens
            assert len(stops.held) < max((len(sequence) for sequence in sequences), default=1)


def test_long_stop_sequence_is_not_text(gpt: GPT, tokenizer: Tokenizer) -> None:
    prompt = [5, 17, 300]
    greedy = torch.cat(list(generate_tokens(gpt, torch.tensor(prompt), max_new_tokens=20, temperature=0.0))).tolist()
    at = next(i for i in range(3, 19) if greedy[i : i + 2] not in [greedy[j : j + 2] for j in range(i)])
    options = {"max_new_tokens": 20, "temperature": 0.0, "stop": [greedy[at : at + 2], [greedy[at], 383]]}
    pieces = list(stream_pieces(gpt, tokenizer, prompt, num_samples=2, **options))
    for sample in range(2):
        own = [piece for piece in pieces if piece.sample == sample]
        assert "".join(piece.text for piece in own) == tokenizer.decode(torch.tensor(greedy[:at]))
        assert own[-1][2:] == ("end_of_text", at + 2)
    cut = list(stream_pieces(gpt, tokenizer, prompt, **{**options, "max_new_tokens": at + 1}))
    assert "".join(piece.text for piece in cut) == tokenizer.decode(torch.tensor(greedy[: at + 1])), (
        "tokens that were held back are returned"
    )
    assert cut[-1].end == "max_new_tokens"


# ------------------------------------------------------------------------------------------------------------- answers


def test_tuned_model_reads_the_conversation(tuned: Model) -> None:
    chat = Chat(tuned)
    chat.system = "Be kind."
    first = _ask(chat, "Who?")
    assert first
    reply = chat.ask("Where?", **GREEDY, max_new_tokens=12)
    said = [("system", "Be kind."), ("user", "Who?"), ("assistant", first), ("user", "Where?")]
    messages = [Message(role=role, content=content) for role, content in said]
    assert reply.prompt == encode_prompt(messages, tuned.tokenizer, prompt_style("phi-2"))
    tokens = generate_tokens(tuned.gpt, torch.tensor(reply.prompt), max_new_tokens=12, temperature=0.0)
    assert "".join(reply) == reply.text == tuned.tokenizer.decode(torch.cat(list(tokens))).lstrip()
    assert chat.messages == [*messages[1:], Message(role="assistant", content=reply.text)]
    assert (reply.end, reply.tokens, reply.forgotten) == ("max_new_tokens", 12, 0)
    assert re.fullmatch(r"12 tokens, [\d,]+ tokens/s; cut at max_new_tokens", reply.summary())


def test_base_model_continues_the_text(pretrained: Model) -> None:
    chat = Chat(pretrained)
    assert not chat.is_tuned
    for question in ("Once upon", "Mia the cat"):  # the second does not depend on the first
        written = pretrained.generate(question, max_new_tokens=12, temperature=0.0).removeprefix(question)
        assert _ask(chat, question) == written
    assert len(chat.messages) == 4
    assert chat.ask("<|endoftext|>Once").prompt[0] == pretrained.tokenizer.eos_id  # special tokens are read
    with pytest.raises(UserError, match="base model"):
        chat.system = "Be kind."


def test_oldest_turns_are_left_out(tuned: Model) -> None:
    chat = Chat(tuned)
    chat.system = "Be kind."
    forgotten = []
    for turn in range(8):
        reply = chat.ask(f"Where did Mia go on day {turn}?", **GREEDY, max_new_tokens=70)
        "".join(reply)
        forgotten.append(reply.forgotten)
        assert len(reply.prompt) + 64 - 1 <= 256, "a quarter of the context is reserved for the answer"
        text = tuned.tokenizer.decode(torch.tensor(reply.prompt))
        assert "Be kind." in text and f"day {turn}?" in text
        assert text.count("Instruct:") == turn + 1 - reply.forgotten
    assert forgotten[0] == 0 and forgotten == sorted(forgotten) and forgotten[-1] > 3
    assert f"the oldest {forgotten[-1]} turns left out" in reply.summary()
    assert len(chat.messages) == 16, "all messages can still be saved"


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("name", ["phi-2", "alpaca", "llama3"])
def test_newest_turns_that_fit(tokenizer: Tokenizer, name: str, system: str) -> None:
    """Compared with the complete prompt for each number of turns; only what may fit is encoded."""
    style, head = prompt_style(name), [Message(role="system", content=system)] if system else []
    turns = [("user", f"Where did Mia go on day {i}?") if i % 2 == 0 else ("assistant", "Home. " * i) for i in range(9)]
    messages = [Message(role=role, content=text) for role, text in turns]
    prompts = [encode_prompt([*head, *messages[8 - 2 * kept :]], tokenizer, style) for kept in range(5)]
    for longest in {len(prompt) + more for prompt in prompts for more in (-1, 0, 1)}:
        kept = max((kept for kept in range(5) if len(prompts[kept]) <= longest), default=0)
        assert encode_newest(head, messages, tokenizer, style, longest) == (kept, prompts[kept])
    endless = [*[Message(role=role, content="x" * 100_000) for role in ("user", "assistant")] * 500, *messages[-3:]]
    assert encode_newest(head, endless, tokenizer, style, len(prompts[1])) == (1, prompts[1])


def test_refuses_a_question_that_does_not_fit(tuned: Model) -> None:
    chat = Chat(tuned)
    _ask(chat, "Who?")
    for question in ("cat " * 300, "x" * 200_000):
        with pytest.raises(
            UserError, match=r"expected at most 193: the context of the model is 256, and 64 are reserved"
        ):
            chat.ask(question)
    for question in ("", " \n"):
        with pytest.raises(UserError, match="question is empty"):
            chat.ask(question)
    with pytest.raises(UserError, match="top_p is 3"):
        chat.ask("Who?", top_p=3)
    assert len(chat.messages) == 2


def test_any_text_can_be_a_question(tuned: Model) -> None:
    chat = Chat(tuned)
    for question in ("\x00\x1b[2J\x07", "half \ud83d of a pair", "<|endoftext|>", "🦊\u202e\ufeff", "/"):
        _ask(chat, question, max_new_tokens=2)
    assert chat.messages[2]["content"] == "half ? of a pair"


def test_answer_ends_at_the_context(tuned: Model) -> None:
    chat = Chat(tuned)
    full = chat.ask("Who?", max_new_tokens=10_000, temperature=2.0)
    "".join(full)
    assert full.end == "block_size" and len(full.prompt) + full.tokens == 257
    assert "the context of 256 tokens is full" in full.summary()
    with torch.no_grad():
        tuned.gpt.lm_head.weight.zero_()  # all logits are equal: argmax takes the first id, end-of-text
    chat = Chat(tuned)
    ended = chat.ask("Who?", **GREEDY)
    assert "".join(ended) == "" and ended.end == "end_of_text"
    assert ended.summary().startswith("1 token, ") and ";" not in ended.summary()[10:]
    assert chat.messages[-1]["content"] == ""


def test_stopped_answer_is_kept(tuned: Model) -> None:
    chat = Chat(tuned)
    reply = chat.ask("Who?", **GREEDY)
    pieces = iter(reply)
    written = next(pieces) + next(pieces)
    pieces.close()
    assert reply.end is None and "stopped" in reply.summary()
    assert [message["content"] for message in chat.messages] == ["Who?", written]
    assert all(block.attn.kv_cache is None for block in tuned.gpt.transformer.h), "the model is not changed"
    iter(chat.ask("Where?")).close()
    assert len(chat.messages) == 2


def test_seed_and_retry(tuned: Model) -> None:
    def talk(seed: int | None) -> list[str]:
        chat = Chat(tuned, seed=seed)
        return [_ask(chat, "Who?", temperature=2.0), _ask(chat, chat.undo() or "", temperature=2.0)]

    first = talk(3)
    torch.manual_seed(0)
    assert talk(3) == first and first[0] != first[1]
    assert talk(4) != first
    assert talk(None) != talk(None)
    assert Chat(tuned).undo() is None


def test_saving(tuned: Model, tmp_path: Path) -> None:
    chat = Chat(tuned)
    with pytest.raises(UserError, match="nothing to save"):
        chat.save(tmp_path / "chat.md")
    chat.system = "Be kind."
    answer = _ask(chat, "Wer? Ä 🦊")
    chat.save(tmp_path / "chat.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [("system", "Be kind."), ("user", "Wer? Ä 🦊"), ("assistant", answer)]
    assert saved == [{"messages": [{"role": role, "content": content} for role, content in said]}]
    chat.save(tmp_path / "chat.md")
    assert "\n**User**\n\nWer? Ä 🦊\n" in (tmp_path / "chat.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="exists"):
        chat.save(tmp_path / "chat.md")
    chat.save(tmp_path / "chat.md", overwrite=True)
    with pytest.raises(UserError, match="cannot write"):
        chat.save(tmp_path / "nowhere" / "chat.md")


def test_describe(tuned: Model) -> None:
    total = sum(parameter.numel() for parameter in tuned.gpt.parameters())
    assert re.fullmatch(rf"tiny-moe: {total / 1e6:.1f} M parameters, 0\.0 M active, step 1", describe(tuned))


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.fixture
def type_in(tuned: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Terminal]:
    def run(text: str) -> Terminal:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        terminal = Terminal(Chat(tuned, seed=1), Sampling(max_new_tokens=8, temperature=0.0, top_k=50, top_p=1.0))
        terminal.run()
        return terminal

    return run


def test_commands(type_in: Callable[[str], Terminal], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a chat.jsonl"
    terminal = type_in(
        "/help\nWho?\n/retry\n\n/temperature 0.5\n/top_k all\n/top_p 0.9\n/max_new_tokens 3\n/temperature\n/seed 3\n"
        f"/system Be kind.\nWhere?\n/save {file}\n/save {file} overwrite\n/undo\n/quit\nnever asked\n"
    )
    out, err = capsys.readouterr()
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 5
    contents = [message["content"] for message in terminal.chat.messages]
    assert contents[0] == "Who?" and len(contents) == 2
    assert out.startswith(f"{contents[1]}\n{contents[1]}\n"), "only answers, and the same greedy answer again"
    assert terminal.sampling == {"max_new_tokens": 3, "temperature": 0.5, "top_k": None, "top_p": 0.9}
    assert terminal.chat.system == "Be kind."
    for message in ("/max_new_tokens N", "temperature 0.5", "top_k None", "Saved", "Removed: Where?", "tokens/s"):
        assert message in err
    assert "never asked" not in out + err
    assert type_in("Who?\n/reset\n").chat.messages == []


def test_failed_retry_keeps_the_answer(type_in: Callable[[str], Terminal]) -> None:
    terminal = type_in("Who?\n")
    messages = list(terminal.chat.messages)
    terminal.chat.system = "cat " * 300
    with pytest.raises(UserError, match="question and system message"):
        terminal.do_retry("")
    assert terminal.chat.messages == messages


def test_refuses_an_unknown_home(type_in: Callable[[str], Terminal]) -> None:
    with pytest.raises(UserError, match="cannot write"):  # on Windows, any user has a home
        type_in("Who?\n/save ~nosuchuser/x.md\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temp 3", "there is no command /temp; did you mean /temperature?"),
        ("/rest", "did you mean /reset?"),
        ("/zzz", "there is no command /zzz; /help lists"),
        ("/temperature hot", "/temperature needs a number, not 'hot'"),
        ("/temperature -1", "temperature is -1"),
        ("/top_k 0", "top_k is 0"),
        ("/max_new_tokens 1.5", "needs a number"),
        ("/seed x", "whole number"),
        ("/seed 18446744073709551616", "at most 64 bits"),
        ("Who?\n/save x\0y.md", "cannot write"),
        ("/save", "/save needs a file"),
        ("/retry", "no question to answer again"),
        ("cat " * 300, "expected at most"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_errors_end_a_pipe(type_in: Callable[[str], Terminal], line: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        type_in(f"{line}\n")


def test_script_in_a_pipe(tmp_path: Path, pretrained: Model) -> None:
    """The newest checkpoint answers each line in UTF-8, with only the answers on stdout."""
    os.rename(pretrained.folder.parent, tmp_path / "checkpoints")
    command = [sys.executable, str(PROJECT / "chat.py"), "--temperature=0", "--max-new-tokens", "20", "--device=cpu"]
    result = subprocess.run(
        command, cwd=tmp_path, input="Once upon\n\nMia 🦊\n", capture_output=True, encoding="utf-8", timeout=200
    )
    assert result.returncode == 0, result.stderr
    model = load(tmp_path / "checkpoints" / "final", device="cpu")
    options = {"max_new_tokens": 20, "temperature": 0.0}
    answers = ["".join(Chat(model).ask(question, **options)) for question in ("Once upon", "Mia 🦊")]
    assert result.stdout == "".join(answer + "\n" for answer in answers)
    assert result.stderr.count("This is a base model") == 1
    assert "20 tokens, " in result.stderr


def test_script_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretrained: Model
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(pretrained.folder)
    for argv, message in (
        (["nowhere"], "found no checkpoint at nowhere"),
        ([folder, "--compare", folder], "--compare needs the web page: add --web"),
        ([folder, "--temperature", "-1"], "temperature is -1"),
        ([folder, "--port", "7000"], "--host and --port need a server: add --web for the page, or --serve"),
        ([folder, "--web", "--port", "99999"], "--port is 99999"),
        ([folder, "--seed", str(2**64)], "at most 64 bits"),
        ([folder, "--device", "warp"], "warp"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_cli(load_script("chat").main, argv, optional_positional="checkpoint")
        captured = capsys.readouterr()
        assert exit_.value.code == 1
        assert message in captured.err and captured.err.splitlines()[-1].startswith("error: ")
        assert captured.out == ""


class Typist:
    """A user at a real terminal."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        import pty

        self.ours, theirs = pty.openpty()
        # If these tests are a background job of a shell, Ctrl-C is ignored by default.
        takes_terminal = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", takes_terminal, *command],
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 200) -> str:
        """Return the output up to the end of ``pattern``; the next call starts after it."""
        import select

        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    new = os.read(self.ours, 65536).decode("utf-8", errors="replace")
                except OSError:  # the process has ended
                    new = ""
                assert new, f"ended without {pattern!r}: {self.shown!r}"
                if "\x1b[6n" in new:
                    self.type("\x1b[1;1R")  # it asks for the position of the cursor
                self.shown += re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", new)
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_real_terminal(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> None:
    """Alt-Enter, history with the arrow keys, Ctrl-C stops an answer, and no control characters of the model."""
    gpt = tiny_gpt({**moe_fields, "block_size": 4096})
    with torch.no_grad():
        gpt.lm_head.weight[0] = 0
    folder = save_tiny(tmp_path / "final", gpt, tokenizer_dir, prompt_style=Phi2())
    command = [sys.executable, str(PROJECT / "chat.py"), str(folder), "--device", "cpu", "--max_new_tokens", "99999"]
    typist = Typist([*command, "--top_k", "100", "--temperature", "3"], tmp_path)
    try:
        typist.wait_for("Ctrl-D ends the chat.*>")
        typist.type("Who is\x1b\rMia?\r")
        typist.wait_for(r"Mia\?.*\n")
        written = typist.wait_for(".{400}")
        typist.type("\x03")
        written += typist.wait_for("stopped")
        assert not re.search(r"[\x00-\x07\x0b\x0c\x0e-\x1f]", written), "a terminal would execute it"
        typist.wait_for(">")
        typist.type("/max_new_tokens 5\r")
        typist.wait_for("max_new_tokens 5\r*\n.*>")
        typist.type("\x1b[A\x1b[A\r")  # the question before the last input
        assert "Who is" in typist.wait_for("5 tokens, .*>")
        typist.type("/tepm\r")
        typist.wait_for("there is no command /tepm.*>")
        typist.type("/save chat.jsonl\r")
        typist.wait_for("Saved")
        typist.type("/quit\r")
        assert typist.process.wait(60) == 0
    finally:
        typist.process.kill()
        os.close(typist.ours)
    (line,) = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert [message["content"] for message in messages[::2]] == ["Who is\nMia?"] * 2
