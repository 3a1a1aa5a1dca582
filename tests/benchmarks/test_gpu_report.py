"""The report of a GPU, rehearsed on a CPU."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.common import ROOT
from benchmarks.runs import NOTHING_ELSE

TINY_MODEL = ("--model.n_layer=1", "--model.block_size=32", "--train.max_seq_length=32")


def report(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict:
    output = folder / "gpu_report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--device", "cpu", "--output", str(output), *flags])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    try:
        gpu_report.main()
    except SystemExit as exit_:
        assert "some parts failed" in str(exit_)
    return json.loads(output.read_text(encoding="utf-8"))["parts"]


def test_report_of_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = report(monkeypatch, tmp_path, "--only", "loss")
    assert {name: part["status"] for name, part in parts.items()} == {"loss": "done"}
    text = (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert "(rehearsal)" in text and "**loss_cpu**" in text and "| **ours** |" in text
    # Nothing is measured twice, and nothing comes from another machine.
    assert report(monkeypatch, tmp_path, "--only", "loss", "--resume") == parts
    path = tmp_path / "gpu_report.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert gpu_report.earlier_parts(path, result)["loss"]["commit"] == result["commit"]
    with pytest.raises(SystemExit, match="from other hardware or other versions"):
        gpu_report.earlier_parts(path, result | {"versions": {"torch": "0"}})


def test_part_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = report(monkeypatch, tmp_path, "--only", "loss", "--minutes", "0.02")
    assert parts["loss"]["status"] == "failed" and parts["loss"]["note"].startswith("stopped after 1 s")
    assert report(monkeypatch, tmp_path, "--only", "loss", "--resume")["loss"]["status"] == "done"


def test_part_that_does_not_fit_is_skipped(tmp_path: Path) -> None:
    part = gpu_report.PARTS[0]
    parser = gpu_report.common.make_parser("", "gpu_report_DEVICE")
    args = parser.parse_args(["--device", "cuda", "--output", str(tmp_path / "gpu_report.json")])
    result = gpu_report.run_part(part, args, seconds_left=part.seconds - 1)
    assert result["status"] == "skipped" and result["note"] == f"needs about 90 s, {part.seconds - 1:.0f} s were left"


def test_training_needs_only_the_listed_packages(prepared: Path, tmp_path: Path) -> None:
    """With all others hidden, a run works."""
    allowed = closure("torch").union(*(closure(name) for name in gpu_report.PACKAGES))
    flags = [f"--data.init_args.{split}_data_path={prepared / 'data' / split}" for split in ("train", "val")]
    flags += [f"--tokenizer_dir={prepared / 'tokenizer'}", f"--out_dir={tmp_path / 'run'}", *NOTHING_ELSE, *TINY_MODEL]
    flags += ["--config=configs/quickstart.yaml", "--train.max_tokens=512", "--train.lr_warmup_steps=1"]
    command = [sys.executable, "-c", WITHOUT_OTHERS, json.dumps(sorted(allowed)), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/final").is_dir()


# Hides all modules of other distributions, and runs run_train.py.
WITHOUT_OTHERS = """
import json, runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
allowed, sys.argv = set(json.loads(sys.argv[1])), ["run_train.py", *sys.argv[2:]]
names = packages_distributions()
class Allowed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = {owner.lower().replace("_", "-") for owner in names.get(name.partition(".")[0], ())}
        return None if owners and not owners & allowed else super().find_spec(name, path, target)
sys.meta_path = [Allowed if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, "")
runpy.run_path("run_train.py", run_name="__main__")
"""


def closure(root: str) -> set[str]:
    """Return an installed distribution and everything that it needs, without extras."""
    names, waiting = set(), [root]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        with suppress(PackageNotFoundError):  # needed on another system only
            lines = [line for line in distribution(name).requires or () if "extra ==" not in line]
            waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if name not in names]
            names.add(name)
    return names


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = report(monkeypatch, tmp_path, "--minutes", "60")
    assert set(parts) == {part.name for part in gpu_report.PARTS if part.rehearsal}
    assert {part["status"] for part in parts.values()} == {"done"}, parts
    text = (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert "no table" not in text and "FAILED" not in text
