"""Every head's slice is checked by effect: zeroing it must do what silencing that head by a hook does, in each family."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from remanence.errors import Mistake
from remanence.models import desk_vision
from remanence.models.adapters import add_lora
from remanence.models.forward import evaluating, logits_of
from remanence.models.roles import MLP, ROLES, blocks, head_slice, key_head, part_rows, pick, weights_by_role
from toy import FAMILIES, HEADS, toy_batch, toy_classifier, toy_lm

TIED = {"gpt2", "gemma", "gemma2"}


@pytest.fixture(params=FAMILIES)
def model(request):
    model = toy_lm(request.param, dtype=torch.float64)
    fill = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, and a zero slice would prove nothing
                parameter.normal_(0, 0.1, generator=fill)
    return model


def heads_of(model, part):
    key_heads = getattr(model.config, "num_key_value_heads", None) or HEADS
    return key_heads if part in ("key", "value") else HEADS


def states_of(model, part, layer):
    """Return the weights (matrix and bias) that make a part of attention in a layer."""
    return pick(model, (part, "qkv"), layers=[layer])


def attention_parts(model, layer, batch):
    """Return the queries, keys and values (B, heads, T, d) that a layer's attention really uses, caught where it computes with them.

    Rotary embeddings mix only within a head, and a zero stays zero.
    """
    import torch.nn.functional as functional

    caught, plain = [], functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        caught.append((query, key, value))
        return plain(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, evaluating(model):
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        model.config._attn_implementation = "sdpa"
        if model.config.model_type == "gemma2":  # its soft cap changes the mixing, not what is mixed, and sdpa has none
            for layer_module in model.model.layers:
                patch.setattr(layer_module.self_attn, "attn_logit_softcapping", None)
        logits_of(model, batch)
    assert len(caught) == model.config.num_hidden_layers
    return dict(zip(("query", "key", "value"), caught[layer]))


def test_every_parameter_has_one_role(model):
    weights = weights_by_role(model)
    assert [weight.name for weight in weights] == [name for name, _ in model.named_parameters()]
    assert {weight.role for weight in weights} <= set(ROLES) - {"other", "norm"}


def test_each_layer_has_attention_and_an_mlp(model):
    for layer in (0, 1):
        roles = {weight.role for weight in pick(model, ROLES, layers=[layer], kind="weight")}
        assert {"query", "key", "value"} <= roles or "qkv" in roles
        assert {"output", "down", "attention_norm"} <= roles
        assert roles & set(MLP) - {"down"}
    outside = {weight.role for weight in weights_by_role(model) if weight.layer is None}
    assert {"embedding", "final_norm"} <= outside <= {"embedding", "position", "final_norm", "head"}


def test_a_tied_head_is_reported_once_as_the_embedding(model):
    (embedding,) = pick(model, "embedding")
    heads = pick(model, "head", kind="weight")
    assert embedding.tied == (model.config.model_type in TIED)
    assert len(heads) == (0 if embedding.tied else 1)


def test_axis_is_the_dimension_of_the_outputs(model):
    for weight in weights_by_role(model):
        module, parameter = model.get_submodule(weight.module), model.get_parameter(weight.name)
        if isinstance(module, nn.Linear):
            assert parameter.shape[weight.axis] == module.out_features
        elif weight.role in ("qkv", "output", "up", "down"):  # Conv1D
            assert parameter.shape[weight.axis] == module.nf


@pytest.mark.parametrize("layer", [0, 1])
def test_zeroed_output_slice_is_a_silenced_head(model, layer):
    batch = toy_batch(seed=1)
    (output,) = pick(model, "output", layers=[layer], kind="weight")
    projection = model.get_submodule(output.module)
    size = model.get_parameter(output.name).shape[1 - output.axis] // HEADS
    whole = logits_of(model, batch).detach()
    for head in range(HEADS):

        def silence(module, args, head=head):
            mixed = args[0].clone()  # (B, T, H*d), before the projection
            mixed.unflatten(-1, (HEADS, size))[..., head, :] = 0
            return (mixed,)

        handle = projection.register_forward_pre_hook(silence)
        expected = logits_of(model, batch).detach()
        handle.remove()
        parameter = model.get_parameter(output.name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter[head_slice(model, output, head)] = 0
        got = logits_of(model, batch).detach()
        with torch.no_grad():
            parameter.copy_(kept)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert (got - whole).abs().max() > 1e-4


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("layer", [0, 1])
def test_zeroed_slice_zeroes_that_head_of_that_part_alone(model, part, layer):
    batch = toy_batch(seed=2)
    before = attention_parts(model, layer, batch)
    groups = before[part].shape[1] // heads_of(model, part)  # keys may come repeated, one copy per query head
    for head in range(heads_of(model, part)):
        kept = {}
        with torch.no_grad():
            for weight in states_of(model, part, layer):
                parameter = model.get_parameter(weight.name)
                kept[weight.name] = parameter.detach().clone()
                parameter[head_slice(model, weight, head, part)] = 0
        after = attention_parts(model, layer, batch)
        with torch.no_grad():
            for name, value in kept.items():
                model.get_parameter(name).copy_(value)
        zero = slice(head * groups, (head + 1) * groups)
        assert torch.equal(after[part][:, zero], torch.zeros_like(after[part][:, zero]))
        assert before[part][:, zero].abs().max() > 1e-3
        for other in ("query", "key", "value"):
            rest = torch.ones(before[other].shape[1], dtype=torch.bool)
            if other == part:
                rest[zero] = False
            assert torch.equal(after[other][:, rest], before[other][:, rest])


def test_slices_of_all_heads_and_parts_cover_a_matrix_once(model):
    for weight in pick(model, ("query", "key", "value", "qkv", "output"), kind="weight"):
        count = torch.zeros_like(model.get_parameter(weight.name))
        for part in ("query", "key", "value") if weight.role == "qkv" else (weight.role,):
            for head in range(heads_of(model, part)):
                count[head_slice(model, weight, head, part)] += 1
        assert torch.equal(count, torch.ones_like(count))


def test_parts_of_fused_matrices(model):
    for weight in pick(model, "gate_up"):
        # by effect: without its ups the MLP is silent, and its gates alone cannot be told from them by shape
        outputs = model.get_parameter(weight.name).shape[0]
        assert part_rows(model, weight, "gate").tolist() == list(range(outputs // 2))
        assert part_rows(model, weight, "up").tolist() == list(range(outputs // 2, outputs))
    for weight in pick(model, "qkv", kind="weight"):
        parts = [part_rows(model, weight, part) for part in ("query", "key", "value")]
        assert sorted(torch.cat(parts).tolist()) == list(range(model.get_parameter(weight.name).shape[weight.axis]))
    for weight in pick(model, "query"):
        assert len(part_rows(model, weight, "query")) == model.get_parameter(weight.name).shape[weight.axis]


def test_gates_of_the_fused_matrix_go_through_the_activation():
    model = toy_lm("phi3", dtype=torch.float64)
    (weight,) = pick(model, "gate_up", layers=[0])
    mlp = model.model.layers[0].mlp
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = model.get_parameter(weight.name)
    gate, up = (x @ matrix[part_rows(model, weight, part)].T for part in ("gate", "up"))
    torch.testing.assert_close(mlp(x), mlp.down_proj(torch.nn.functional.silu(gate) * up))


def test_key_heads_follow_the_group():
    model = toy_lm("llama")  # 4 query heads on 2 key heads
    assert [key_head(model, head) for head in range(4)] == [0, 0, 1, 1]
    assert [key_head(toy_lm("gpt2"), head) for head in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_roles_survive_a_low_rank_adapter(family):
    plain = toy_lm(family)
    expected = [(weight.role, weight.layer, weight.heads, weight.axis, weight.kind, weight.tied) for weight in weights_by_role(plain)]
    adapted = add_lora(plain)
    weights = weights_by_role(adapted)
    below = [weight for weight in weights if not weight.lora]
    assert [(weight.role, weight.layer, weight.heads, weight.axis, weight.kind, weight.tied) for weight in below] == expected
    assert {weight.name for weight in weights if weight.lora} == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    one = next(weight for weight in weights if weight.lora == "B" and weight.role in ("query", "qkv"))
    part = adapted.get_parameter(one.name)[head_slice(adapted, one, 1, "query")]
    assert part.shape == (8, 8)  # width of a head x rank


def test_compiled_models_keep_their_roles():
    plain = toy_lm("llama")
    assert [weight.role for weight in weights_by_role(torch.compile(plain))] == [weight.role for weight in weights_by_role(plain)]


def test_pick_narrows_by_layer_role_and_kind():
    model = toy_lm("qwen2")
    assert [weight.name for weight in pick(model, "query", layers=[1], kind="bias")] == ["model.layers.1.self_attn.q_proj.bias"]


@pytest.mark.parametrize("build", [lambda: desk_vision.build("vit-digits"), lambda: desk_vision.build("cnn-digits"), toy_classifier])
def test_classifiers_have_a_head_and_are_not_refused(build):
    model = build()
    weights = weights_by_role(model)
    (head,) = [weight for weight in weights if weight.role == "head" and weight.kind == "weight"]
    assert model.get_parameter(head.name).shape[0] in (10, 4)
    with pytest.raises(Mistake, match="no role is known"):
        weights_by_role(model, strict=True)


def test_unknown_architecture_is_refused_with_its_modules():
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Mistake, match=r"OPTForCausalLM: no role is known for .*layers\.\*\.fc1.*known family"):
        weights_by_role(model)
    assert "other" in {weight.role for weight in weights_by_role(model, strict=False)}


@pytest.mark.parametrize(
    ("role", "head", "part", "words"),
    [
        ("query", 4, None, "there is no query head 4"),
        ("key", 2, None, "heads 0 to 1"),
        ("key", -1, None, "there is no key head -1"),
        ("down", 0, None, "no part 'down' by heads"),
        ("query", 0, "value", "no part 'value'"),
    ],
)
def test_heads_that_do_not_exist_are_refused(role, head, part, words):
    model = toy_lm("llama")
    with pytest.raises(Mistake, match=words):
        head_slice(model, pick(model, role)[0], head, part)


def test_unknown_roles_and_layers_are_refused():
    model = toy_lm("llama")
    with pytest.raises(Mistake, match="did you mean 'query'"):
        pick(model, "querry")
    with pytest.raises(Mistake, match="no layer 2"):
        pick(model, "query", layers=[2])
    neox = toy_lm("gpt_neox")
    with pytest.raises(Mistake, match="not divided among heads"):
        head_slice(neox, pick(neox, "output", kind="bias")[0], 0)


def test_blocks_are_modules_in_order_under_wrappers_too(model):
    names = blocks(model)
    assert len(names) == 2
    assert [int(name.rpartition(".")[2]) for name in names] == [0, 1]
    assert all(type(model.get_submodule(name)) is type(model.get_submodule(names[0])) for name in names)
    adapted = add_lora(model, rank=2)
    assert [adapted.get_submodule(name) for name in blocks(adapted)] == [model.get_submodule(name) for name in names]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(Mistake, match="no blocks are known"):
        blocks(toy_classifier())
