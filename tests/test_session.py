"""Run the session of docs/finetuning.md line by line in a fresh copy."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from litmoe.config import PROJECT

UV = shutil.which("uv") or shutil.which("uv", path=str(PROJECT / ".uv" / "bin"))


def commands() -> list[str]:
    """Return the lines of the session in docs/finetuning.md."""
    text = (PROJECT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    return re.findall(r"<!-- session -->\n```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()


def run(command: str, cwd: Path) -> str:
    """Run a line and return its stdout. `uv run` is this environment, unless the line asks for an isolated one."""
    spoken, _, call = command.rpartition(" | ")
    words = shlex.split(call)
    assert words[:2] == ["uv", "run"]
    words = [UV, *words[1:]] if "--isolated" in words else [sys.executable, *words[3:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "PYTHONUTF8": "1", "COLUMNS": "100"}
    result = subprocess.run(
        words,
        cwd=cwd,
        input=shlex.split(spoken)[1] + "\n" if spoken else "",
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )
    print(f"$ {command}\n{result.stderr}\n{result.stdout}", flush=True)
    assert result.returncode == 0, command
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(UV is None, reason="needs uv")
def test_finetuning_session(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, tmp_path / name)
    lines = commands()
    said = [run(line, tmp_path) for line in lines]
    scripts = [next(word for word in shlex.split(line.rpartition(" | ")[2]) if word.endswith(".py")) for line in lines]
    expected = ["run_train.py", "prepare_data.py", "finetune.py", "chat.py", *["evaluate.py"] * 3, "export_hf.py"]
    assert scripts == [*expected, "scripts/answer.py"]

    tuned = json.loads(said[4])
    before = float(re.findall(r"step 0/\d+ \| val loss ([\d.]+)", said[2])[0])
    assert tuned["loss"] < 0.9 * before
    (score,) = json.loads(said[5])["scores"]
    assert score["task"] == "story_hero" and score["value"] > 0.9
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "greedy text" in said[7]
    ours, theirs = said[3].strip(), said[8].strip()
    assert "Milo" in ours and ours == theirs
