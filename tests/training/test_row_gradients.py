"""Squared per-row gradients out of one pass: equal to single backward passes for every known layer, and given up where they would not be."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from remanence.models.desk_vision import build
from remanence.seeds import generator
from remanence.training import fisher
from remanence.training.fisher import diagonal_fisher
from remanence.training.row_gradients import RowGradients, Unsuited
from toy import toy_batch, toy_lm

K = 4


class Named(nn.Module):
    """Layers in a line, called by the name of the batch's column."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, pixel_values):
        return self.body(pixel_values)


class Twice(nn.Module):
    """A layer called twice."""

    def __init__(self):
        super().__init__()
        self.turn, self.head = nn.Linear(5, 5), nn.Linear(5, K)

    def forward(self, pixel_values):
        return self.head(self.turn(self.turn(pixel_values).tanh()))


class Outside(nn.Module):
    """A layer's weight that is also used without the layer: in every row, or in rows that begin with a large number only."""

    def __init__(self, above=None):
        super().__init__()
        self.line, self.above = nn.Linear(5, K), above

    def forward(self, pixel_values):
        out = self.line(pixel_values)
        if self.above is not None and not (pixel_values[:, 0] > self.above).any():
            return out
        return out + F.linear(pixel_values.sin(), self.line.weight)


class Touching(nn.Module):
    """Rows that see each other, as batch statistics would make them."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(5, K)

    def forward(self, pixel_values):
        out = self.line(pixel_values)
        return out - 0.5 * out.mean(0)


class Free(nn.Module):
    """A parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.line, self.shift = nn.Linear(5, K), nn.Parameter(torch.zeros(K))

    def forward(self, pixel_values):
        return self.line(pixel_values) + self.shift


class Folded(nn.Module):
    """Rows and places in one dimension."""

    def __init__(self):
        super().__init__()
        self.line, self.head = nn.Linear(5, 6), nn.Linear(6, K)

    def forward(self, pixel_values):
        return self.head(self.line(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2]).sum(1))


class InPlace(nn.Module):
    """An input that is changed after its layer saw it (its own weight is frozen, so that nothing else would notice)."""

    def __init__(self):
        super().__init__()
        self.line, self.head = nn.Linear(5, 6), nn.Linear(6, K, bias=True)

    def forward(self, pixel_values):
        pixel_values = pixel_values.clone()
        out = self.line(pixel_values)
        pixel_values.zero_()
        return self.head(out)


def words():
    return Named(nn.Embedding(7, 6, padding_idx=0), nn.RMSNorm(6), nn.Linear(6, 5, bias=False), nn.Flatten(), nn.Linear(5 * 4, K))


SUITED = {
    "perceptron": ((5,), lambda: Named(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, K))),
    "perceptron over places": ((3, 5), lambda: Named(nn.Linear(5, 6), nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, K))),
    "planes": ((2, 3, 5), lambda: Named(nn.Linear(5, 6), nn.LayerNorm((3, 6)), nn.Flatten(), nn.Linear(36, K))),
    "convolutions": (
        (2, 7, 6),
        lambda: Named(
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, (1, 2), groups=2, dilation=(1, 2)), nn.GroupNorm(3, 6), nn.Tanh(), nn.Conv2d(6, 4, (4, 2)), nn.Flatten(), nn.Linear(4, K),
        ),
    ),
    "grouped strides": ((4, 5, 5), lambda: Named(nn.Conv2d(4, 8, 3, stride=2, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(32, K))),
    "one layer, twice": ((5,), Twice),
    "words": (None, words),
}  # fmt: skip
UNSUITED = {"outside": Outside, "touching": Touching, "free": Free}


def seeded(make):
    """Build a double-precision model with statistics and scales of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = make().double().eval()
    draw = generator("norms")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(generator=draw)
            layer.running_var.uniform_(0.5, 2, generator=draw)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            layer.weight.data.normal_(generator=draw)
    return model


def batch_of(shape, rows, seed=0):
    draw = generator("rows", seed)
    values = (
        torch.randint(0, 7, (rows, 4), generator=draw) if shape is None else torch.randn(rows, *shape, dtype=torch.float64, generator=draw)
    )
    return {"pixel_values": values, "labels": torch.randint(0, K, (rows,), generator=draw)}


def row_losses(model, batch):
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"], reduction="none")


def brute(model, batch):
    """Sum squared gradients over rows, one backward pass each."""
    leaves = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for number in range(len(batch["labels"])):
        row = {name: value[number : number + 1] for name, value in batch.items()}
        for name, slope in zip(leaves, torch.autograd.grad(row_losses(model, row).sum(), list(leaves.values()))):
            total[name] += slope.square()
    return total


def agree(found, expected, tolerance):
    assert list(found) == list(expected)
    assert max(value.max() for value in expected.values()) > 1e-8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 1e-2, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def quick_only(monkeypatch):
    """Let nothing but the quick way do the work, its check apart."""

    def refuse(*_):
        raise AssertionError("vmap was used")

    monkeypatch.setattr(fisher, "squared_by_row", refuse)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("case", SUITED)
def test_squares_of_known_layers_equal_single_backward_passes(case, rows):
    shape, make = SUITED[case]
    model, batch = seeded(make), batch_of(shape, rows)
    chosen = dict(model.named_parameters())
    found = RowGradients(model, chosen).squares(lambda: row_losses(model, batch), rows)
    agree(found, brute(model, batch), 1e-9)
    assert all(leaf.grad is None for leaf in chosen.values())
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("case", SUITED)
def test_norms_of_known_layers_equal_single_backward_passes(case, rows, monkeypatch):
    shape, make = SUITED[case]
    model, batch = seeded(make), batch_of(shape, rows)
    for room in (2**21, 2 * 8 * 72):
        monkeypatch.setattr("remanence.training.row_gradients.CACHE_BYTES", room)
        found = RowGradients(model, dict(model.named_parameters())).norms(lambda: row_losses(model, batch), rows)
        for number in range(rows):
            row = {name: value[number : number + 1] for name, value in batch.items()}
            expected = sum(square.sum() for square in brute(model, row).values()).sqrt()
            torch.testing.assert_close(found[number], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["perceptron", "convolutions", "words"])
def test_rows_in_small_lots_give_the_same_squares(case, monkeypatch):
    shape, make = SUITED[case]
    model, batch = seeded(make), batch_of(shape, 5)
    monkeypatch.setattr("remanence.training.row_gradients.CACHE_BYTES", 2 * 8 * 72)
    found = RowGradients(model, dict(model.named_parameters())).squares(lambda: row_losses(model, batch), 5)
    agree(found, brute(model, batch), 1e-9)


def test_frozen_parameters_are_left_out():
    shape, make = SUITED["convolutions"]
    model, batch = seeded(make), batch_of(shape, 3)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name.endswith("weight") and "body.1" not in name)
    chosen = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    agree(RowGradients(model, chosen).squares(lambda: row_losses(model, batch), 3), brute(model, batch), 1e-9)


@pytest.mark.parametrize("name", ["cnn-digits", "mlp-digits"])
def test_desk_nets_take_the_quick_way(name, quick_only):
    model, draw = build(name).double(), generator("images")
    batch = {
        "pixel_values": torch.rand(9, 8, 8, dtype=torch.float64, generator=draw),
        "labels": torch.randint(10, (9,), generator=draw),
    }
    agree(diagonal_fisher(model, [batch]), diagonal_fisher(model, [batch], chunk=1), 1e-9)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (2, 2), (5, 9), (3, 1 + 7)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3", "gpt_neox"])
def test_language_models_take_the_quick_way(family, tied, rows, tokens, quick_only):
    if family == "gpt2" and not tied:
        pytest.skip("GPT-2's head is tied")
    model = toy_lm(family, layers=1, width=16, vocab=32, dtype=torch.float64 if family == "gpt2" else torch.float32)
    if tied:
        model.lm_head = model.get_output_embeddings() if family == "gpt2" else nn.Linear(16, 32, bias=False)
        model.set_output_embeddings(model.lm_head)
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = toy_batch(rows=rows, tokens=tokens, vocab=32)
    batch["labels"][:, : tokens // 2] = -100
    for chunk in (None, 2):
        found = diagonal_fisher(model, [batch], chunk=chunk)
        agree(found, diagonal_fisher(model, [batch], chunk=1), 1e-9 if family == "gpt2" else 1e-4)


def test_adapters_take_the_quick_way(quick_only):
    model = get_peft_model(toy_lm("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).double()
    batch = toy_batch(rows=5)
    found = diagonal_fisher(model, [batch])
    assert all("lora" in name for name in found)
    agree(found, diagonal_fisher(model, [batch], chunk=1), 1e-4)


def test_gemma_falls_back_for_its_scaled_embedding_and_agrees():
    model, batch = toy_lm("gemma", layers=1), toy_batch(rows=3)
    agree(diagonal_fisher(model, [batch]), diagonal_fisher(model, [batch], chunk=1), 1e-4)


def test_half_precision_is_near_full_precision(quick_only):
    batch = toy_batch(rows=5)
    found, exact = (diagonal_fisher(toy_lm("llama", dtype=kind), [batch]) for kind in (torch.bfloat16, torch.float32))
    assert found.trace == pytest.approx(exact.trace, rel=0.1)


@pytest.mark.parametrize("case", UNSUITED)
def test_unsuited_models_fall_back_and_agree(case):
    model = seeded(UNSUITED[case])
    data = [batch_of((5,), rows, seed) for seed, rows in enumerate((1, 4, 3))]  # the first batch alone cannot show that rows touch
    agree(diagonal_fisher(model, data), diagonal_fisher(model, data, chunk=1), 1e-9)


def test_a_model_that_becomes_unsuited_later_falls_back_there():
    model, data = seeded(lambda: Outside(above=1e3)), [batch_of((5,), 3, seed) for seed in range(3)]
    data[1]["pixel_values"][:, 0] = 2e3
    chosen = dict(model.named_parameters())
    RowGradients(model, chosen).squares(lambda: row_losses(model, data[0]), 3)
    with pytest.raises(Unsuited, match="outside its layer"):
        RowGradients(model, chosen).squares(lambda: row_losses(model, data[1]), 3)
    with pytest.warns(UserWarning, match="row by row"):  # it branches on data, which vmap cannot
        found = diagonal_fisher(model, data)
    agree(found, diagonal_fisher(model, data, chunk=1), 1e-9)


@pytest.mark.parametrize(("make", "shape", "reason"), [(Folded, (3, 5), "rows first"), (InPlace, (5,), "in place")])
def test_what_does_not_follow_from_layers_is_refused(make, shape, reason):
    model, batch = seeded(make), batch_of(shape, 4)
    with pytest.raises(Unsuited, match=reason):
        RowGradients(model, dict(model.named_parameters())).squares(lambda: row_losses(model, batch), 4)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_layer_with_a_hook_is_refused():
    model, batch = seeded(SUITED["perceptron"][1]), batch_of((5,), 4)
    model.body[0].register_forward_hook(lambda layer, given, out: 2 * out)
    with pytest.raises(Unsuited, match="hook"):
        RowGradients(model, dict(model.named_parameters())).squares(lambda: row_losses(model, batch), 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_gives_the_same_squares():
    model, batch = seeded(SUITED["convolutions"][1]), batch_of((2, 7, 6), 5)
    expected = brute(model, batch)
    model, batch = model.cuda(), {name: value.cuda() for name, value in batch.items()}
    found = RowGradients(model, dict(model.named_parameters())).squares(lambda: row_losses(model, batch), 5)
    agree({name: value.cpu() for name, value in found.items()}, expected, 1e-9)
