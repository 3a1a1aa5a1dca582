"""``--accelerator``: the same device for LitGPT's Fabric and for our own code."""

import os
import re

import lightning as L
import pytest
import torch
from lightning.fabric.accelerators import MPSAccelerator

from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.hardware import choose_precision, select_accelerator
from litmoe.train.plan import show_plan

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without an NVIDIA GPU")


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    for name in ("LT_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


@NO_GPU
def test_auto_on_a_mac_is_the_cpu(monkeypatch):
    """Fabric by itself would take the GPU."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    select_accelerator("auto")
    assert L.Fabric(devices=1).device.type == "cpu"


@NO_GPU
def test_mps_on_request(monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "parse_devices", lambda devices: [0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    select_accelerator("mps")
    assert L.Fabric(devices=1).device.type == "mps"
    assert choose_precision(None, "mps") == ("32-true", None)


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_missing_device(name):
    with pytest.raises(UserError, match=f"--accelerator is {name}, but torch finds no such device"):
        select_accelerator(name)


def test_cpu_hides_the_gpus():
    select_accelerator("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and L.Fabric(devices=1).device.type == "cpu"


def test_fp64_only_on_the_cpu():
    """A Mac's GPU raises an error for it: results move to the CPU before they are widened."""
    for path in (PROJECT / "litmoe").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(double\(\)|float64\)).*\.cpu\(\)", text), path


def test_plan_is_for_the_chosen_device(capsys):
    show_plan(["--config", str(PROJECT / "configs/quickstart.yaml"), "--accelerator", "cpu", "--plan"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "\nOn the CPU (" in capsys.readouterr().out
