"""LitGPT's own tests give the same results with the layers of this project as with its own.

The tests are in the sdist of the pinned version, 0.2 MB, which pip downloads once into pytest's cache. Its checksum is
the one in requirements.txt. Without a network and without the cache the test fails.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

from litmoe.config import PROJECT

FILES = ("test_model", "test_lora", "test_config", "test_deepseek_moe", "test_adapter_v2", "test_yarn")
UV = shutil.which("uv") or shutil.which("uv", path=str(PROJECT / ".uv" / "bin"))


def download(folder: Path) -> Path:
    """Return LitGPT's sdist in the folder."""
    path = folder / f"litgpt-{version('litgpt')}.tar.gz"
    if not path.is_file():
        assert UV is not None
        pip = [UV, "run", "--no-project", "--with", "pip", "--with", "setuptools", "python", "-m", "pip", "download"]
        only_source = ["--no-deps", "--no-binary", "litgpt", "--no-build-isolation", "--dest", str(folder)]
        subprocess.run([*pip, *only_source, f"litgpt=={version('litgpt')}"], check=True)
    requirements = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    hashes = re.search(r"^litgpt==.*(?:\n    --hash=.*)+", requirements, re.MULTILINE)
    assert hashes is not None and f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" in hashes[0]
    return path


def outcomes(tests: Path, layers: str, report: Path) -> dict[str, str]:
    """Run the tests in a process with these layers, and return the outcome of each."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "LITMOE_LAYERS": layers}
    options = ["-p", "tests.litgpt_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests), "-q"]
    files = [f"{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", *options, "--tb=short", f"--junitxml={report}", *files]
    result = subprocess.run(
        command, cwd=tests, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    print(result.stdout[-20_000:], result.stderr[-5_000:], flush=True)
    # 1: some tests failed, which the caller compares.
    assert result.returncode in (0, 1), layers
    return {
        f"{case.get('classname')}.{case.get('name')}": next((child.tag for child in case), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    }


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(UV is None, reason="needs uv")
def test_litgpts_own_tests(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with tarfile.open(download(request.config.cache.mkdir("litgpt"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (tests,) = tmp_path.glob("litgpt-*/tests")
    stock, custom_moe, litmoe = (
        outcomes(tests, layers, tmp_path / f"{layers}.xml") for layers in ("stock", "custom_moe", "litmoe")
    )
    # Some fail with LitGPT's own layers, because its tests expect another version of transformers.
    assert list(stock.values()).count("passed") > 500
    assert {
        name: (outcome, stock.get(name)) for name, outcome in custom_moe.items() if outcome != stock.get(name)
    } == {}
    assert {name: (outcome, stock.get(name)) for name, outcome in litmoe.items() if outcome != stock.get(name)} == {}
    assert len(stock) == len(custom_moe) == len(litmoe)
