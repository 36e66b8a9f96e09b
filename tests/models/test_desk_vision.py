import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

from remanence.errors import Mistake
from remanence.models import desk_vision
from remanence.models.desk_vision import NAMES, as_images, build
from remanence.models.load import weights_hash


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_of_input_gives_the_same_logits(name):
    model = build(name, 1)
    size = model.config.image_size
    x = torch.rand(5, size, size)
    expected = model(x).logits
    assert expected.shape == (5, 10)
    assert torch.equal(model(x[:, None]).logits, expected)
    assert torch.equal(model(x.flatten(1)).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_mean_cross_entropy_and_reaches_every_weight(name):
    model = build(name)
    x, labels = torch.rand(6, model.config.image_size, model.config.image_size), torch.arange(6)
    out = model(x, labels=labels)
    assert torch.equal(out.loss, functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name):
    random = torch.get_rng_state()
    assert weights_hash(build(name, 0)) == weights_hash(build(f"desk:{name}", 0)) != weights_hash(build(name, 1))
    assert torch.equal(torch.get_rng_state(), random)


def test_the_convolutional_net_halves_the_image_three_times():
    model = build("cnn-mnist").train()
    assert [(layer.in_channels, layer.out_channels, layer.stride) for layer in model.modules() if isinstance(layer, nn.Conv2d)] == [
        (1, 16, (2, 2)),
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 3
    assert model.body(torch.rand(2, 1, 28, 28)).shape == (2, 64, 4, 4)


def test_the_transformer_knows_where_a_patch_is_and_attends():
    model = build("vit-digits").double()
    x = torch.rand(1, 8, 8, dtype=torch.float64)
    shifted = x.roll((2, 2), (1, 2))  # the same patches at other places
    assert (model(x).logits - model(shifted).logits).abs().max() > 1e-6
    with torch.no_grad():
        model.positions.zero_()
    torch.testing.assert_close(model(x).logits, model(shifted).logits)


@pytest.mark.parametrize("name", ["mlp-digits", "cnn-digits", "vit-digits"])
def test_a_desk_model_learns_digits_far_above_chance(name):
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = build(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.randint(0, 1400, (150, 64), generator=torch.Generator().manual_seed(0))
    for rows in order:
        optimizer.zero_grad()
        model(x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
    model.eval()
    assert (model(x[1400:]).logits.argmax(-1) == y[1400:]).float().mean() > 0.5


def test_settings_reach_the_model():
    model = build("mlp-digits", classes=3, hidden=[7])
    assert [tuple(weight.shape) for weight in model.parameters()] == [(7, 64), (7,), (3, 7), (3,)]
    assert build("cnn-digits", channels=3, image_size=16)(torch.rand(2, 3, 16, 16)).logits.shape == (2, 10)


def test_mistakes_are_named():
    with pytest.raises(Mistake, match="did you mean 'mlp-digits'"):
        build("mlp-digit")
    with pytest.raises(Mistake, match="unknown field 'hiden'; did you mean 'hidden'"):
        build("mlp-digits", hiden=[3])
    with pytest.raises(Mistake, match=r"an image is 28 x 28, the model takes 1 x 8 x 8"):
        build("mlp-digits")(torch.rand(2, 28, 28))
    with pytest.raises(Mistake, match="must divide"):
        build("vit-digits", patch=3)
    assert as_images(torch.arange(8.0).reshape(2, 4), 1, 2)[1, 0].tolist() == [[4, 5], [6, 7]]


def test_importing_registers_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(AutoConfig, "register", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(AutoModelForImageClassification, "register", lambda *args, **kwargs: calls.append(args))
    names = runpy.run_path(desk_vision.__file__)
    assert calls == []
    names["register"]()
    assert len(calls) == 6
