"""Plugin of pytest that runs LitGPT's own tests with the layers of this project; see test_litgpt_suite.py.

The environment variable LITMOE_LAYERS names the context manager: ``stock`` for none.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

# LitGPT's tests of its scripts need fixtures of a conftest.py that is not in the sdist.
MISSING_FIXTURES = {"fake_checkpoint_dir", "alpaca_path", "longform_path"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if not MISSING_FIXTURES.intersection(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def layers() -> Iterator[None]:
    """Build every model of a test with the layers."""
    with _context(os.environ["LITMOE_LAYERS"]):
        yield


def _context(name: str) -> AbstractContextManager[None]:
    from custom_moe import use_custom_moe
    from litmoe.layers import use_our_layers

    return {"stock": nullcontext, "custom_moe": use_custom_moe, "litmoe": use_our_layers}[name]()
