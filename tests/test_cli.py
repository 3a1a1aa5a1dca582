"""What all command lines have in common."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from litmoe.cli import UserError, command, quoted
from litmoe.data import instructions, tokenizers
from litmoe.data.manifest import checked_manifest, tokenizer_fingerprint


def test_a_printed_command_can_be_pasted() -> None:
    arguments = (Path("my runs") / "it's $HOME" / "final", "--prompt", 'Say "hi" & go;\n', "--lr", 1.0e-3)
    if os.name != "nt":
        line = command("generate.py", *arguments)
        assert shlex.split(line) == ["uv", "run", "python", "generate.py", *map(str, arguments)]
    assert command("chat.py", "checkpoints") == "uv run python chat.py checkpoints"


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        (r"C:\runs\a-b_1.0", r"C:\runs\a-b_1.0"),
        (r"C:\my runs\final", r'"C:\my runs\final"'),
        ("C:\\my runs\\", r'"C:\my runs\\"'),
        (r"C:\a&b", r'"C:\a&b"'),
        ("C:\\a&b\\", r'"C:\a&b\\"'),
        (r"C:\a(1),b", r'"C:\a(1),b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("it's", '"it\'s"'),
        ("", '""'),
    ],
)
def test_windows_quotes_what_shells_act_on(argument: str, word: str) -> None:
    assert quoted(argument, windows=True) == word


@pytest.mark.parametrize("read", [checked_manifest, instructions.read, tokenizers.load, tokenizer_fingerprint])
def test_advice_quotes_a_path_with_a_blank(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Read by the shell, the advised command has the folder as one word."""
    with pytest.raises(UserError) as error:
        read(tmp_path / "my data")
    advised = re.findall("`(.*?)`", str(error.value))
    folder = str(tmp_path / "my data")
    assert any(folder in (shlex.split(line) if os.name != "nt" else line.replace('"', "")) for line in advised)
