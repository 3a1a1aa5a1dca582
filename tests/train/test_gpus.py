"""What is known of cards, by the names that people and torch give them."""

import pytest

from litmoe.train.gpus import NAMES, named_card, peak_flops


@pytest.mark.parametrize("name", ["rtx3060-laptop", "RTX 3060 Laptop", "NVIDIA GeForce RTX 3060 Laptop GPU"])
def test_a_card_has_many_spellings(name: str) -> None:
    card = named_card(name)
    assert card is not None
    assert (card.name, card.memory, card.capability) == ("rtx3060-laptop", 6, (8, 6))


def test_every_card_is_found_by_its_name() -> None:
    for name in NAMES:
        card = named_card(name)
        assert card is not None
        assert card.name == name
        assert 0 < card.taken < card.memory
        assert card.peak is not None
        assert 5e12 < card.peak < 3e15


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71),  # the whitepapers' dense rate in bf16, summed up in fp32
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("Tesla T4", 65),
    ],
)
def test_the_peak_is_the_data_sheets_dense_one(name: str, teraflops: float) -> None:
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
def test_no_peak_is_guessed(name: str) -> None:
    assert peak_flops(name) is None
