"""A small run at a fixed seed gives what it gave in 0.1.0: tokens, losses, keys of the checkpoint, the greedy text.

``tests/golden/run.json`` holds the values. A change of a number is a bug, or is explained in the commit that renews it:

    LITMOE_RENEW_GOLDEN=1 python -m pytest tests/test_golden.py
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litmoe import load
from tests.helpers import column, metric_rows

GOLDEN = Path(__file__).parent / "golden" / "run.json"


def files_below(folder: Path) -> list[str]:
    """Paths relative to ``folder``, without event files of the logger, which are named after time and machine."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if "tfevents" not in path)


@pytest.fixture
def measured(train: Callable[..., Path], prepared: Path) -> dict:
    out = train("--train.log_interval", "1", "--train.max_steps", "40", "--train.save_interval", "20")
    weights = torch.load(out / "final" / "lit_model.pth", weights_only=True)
    sample = load(out / "final").generate("Once upon a time,", max_new_tokens=24, temperature=0.0)
    chunks = sorted((prepared / "data").rglob("*.bin"))
    return {
        "token_files": files_below(prepared),
        "chunks": {
            path.relative_to(prepared).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in chunks
        },
        "columns": list(metric_rows(out)[0]),
        "losses": column(out, "train_loss"),
        "val_losses": column(out, "val_loss"),
        "run_files": files_below(out),
        "weights": {key: list(value.shape) for key, value in weights.get("model", weights).items()},
        "sample": str(sample),
    }


def test_run_equals_the_golden_run(measured: dict) -> None:
    if os.environ.get("LITMOE_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    # A new metric is a new column; none of the old ones may be lost or change its place.
    measured["columns"] = [name for name in measured["columns"] if name in golden["columns"]]
    # Sums in another order (another CPU) differ in the last bits, and 40 steps let them grow to about 1e-5.
    assert measured.pop("losses") == pytest.approx(golden.pop("losses"), rel=1e-3)
    assert measured.pop("val_losses") == pytest.approx(golden.pop("val_losses"), rel=1e-3)
    assert measured == golden
