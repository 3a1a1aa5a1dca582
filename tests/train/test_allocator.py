import os
import platform
import subprocess
import sys

import pytest

from litmoe.hardware import use_expandable_segments


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that the old value is restored after the test
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


@pytest.mark.parametrize(
    ("system", "release", "cuda", "expected"),
    [
        ("linux", "6.8.0-generic", True, "expandable_segments:True"),
        ("linux", "6.8.0-generic", False, None),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", True, None),
        ("win32", "11", True, None),
    ],
)
def test_only_on_supported_systems(system, release, cuda, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    use_expandable_segments(cuda)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_setting_of_the_user_is_kept(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments(True)
    assert {n: v for n, v in os.environ.items() if n.endswith("ALLOC_CONF")} == {name: "max_split_size_mb:64"}


PAGE_FAULTS = """
import resource, sys, torch
from litmoe.hardware import keep_freed_memory

keep_freed_memory(cuda=sys.argv[1] == "cuda")

def step():
    return [torch.ones(2**22) for _ in range(3)]  # 16 MB each

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(5):
    step()
before = page_faults()
for _ in range(5):
    step()
print(page_faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_freed_memory_is_kept_on_a_cpu(device):
    """15 tensors of 4,096 pages, or of 8 huge ones."""
    # By default glibc adapts its threshold, and whether it returns these tensors depends on what lies behind them.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    command = [sys.executable, "-c", PAGE_FAULTS, device]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert (int(done.stdout) < 50) == (device == "cpu")
