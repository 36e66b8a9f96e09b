import pytest
import torch

from remanence.errors import Mistake
from remanence.models.forward import logits_of
from remanence.models.taps import output_of, tap
from toy import toy_batch, toy_lm


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_are_the_hidden_states():
    model, batch = toy_lm("llama"), toy_batch()
    with tap(model, ["model.layers.0", "model.norm"]) as seen:
        logits = logits_of(model, batch)
        logits_of(model, batch)
    states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    assert len(seen["model.layers.0"]) == 2
    assert torch.equal(seen["model.layers.0"][0], states[1])
    assert torch.equal(seen["model.norm"][0] @ model.lm_head.weight.T, logits)
    assert not seen["model.norm"][0].requires_grad


def test_inputs_by_position_or_keyword_are_seen():
    model, batch = toy_lm("llama"), toy_batch()
    names = ["model.layers.1", "model.layers.1.self_attn", "lm_head"]  # attention gets its states by keyword
    with (
        tap(model, names, side="input") as inputs,
        tap(model, ["model.layers.0", "model.layers.1.input_layernorm", "model.norm"]) as outputs,
    ):
        logits_of(model, batch)
    assert torch.equal(inputs["model.layers.1"][0], outputs["model.layers.0"][0])
    assert torch.equal(inputs["model.layers.1.self_attn"][0], outputs["model.layers.1.input_layernorm"][0])
    assert torch.equal(inputs["lm_head"][0], outputs["model.norm"][0])


def test_gradients_flow_through_a_tap_that_does_not_detach():
    model, batch = toy_lm("gpt2"), toy_batch()
    with tap(model, ["transformer.h.0"], detach=False) as seen:
        logits_of(model, batch)
    seen["transformer.h.0"][0].sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert model.transformer.h[1].mlp.c_fc.weight.grad is None


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = toy_lm("gpt2")
    before = hooks(model)
    with pytest.raises(KeyError), tap(model, ["transformer.h.0", "transformer.h.1"]):
        assert hooks(model) == before + 2
        raise KeyError
    assert hooks(model) == before


def test_unknown_modules_and_sides_are_refused():
    model = toy_lm("llama")
    with pytest.raises(Mistake, match=r"no module 'model.layer.0'; did you mean 'model.layers.0'"), tap(model, ["model.layer.0"]):
        pass
    with pytest.raises(Mistake, match="sides are input and output"), tap(model, ["model"], side="left"):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize(("family", "block", "above"), [("llama", "model.layers.0", "model.layers.1"), ("gpt2", "transformer.h.1", None)])
def test_a_pass_that_ends_early_gives_the_same_states_and_gradients(family, block, above):
    model, batch = toy_lm(family), toy_batch()
    with tap(model, [block], detach=False) as seen:
        logits_of(model, batch)
    whole = seen[block][0]
    part = output_of(model, batch, block, before=above)
    assert torch.equal(part, whole)
    weight = next(parameter for name, parameter in model.named_parameters() if name.startswith(block))
    one, other = (torch.autograd.grad(states.square().sum(), weight)[0] for states in (part, whole))
    assert torch.equal(one, other)
    assert hooks(model) == 0
    with pytest.raises(Mistake, match="no module 'model.layer.1'"):
        output_of(model, batch, block, before="model.layer.1")
