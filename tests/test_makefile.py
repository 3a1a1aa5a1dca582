"""The project's commands: make targets, the uv installer, the pins, the GPU helper, and the rule for skipped tests."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from litmoe.config import PROJECT

TARGETS = ["environment", "uv", "venv", "lock", "quickstart", "train", "ddp-train", "tensorboard", "test", "test-slow"]
TARGETS += ["chaos", "check", "bench", "gpu-report", "gpu-status", "kill-gpu", "gpu-hot", "clean"]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the Makefile and the scripts in a folder with a space in its name."""
    folder = tmp_path / "a project"
    shutil.copytree(PROJECT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder)
    return folder


def run(*command: str | Path, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **kwargs)


def write_fake_uv(path: Path, script: str) -> Path:
    """Write a shell script in the place of uv, so that make starts nothing."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# ----------------------------------------------------------------------------------------------------------------- make


@needs_make
def test_make_lists_every_target(project: Path) -> None:
    listed = run("make", cwd=project)
    assert listed.returncode == 0, listed.stderr
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\S", listed.stdout, re.MULTILINE), f"{target} is not listed"


@needs_make
@needs_posix
def test_make_keeps_bytecode_caches(project: Path) -> None:
    """Containers often set PYTHONDONTWRITEBYTECODE; every command would then compile its imports again."""
    uv = write_fake_uv(project / "uv", 'echo "bytecode: ${PYTHONDONTWRITEBYTECODE-kept}"')
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = run("make", f"UV={uv}", "PYTHON=true", "venv", cwd=project, env=environment)
    assert "bytecode: kept" in result.stdout, result.stderr


@needs_make
@needs_posix
def test_make_clean_keeps_user_files(project: Path) -> None:
    kept = ["data/custom_text/train/a.txt", "checkpoints/final/lit_model.pth", "wandb/run", ".venv/__pycache__/a.pyc"]
    removed = ["litmoe/__pycache__/a.pyc", ".mypy_cache/a", "litmoe.egg-info/a"]
    for name in kept + removed:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    assert run("make", "clean", cwd=project).returncode == 0
    assert [name for name in kept + removed if (project / name).exists()] == kept


@needs_make
@needs_posix
def test_failed_benchmark_does_not_stop_the_others(tmp_path: Path) -> None:
    uv = write_fake_uv(tmp_path / "uv", 'echo "ran $*"\ncase "$*" in *train_step*) exit 3;; esac')
    done = run("make", f"UV={uv}", "PYTHON=true", "bench", cwd=PROJECT)
    assert done.returncode == 2, done.stderr
    assert "these failed:\n  python benchmarks/train_step.py" in done.stderr
    scripts = re.findall(r"ran run .*?(benchmarks/\w+\.py)", done.stdout)
    assert "benchmarks/generation.py" in scripts and scripts[-1] == "benchmarks/report.py"
    assert all((PROJECT / script).is_file() for script in scripts)


# ------------------------------------------------------------------------------------------------------------ uv, pins


@needs_posix
def test_uv_on_the_path_is_used(project: Path) -> None:
    folder = project / "binaries"
    folder.mkdir()
    uv = write_fake_uv(folder / "uv", "exit 0")
    result = run(sys.executable, "scripts/get_uv.py", cwd=project, env={"PATH": str(folder)})
    assert Path(result.stdout.strip()) == uv
    assert not (project / ".uv").exists()


@needs_posix
@pytest.mark.slow
def test_missing_network_gives_one_message(project: Path) -> None:
    environment = {"PATH": "", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    result = run(sys.executable, "scripts/get_uv.py", cwd=project, env=environment)
    assert result.returncode == 1 and result.stdout == ""
    assert "error: could not install uv" in result.stderr and "Traceback" not in result.stderr
    assert not (project / ".uv").exists()


def test_every_dependency_is_pinned() -> None:
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = pyproject["tool"]["uv"]["constraint-dependencies"]
    names = Counter(pin.split("==")[0] for pin in pins)
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;,*]+( ; .+)?", pin) for pin in pins)
    assert all(";" in pin for pin in pins if names[pin.split("==")[0]] > 1)
    for requirement in pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["dev"]:
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?[=>]=(.*)", requirement).groups()
        pinned = [pin.split(" ;")[0] for pin in pins if pin.startswith(name + "==")]
        assert pinned, f"{name} has no pin: run `make lock`"
        assert "==" not in requirement or pinned == [f"{name}=={version}"], f"{name}: run `make lock`"


def test_requirements_match_the_pins() -> None:
    """requirements.txt has the pinned versions, a hash for each package, and no address of a package index."""
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = {pin.split(" ;")[0] for pin in pyproject["tool"]["uv"]["constraint-dependencies"]}
    text = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    requirements = re.findall(r"^([a-z0-9-]+==\S+)", text, re.MULTILINE)
    assert set(requirements) <= pins, "run `make lock`"
    direct = {requirement.split("[")[0] for requirement in pyproject["project"]["dependencies"] if "==" in requirement}
    assert {name.split("==")[0] for name in direct} <= {name.split("==")[0] for name in requirements}
    blocks = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "--index-url" not in text


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def processes(project: Path, tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A training run of this project, one of another project, and another script of this project; all sleep."""
    other_project = tmp_path / "another project"
    other_project.mkdir()
    started = {}
    commands = {
        "training": (project, "run_train.py"),
        "another project": (other_project, "run_train.py"),
        "another script": (project, "generate.py"),
    }
    for name, (folder, script) in commands.items():
        (folder / script).write_text("import time\nprint('started', flush=True)\ntime.sleep(600)\n")
        started[name] = subprocess.Popen([sys.executable, script], cwd=folder, stdout=subprocess.PIPE)
    for process in started.values():
        process.stdout.readline()
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("answer", "stopped"), [("y\n", ["training"]), ("n\n", []), ("", [])], ids=["yes", "no", "eof"]
)
def test_kill_asks_and_stops_own_training_only(
    project: Path, processes: dict[str, subprocess.Popen[bytes]], answer: str, stopped: list[str]
) -> None:
    result = run(sys.executable, "scripts/gpu.py", "kill", cwd=project, input=answer)
    assert result.returncode == 0, result.stderr
    listed = [name for name, process in processes.items() if str(process.pid) in result.stdout]
    assert listed == ["training"]
    assert [name for name, process in processes.items() if process.poll() is not None] == stopped


# ---------------------------------------------------------------------------------------------------------------- skips


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unexpected_skip_fails_the_run(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "test_each.py").write_text(
        "import os, pytest\n"
        "def test_lazy(): pytest.skip('not today')\n"
        "@pytest.mark.skipif(True, reason='needs Windows' if os.name != 'nt' else 'needs a POSIX system')\n"
        "def test_true_reason(): ...\n"
        "@pytest.mark.skipif(True, reason='needs a POSIX system' if os.name != 'nt' else 'needs Windows')\n"
        "def test_untrue_reason(): ...\n"
        "@pytest.mark.xfail(strict=True)\n"
        "def test_xfail(): assert False\n"
    )
    env = {**os.environ, "PYTHONPATH": str(PROJECT / "tests")}
    pytest_command = (sys.executable, "-m", "pytest", "-p", "no_skips", "-n", workers, "--rootdir", tmp_path)
    result = run(*pytest_command, "test_each.py", cwd=tmp_path, env=env)
    assert "1 failed, 1 skipped, 1 xfailed, 1 error" in result.stdout and result.returncode == 1, result.stdout
    result = run(*pytest_command, "test_module.py", cwd=tmp_path, env=env)
    assert "unexpected skip" in result.stdout and result.returncode != 0, result.stdout
