import pytest
import torch
from torch import nn

from remanence.models import desk_vision
from remanence.models.adapters import add_lora
from remanence.models.forward import evaluating, fresh_weights, is_language_model, logits_of, positions, unwrapped, vocabulary
from toy import FAMILIES, toy_batch, toy_classifier, toy_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_and_ignore_labels(family):
    model, batch = toy_lm(family), toy_batch()
    got = logits_of(model, {**batch, "index": torch.arange(3)})
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(got, expected)
    assert got.shape == (3, 9, 64)


def test_wrapped_models_give_the_same_logits():
    plain, batch = toy_lm("llama", layers=1), toy_batch()
    expected = logits_of(plain, batch)
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(logits_of(compiled, batch), expected)
    adapted = add_lora(plain)
    torch.testing.assert_close(logits_of(adapted, batch), expected)
    assert unwrapped(torch.compile(adapted)) is plain


def test_classifiers_get_their_pixels():
    plain, x = toy_classifier(), torch.rand(5, 8)
    assert torch.equal(logits_of(plain, {"pixel_values": x, "labels": torch.zeros(5)}), plain(x))
    desk, images = desk_vision.build("cnn-digits"), torch.rand(5, 8, 8)
    assert torch.equal(logits_of(desk, {"pixel_values": images, "labels": torch.zeros(5)}), desk(images).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_and_their_vocabulary(family):
    model = toy_lm(family, vocab=71)
    assert is_language_model(model)
    assert vocabulary(add_lora(model)) == 71
    assert positions(model) == positions(add_lora(toy_lm(family))) == 128


def test_classifiers_are_no_language_models():
    assert not is_language_model(toy_classifier())
    assert not is_language_model(desk_vision.build("mlp-digits"))
    with pytest.raises(TypeError, match="not a language model"):
        vocabulary(toy_classifier())
    assert positions(toy_classifier()) == 2**31


def test_evaluating_leaves_no_trace():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.rand(3, 4)).requires_grad
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_fresh_weights_depend_on_the_seed_alone():
    random = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        with fresh_weights(seed):
            weights.append(nn.Linear(3, 3).weight)
        torch.rand(seed)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.set_rng_state(random)
    with fresh_weights(3):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), random)
