"""Half precision on a CPU: the same code that autocast and bfloat16 weights run on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import capavision as cv
from tests.conftest import awaken, create, seeded

METHODS = {
    "lora on linears": ("test_vit", cv.LoRA(rank=4, branches=2), None),
    "lora on convs": ("test_resnet", cv.LoRA(rank=4, branches=2), "conv"),
    "adapter": ("test_vit", cv.Adapter(rank=4, branches=2), None),
    "adapter, channels first": ("test_convnext", cv.Adapter(rank=4, branches=2), None),
}


def injected(case, **kwargs):
    name, method, targets = METHODS[case]
    model = awaken(create(name, num_classes=3, **kwargs))  # timm starts some residual branches at zero
    cv.inject(model, method, targets, example=torch.zeros(1, 3, 160, 160))
    for p in cv.parameters(model):
        torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("case", METHODS)
def test_autocast_follows_full_precision_and_gives_every_delta_a_gradient(case):
    model, x = seeded(lambda: (injected(case), torch.randn(2, 3, 160, 160)))
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), torch.tensor([0, 2]))
    loss.backward()
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32, name
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", ["lora on linears", "lora on convs"])
def test_deltas_on_a_bfloat16_base_are_float32_and_fold_into_its_dtype(case):
    name, method, targets = METHODS[case]
    model = create(name, num_classes=3).bfloat16()
    cv.inject(model, method, targets)
    deltas = [p for m in model.modules() if isinstance(m, cv.Delta) for p in m.parameters()]
    assert {p.dtype for p in deltas} == {torch.float32}
    for p in deltas:
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(2, 3, 160, 160, dtype=torch.bfloat16)
    expected = model(x)
    assert expected.dtype == torch.bfloat16
    cv.fold(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model(x).float() - expected.float()).norm() < 0.05 * expected.float().norm()
