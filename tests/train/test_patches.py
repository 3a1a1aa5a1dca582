import litgpt.model
import litgpt.pretrain
import pytest
from lightning.fabric.strategies import DDPStrategy

from litmoe.train.patches import patched_pretraining

NAMES = ("main", "choose_logger", "capture_hparams", "FSDPStrategy")


def patched():
    return patched_pretraining(main=print, choose_logger=print, strategy=DDPStrategy, summary={"a": 1})


def test_litgpt_is_as_it_was_afterwards_also_after_an_error():
    before = [getattr(litgpt.pretrain, name) for name in NAMES] + [litgpt.model.LLaMAMoE, litgpt.model.Block]
    with pytest.raises(KeyError), patched():
        assert litgpt.pretrain.main is print
        assert litgpt.pretrain.capture_hparams() == {"a": 1}
        assert litgpt.model.LLaMAMoE is not before[-2]
        raise KeyError
    after = [getattr(litgpt.pretrain, name) for name in NAMES] + [litgpt.model.LLaMAMoE, litgpt.model.Block]
    assert after == before


def test_the_strategy_is_not_taken_for_fsdp():
    """LitGPT skips the initialisation of weights where it sees its FSDP strategy."""
    with patched():
        strategy = litgpt.pretrain.FSDPStrategy(auto_wrap_policy=set())
        assert isinstance(strategy, DDPStrategy)
        assert not isinstance(strategy, litgpt.pretrain.FSDPStrategy)


def test_a_litgpt_without_the_name_is_named(monkeypatch):
    monkeypatch.delattr(litgpt.pretrain, "choose_logger")
    with pytest.raises(RuntimeError, match=r"choose_logger is missing.*pyproject"), patched():
        pass


def test_a_litgpt_with_another_signature_is_named(monkeypatch):
    monkeypatch.setattr(litgpt.pretrain, "main", lambda fabric, model: None)
    with pytest.raises(RuntimeError, match=r"main takes \(fabric, model\), expected \(fabric, devices"), patched():
        pass
