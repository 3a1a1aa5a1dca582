import litgpt.model
import litgpt.pretrain
import pytest
from lightning.fabric.strategies import DDPStrategy

from litmoe.train.patches import patched_pretraining

NAMES = ("main", "choose_logger", "capture_hparams", "pprint", "FSDPStrategy")


def patched():
    return patched_pretraining(main=print, choose_logger=print, strategy=DDPStrategy, summary="a line", router=None)


def test_litgpt_is_restored_after_an_error():
    before = [getattr(litgpt.pretrain, name) for name in NAMES] + [litgpt.model.LLaMAMoE, litgpt.model.Block]
    with pytest.raises(KeyError), patched():
        assert litgpt.pretrain.main is print
        assert litgpt.pretrain.pprint.pformat({"a": 1}) == "a line"
        assert litgpt.model.LLaMAMoE is not before[-2]
        raise KeyError
    after = [getattr(litgpt.pretrain, name) for name in NAMES] + [litgpt.model.LLaMAMoE, litgpt.model.Block]
    assert after == before


def test_strategy_is_no_instance_of_fsdp():
    """LitGPT skips the initialization of weights for its FSDP strategy."""
    with patched():
        strategy = litgpt.pretrain.FSDPStrategy(auto_wrap_policy=set())
        assert isinstance(strategy, DDPStrategy)
        assert not isinstance(strategy, litgpt.pretrain.FSDPStrategy)


def test_missing_name_in_litgpt(monkeypatch):
    monkeypatch.delattr(litgpt.pretrain, "choose_logger")
    with pytest.raises(RuntimeError, match=r"choose_logger is missing.*pyproject"), patched():
        pass


def test_other_signature_in_litgpt(monkeypatch):
    monkeypatch.setattr(litgpt.pretrain, "main", lambda fabric, model: None)
    with pytest.raises(RuntimeError, match=r"main takes \(fabric, model\), expected \(fabric, devices"), patched():
        pass
