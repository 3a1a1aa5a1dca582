import os
import platform
import sys

import pytest

from litmoe.train.allocator import use_expandable_segments


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what the test sets is taken back
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


@pytest.mark.parametrize(
    ("system", "release", "cuda", "wanted"),
    [
        ("linux", "6.8.0-generic", True, "expandable_segments:True"),
        ("linux", "6.8.0-generic", False, None),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", True, None),
        ("win32", "11", True, None),
    ],
)
def test_only_where_it_works(system, release, cuda, wanted, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    use_expandable_segments(cuda)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_setting_stays(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments(True)
    assert {n: v for n, v in os.environ.items() if n.endswith("ALLOC_CONF")} == {name: "max_split_size_mb:64"}
