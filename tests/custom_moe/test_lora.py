"""LoRA on the experts: LitGPT's own LoRA layer is the oracle for outputs, gradients and keys."""

import litgpt.lora
import pytest
import torch

from custom_moe import use_custom_moe
from custom_moe.litgpt import LoRAExperts, LoRAMoE

LORA = {"lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_value": True}


def both(fields: dict, **lora) -> tuple[litgpt.lora.GPT, litgpt.lora.GPT]:
    """(LitGPT's model, the one with this package's layers), with the same random weights, also those of LoRA."""
    config = litgpt.lora.Config(**{**fields, **LORA, **lora})
    stock = litgpt.lora.GPT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    with use_custom_moe():
        ours = litgpt.lora.GPT(config)
    weights = stock.state_dict()
    ours.load_state_dict({key.replace(".linear.", ".") if ".mlp." in key else key: weights[key] for key in weights})
    return stock, ours


@pytest.mark.parametrize("lora_mlp", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_litgpt(moe_fields: dict, lora_mlp: bool, bias: bool) -> None:
    stock, ours = both({**moe_fields, "bias": bias}, lora_mlp=lora_mlp)
    assert isinstance(ours.transformer.h[0].mlp.experts, LoRAExperts) == lora_mlp
    for model in (stock, ours):
        litgpt.lora.mark_only_lora_as_trainable(model)
    ids = torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(1))
    outputs = [model(ids) for model in (stock, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean().backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    for layer in range(2):
        prefix = f"transformer.h.{layer}.mlp.experts."
        for expert in range(4):
            for name, stacked, part in (("fc_1", "fc", 0), ("fc_2", "fc", 1), ("proj", "proj", None)):
                for which in ("lora_A", "lora_B"):
                    if not lora_mlp:
                        continue
                    rows = found[f"{prefix}{stacked}_{which}"][expert]
                    rows = rows if part is None else rows.chunk(2)[part]
                    found[f"{prefix}{expert}.{name}.{which}"] = rows
    missing = [name for name in expected if name not in found]
    assert not missing
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_zero_update_equals_the_frozen_layer(moe_fields: dict) -> None:
    config = litgpt.lora.Config(**moe_fields, **LORA, lora_mlp=True)
    with use_custom_moe():
        layer = LoRAMoE(config)
        plain = LoRAMoE(litgpt.lora.Config(**moe_fields, lora_r=0, lora_mlp=True))
    weights = {key: value for key, value in layer.state_dict().items() if "lora_" not in key}
    plain.load_state_dict(weights)
    x = torch.randn(2, 8, 32)
    torch.testing.assert_close(layer(x), plain(x))


def test_router_update_is_fp32_under_autocast(moe_fields: dict) -> None:
    """In bf16 it would differ from the update of the merged weights."""
    _, ours = both(moe_fields, lora_mlp=True)
    gate = ours.transformer.h[0].mlp.gate
    with torch.autocast("cpu", torch.bfloat16):
        found = gate.full_weight()
    assert torch.equal(found, gate.weight + gate.scaling * (gate.lora_B @ gate.lora_A))


def test_dropout_applies_in_training_only(moe_fields: dict) -> None:
    _, ours = both(moe_fields, lora_mlp=True, lora_dropout=0.5)
    ids = torch.randint(0, 384, (1, 8))
    ours.train()
    assert not torch.equal(ours(ids), ours(ids))
    ours.eval()
    assert torch.equal(ours(ids), ours(ids))
