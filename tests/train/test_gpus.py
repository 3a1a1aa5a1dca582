"""GPU specifications by the names that people and torch use."""

import os

import pytest
import torch

from litmoe.hardware import NAMES, gpu_by_name, missing_cuda_note, peak_flops


@pytest.mark.parametrize("name", ["rtx3060-laptop", "RTX 3060 Laptop", "NVIDIA GeForce RTX 3060 Laptop GPU"])
def test_spellings_of_a_name(name: str) -> None:
    gpu = gpu_by_name(name)
    assert gpu is not None
    assert (gpu.name, gpu.memory, gpu.capability) == ("rtx3060-laptop", 6, (8, 6))


def test_all_names_are_found() -> None:
    for name in NAMES:
        gpu = gpu_by_name(name)
        assert gpu is not None and gpu.peak is not None
        assert gpu.name == name
        assert 0 < gpu.taken < gpu.memory
        assert 5e12 < gpu.peak < 3e15


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71),  # the whitepapers' dense rate in bf16, accumulated in fp32
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("Tesla T4", 65),
    ],
)
def test_peak_of_the_data_sheet(name: str, teraflops: float) -> None:
    assert peak_flops(name) == pytest.approx(teraflops * 1e12, rel=0.005)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3060 Laptop GPU",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GeForce GTX 1660",
        "",
    ],
)
def test_unknown_peak(name: str) -> None:
    assert peak_flops(name) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no GPU")
@pytest.mark.skipif(os.name == "nt", reason="writes a program for POSIX")
@pytest.mark.parametrize(
    ("cuda", "advice"), [(None, "is built without CUDA"), ("13.2", "Update the driver to CUDA 13.2")]
)
def test_driver_without_a_torch_that_uses_it(monkeypatch, tmp_path, cuda, advice) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert missing_cuda_note() is None, "no driver"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert advice in missing_cuda_note()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert missing_cuda_note() is None, "hidden on purpose"
