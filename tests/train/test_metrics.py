"""The sums between two log lines survive a resume, also in checkpoints of other versions."""

import pytest
import torch

from litmoe.train.metrics import MetricAccumulator
from litmoe.train.model import Losses

FIRST = Losses(
    cross_entropy=torch.tensor(2.0),
    load_balancing=torch.tensor(1.0),
    z_loss=torch.tensor(0.5),
    router_confidence=torch.tensor([0.25, 0.75]),
    expert_counts=torch.tensor([[3, 1], [2, 2]]),
)


def accumulated() -> dict:
    metrics = MetricAccumulator()
    metrics.add(FIRST)
    metrics.add(FIRST)
    return metrics.state_dict()


@pytest.mark.parametrize("version", ["this one", "0.1.0, a list", "with another field", "without a field"])
def test_sums_are_restored_by_name(version: str) -> None:
    state = accumulated()
    if version == "0.1.0, a list":
        state["sums"] = list(state["sums"].values())
    elif version == "with another field":
        state["sums"] = {"unknown": torch.tensor(9.0), **state["sums"]}
    elif version == "without a field":
        del state["sums"]["z_loss"]
    resumed = MetricAccumulator()
    resumed.load_state_dict(state, torch.device("cpu"), rank_ratio=1, micro_batch_ratio=1)
    resumed.add(FIRST)
    sums = resumed.state_dict()["sums"]
    assert list(sums) == list(Losses._fields)
    for name, value in FIRST._asdict().items():
        times = 1 if version == "without a field" and name == "z_loss" else 3
        assert torch.equal(sums[name], times * value), name
