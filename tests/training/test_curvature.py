"""Hessian-vector products equal finite differences and the whole Hessian; a layer without a second derivative is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from remanence.errors import Mistake
from remanence.models.adapters import add_lora
from remanence.training.batches import Batch, Batches
from remanence.training.curvature import directional, refuse_once_differentiable, slopes
from remanence.training.losses import nll
from remanence.training.trainer import Trainer
from toy import toy_batch, toy_classifier, toy_lm

DRAW = torch.Generator().manual_seed(0)
ROWS = {"pixel_values": torch.randn(9, 8, generator=DRAW, dtype=torch.float64), "labels": torch.randint(4, (9,), generator=DRAW)}


class Square(torch.autograd.Function):
    """A square whose gradient has none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


def vector_of(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(weight.shape, generator=draw, dtype=weight.dtype) for name, weight in model.named_parameters()}


def test_the_gradient_of_a_directional_loss_is_the_hessian_times_the_vector() -> None:
    model = toy_classifier(width=5).double()
    vector = vector_of(model)
    names, weights = zip(*model.named_parameters())
    flat = torch.cat([weight.detach().flatten() for weight in weights])

    def loss(flat: Tensor) -> Tensor:
        parts = {
            name: part.view_as(weight) for name, part, weight in zip(names, flat.split([weight.numel() for weight in weights]), weights)
        }
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, ROWS["pixel_values"]), ROWS["labels"], reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = hessian @ torch.cat([vector[name].flatten() for name in names])
    for size in (2, 9):
        found = Trainer().summed_gradient(model, Batches(ROWS, size), directional(nll, vector))
        torch.testing.assert_close(torch.cat([found[name].flatten() for name in names]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "far", "close"), [("gpt2", 1e-5, 1e-6), ("llama", 3e-4, 1e-2), ("qwen2", 3e-4, 1e-2)])
def test_it_is_the_derivative_of_the_gradient_through_attention(family: str, far: float, close: float) -> None:
    """The norms of Llama and Qwen compute in fp32 whatever the weights are."""
    model, batch = toy_lm(family, layers=1, width=16, dtype=torch.float64), Batch(toy_batch())
    vector = vector_of(model)
    value = directional(nll, vector)(model, batch)
    found = torch.autograd.grad(value, list(model.parameters()))
    ends = []
    for step in (far, -far):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight += step * vector[name]
        ends.append(torch.autograd.grad(nll(model, batch), list(model.parameters())))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight -= step * vector[name]
    differences = [(plus - minus) / (2 * far) for plus, minus in zip(*ends)]
    gap = sum((one - other).square().sum() for one, other in zip(found, differences)).sqrt()
    assert gap < close * sum(one.square().sum() for one in found).sqrt()


def test_frozen_parameters_have_no_slope() -> None:
    model = add_lora(toy_lm("llama"), rank=2)
    value, found = slopes(nll, model, Batch(toy_batch()))
    assert value.requires_grad
    assert found
    assert all("lora_" in name for name in found)


def test_a_layer_that_cannot_be_differentiated_twice_is_named() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Tanh(), Once()), nn.Linear(6, 4)).double().train()
    state = torch.get_rng_state()
    with pytest.raises(Mistake, match=r"gr: the layer '1\.1' cannot be differentiated twice.*; take another"):
        refuse_once_differentiable("gr", model, nll, Batch(ROWS), "take another")
    assert model.training
    assert not any(layer._forward_hooks for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    refuse_once_differentiable("gr", toy_classifier().double(), nll, Batch(ROWS), "take another")
    refuse_once_differentiable("gr", nn.Linear(8, 4).double(), nll, Batch(ROWS), "take another")
