import pytest
import torch

from remanence.errors import Mistake
from remanence.models import desk_vision
from remanence.models.adapters import add_lora, merge_lora, without_adapter
from remanence.models.forward import logits_of
from remanence.models.load import weights_hash
from toy import FAMILIES, toy_batch, toy_classifier, toy_lm


def trained(adapted):
    """Give the adapter an effect."""
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_keeps_the_function(family):
    plain, batch = toy_lm(family, dtype=torch.float64), toy_batch()
    before, digest = logits_of(plain, batch).detach(), weights_hash(plain)
    adapted = add_lora(plain, rank=2, alpha=4)
    assert torch.equal(logits_of(adapted, batch), before)
    assert {name.split(".lora_")[1][0] for name, weight in adapted.named_parameters() if weight.requires_grad} == {"A", "B"}
    trained(adapted)
    changed = logits_of(adapted, batch).detach()
    assert (changed - before).abs().max() > 1e-3
    with without_adapter(adapted):
        assert torch.equal(logits_of(adapted, batch), before)
    assert torch.equal(logits_of(adapted, batch), changed)
    merged = merge_lora(adapted)
    assert merged is plain
    torch.testing.assert_close(logits_of(merged, batch), changed)
    assert weights_hash(merged) != digest
    assert all(weight.requires_grad for weight in merged.parameters())


def test_the_adapter_depends_on_its_seed_and_not_on_the_global_generator():
    random = torch.get_rng_state()
    digests = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = torch.get_rng_state()
        digests.append(weights_hash(add_lora(toy_lm("qwen3"), seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(random)
    assert digests[0] == digests[1] != digests[2]


def test_a_is_uniform_within_one_over_the_root_of_the_inputs():
    adapted = add_lora(toy_lm("llama", width=128), rank=16)
    a = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight
    assert a.shape == (16, 128)
    assert 0.95 * 128**-0.5 < a.abs().max() <= 128**-0.5
    torch.testing.assert_close(a.std().item(), (128 * 3) ** -0.5, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", ["query", "value"], {"q_proj", "v_proj"}),
        ("gpt2", ["query"], {"c_attn"}),
        ("phi3", ["gate"], {"gate_up_proj"}),
        ("gpt_neox", ["down"], {"dense_4h_to_h"}),
        ("mistral", ["k_proj", "lm_head"], {"k_proj", "lm_head"}),
    ],
)
def test_targets_are_roles_or_names(family, targets, expected):
    adapted = add_lora(toy_lm(family), targets=targets)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name} == expected


@pytest.mark.parametrize("name", ["mlp-digits", "cnn-digits", "vit-digits"])
def test_classifiers_take_adapters_too(name):
    model = desk_vision.build(name)
    x = {"pixel_values": torch.rand(4, 8, 8)}
    before = logits_of(model, x).detach()
    adapted = add_lora(model, rank=2)
    torch.testing.assert_close(logits_of(adapted, x), before)
    assert (logits_of(trained(adapted), x) - before).abs().max() > 1e-3


def test_switching_off_keeps_what_was_frozen_frozen():
    adapted = add_lora(toy_lm("llama"), rank=2)
    frozen = next(weight for name, weight in adapted.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    flags = [weight.requires_grad for weight in adapted.parameters()]
    with without_adapter(adapted):
        pass
    assert [weight.requires_grad for weight in adapted.parameters()] == flags


def test_a_half_precision_model_keeps_its_adapter_in_full():
    adapted = add_lora(toy_lm("llama", dtype=torch.bfloat16))
    kinds = {weight.dtype for name, weight in adapted.named_parameters() if "lora_" in name}
    assert kinds == {torch.float32}
    assert logits_of(adapted, toy_batch()).isfinite().all()


def test_mistakes_are_named():
    with pytest.raises(Mistake, match="has an adapter already"):
        add_lora(add_lora(toy_lm("llama")))
    with pytest.raises(Mistake, match="'q_prj' is neither a role nor a module of the model; did you mean 'q_proj'"):
        add_lora(toy_lm("llama"), targets=["q_prj"])
    with pytest.raises(Mistake, match="has no matrix for"):
        add_lora(toy_lm("llama"), targets=["position"])
    with pytest.raises(Mistake, match="below 1"):
        add_lora(toy_lm("llama"), rank=0)
    with pytest.raises(Mistake, match="has no adapter"):
        merge_lora(toy_lm("llama"))
    with pytest.raises(Mistake, match="has no adapter"), without_adapter(toy_classifier()):
        pass
