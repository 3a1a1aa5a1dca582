"""Packages that are imported in another way than usual."""

import subprocess
import sys

from litmoe.config import PROJECT


def stderr_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torchao_prints_no_message_for_its_developers() -> None:
    """Only those about its own enums are left out."""
    message = "Enum subclass and is now natively supported"
    assert message in stderr_of("import torchao"), "the loader of litmoe is not needed any more"
    code = """
import enum
import litmoe, torchao
import torchao.prototype.mx_formats.config  # transformers imports it when it loads a model
from torch.utils._pytree import register_constant
class Mine(str, enum.Enum):
    A = "a"
register_constant(Mine)
"""
    shown = stderr_of(code)
    assert shown.count(message) == 1 and "Mine" in shown
