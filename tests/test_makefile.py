"""The project's commands: make, getting uv, the pins, the GPU helpers, and that no test is skipped in silence."""

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
TARGETS = ["environment", "uv", "venv", "lock", "quickstart", "train", "ddp-train", "tensorboard", "test", "test-slow"]
TARGETS += ["chaos", "check", "bench", "bench-gpu", "gpu-status", "kill-gpu", "gpu-hot", "clean"]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the commands in a folder with a space in its name."""
    folder = tmp_path / "a project"
    shutil.copytree(PROJECT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder)
    return folder


def run(*command: str | Path, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **kwargs)


@needs_make
def test_make_alone_lists_every_target(project: Path) -> None:
    listed = run("make", cwd=project)
    assert listed.returncode == 0, listed.stderr
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\S", listed.stdout, re.MULTILINE), f"{target} is not listed"


@needs_make
@needs_posix
def test_make_environment_gets_uv_and_syncs_in_a_folder_with_a_space(project: Path, index: str) -> None:
    result = run("make", "environment", cwd=project, env=environment(index, project, ("venv",)))
    assert result.returncode == 0, result.stderr
    assert "the fake uv was called with: sync" in result.stdout
    assert (project / ".uv/bin/uv").exists()


@needs_make
@needs_posix
def test_what_make_starts_keeps_its_bytecode(project: Path) -> None:
    """Where PYTHONDONTWRITEBYTECODE is set, as in many containers, every command compiled its imports anew."""
    uv = project / "uv"
    uv.write_text('#!/bin/sh\necho "bytecode: ${PYTHONDONTWRITEBYTECODE-kept}"\n', encoding="utf-8")
    uv.chmod(0o755)
    result = run(
        "make", f"UV={uv}", "PYTHON=true", "venv", cwd=project, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert "bytecode: kept" in result.stdout, result.stderr


@needs_make
@needs_posix
def test_make_clean_keeps_what_the_user_made(project: Path) -> None:
    kept = ["data/custom_text/train/a.txt", "checkpoints/final/lit_model.pth", "wandb/run", ".venv/__pycache__/a.pyc"]
    gone = ["litmoe/__pycache__/a.pyc", ".mypy_cache/a", "litmoe.egg-info/a"]
    for name in kept + gone:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    assert run("make", "clean", cwd=project).returncode == 0
    assert [name for name in kept + gone if (project / name).exists()] == kept


# ----------------------------------------------------------------------------------------------------------- getting uv


def fake_uv(folder: Path) -> Path:
    """A package index with one wheel: uv, as far as this project's version and this machine's name for it go."""
    module = runpy.run_path(str(PROJECT / "scripts" / "get_uv.py"))
    version, (system, machine) = module["VERSION"], module["wheel_tags"]()
    tag = {"macosx_": "macosx_11_0_", "manylinux": "manylinux_2_17_", "musllinux": "musllinux_1_1_"}[system] + machine
    wheel = folder / f"uv-{version}-py3-none-{tag}.whl"
    info = f"uv-{version}.dist-info"
    script = f'#!/bin/sh\n[ "$1" = --version ] && echo "uv {version}" || echo "the fake uv was called with: $*"\n'
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"uv-{version}.data/scripts/uv", script)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "uv").mkdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "uv" / "index.html").write_text(f'<a href="../{wheel.name}#sha256={digest}">{wheel.name}</a>')
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "index"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(fake_uv(folder)))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def environment(index: str, home: Path, missing: tuple[str, ...] = ()) -> dict[str, str]:
    """A new user's: no uv on the PATH, one package index, an empty home, some of Python's modules not installed."""
    stubs, binaries = home / "stubs", home / "binaries"
    if not stubs.exists():
        stubs.mkdir()
        binaries.mkdir()
        for name in missing:
            (stubs / f"{name}.py").write_text(f"raise ImportError('no module {name}')")
        for name in ("make", "awk"):
            (binaries / name).symlink_to(str(shutil.which(name)))
    return {
        "PATH": str(binaries),
        "HOME": str(home),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(stubs),
        "PIP_INDEX_URL": index,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
    }


@needs_posix
@pytest.mark.parametrize("missing", [(), ("venv",), ("venv", "pip")], ids=["all", "no venv", "neither venv nor pip"])
def test_uv_is_put_into_the_project_whatever_python_lacks(project: Path, index: str, missing: tuple[str, ...]) -> None:
    for _ in range(2):  # the second time it is found
        result = run(sys.executable, "scripts/get_uv.py", cwd=project, env=environment(index, project, missing))
        assert result.returncode == 0, result.stderr
        assert Path(result.stdout.strip()) == project / ".uv/bin/uv"
    assert "putting uv" not in result.stderr


@needs_posix
def test_a_uv_on_the_path_is_taken(project: Path, index: str) -> None:
    env = environment(index, project)
    on_path = project / "binaries" / "uv"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    result = run(sys.executable, "scripts/get_uv.py", cwd=project, env=env)
    assert Path(result.stdout.strip()) == on_path and not (project / ".uv").exists()


@needs_posix
def test_a_wheel_that_is_not_what_the_index_says_is_refused(project: Path, index: str, tmp_path: Path) -> None:
    wheel = next((tmp_path / "index").glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes() + b"tampered")
    result = run(sys.executable, "scripts/get_uv.py", cwd=project, env=environment(index, project, ("venv", "pip")))
    assert result.returncode == 1 and "does not have the hash" in result.stderr and not (project / ".uv").exists()


@needs_posix
def test_without_an_index_there_is_one_message_and_nothing_left_behind(project: Path) -> None:
    env = environment("http://127.0.0.1:9", project, ("venv",))
    result = run(sys.executable, "scripts/get_uv.py", cwd=project, env=env)
    assert result.returncode == 1 and result.stdout == ""
    assert "error: could not get uv" in result.stderr and "Traceback" not in result.stderr
    assert not (project / ".uv").exists()


# ----------------------------------------------------------------------------------------------------------------- pins


def test_every_dependency_is_pinned_and_two_versions_stand_only_with_markers() -> None:
    with open(PROJECT / "pyproject.toml", "rb") as file:
        pyproject = tomllib.load(file)
    pins = pyproject["tool"]["uv"]["constraint-dependencies"]
    names = Counter(pin.split("==")[0] for pin in pins)
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;,*]+( ; .+)?", pin) for pin in pins)
    assert all(";" in pin for pin in pins if names[pin.split("==")[0]] > 1)
    direct = pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["dev"]
    for requirement in direct:
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?[=>]=(.*)", requirement).groups()
        pinned = [pin.split(" ;")[0] for pin in pins if pin.startswith(name + "==")]
        assert pinned, f"{name} has no pin: run `make lock`"
        assert "==" not in requirement or pinned == [f"{name}=={version}"], f"{name}: run `make lock`"


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def training(project: Path, tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A training of this project, one of another, and something else of this project, all sleeping."""
    stranger = tmp_path / "another project"
    stranger.mkdir()
    for folder in (project, stranger):
        for name in ("run_train.py", "generate.py"):
            (folder / name).write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    started = {
        "ours": (project, "run_train.py"),
        "another's": (stranger, "run_train.py"),
        "no training": (project, "generate.py"),
    }
    processes = {
        name: subprocess.Popen([sys.executable, script], cwd=folder, stdout=subprocess.PIPE)
        for name, (folder, script) in started.items()
    }
    for process in processes.values():
        process.stdout.readline()
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("answer", "ended"), [("y\n", ["ours"]), ("n\n", []), ("", [])], ids=["yes", "no", "nobody"])
def test_kill_ends_own_training_only_and_only_after_a_yes(
    project: Path, training: dict[str, subprocess.Popen[bytes]], answer: str, ended: list[str]
) -> None:
    result = run(sys.executable, "scripts/gpu.py", "kill", cwd=project, input=answer)
    assert result.returncode == 0, result.stderr
    assert str(training["ours"].pid) in result.stdout
    assert str(training["another's"].pid) not in result.stdout and str(training["no training"].pid) not in result.stdout
    assert [name for name, process in training.items() if process.poll() is not None] == ended


def test_hot_without_a_gpu_is_one_message(project: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = run(sys.executable, "scripts/gpu.py", "hot", "--gpus", "0,1", cwd=project, env=env)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------- skips


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unexpected_skip_fails_the_run(tmp_path: Path, workers: str) -> None:
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
