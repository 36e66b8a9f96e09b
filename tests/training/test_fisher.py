"""Fisher information: every definition against a brute-force loop, closed forms, and a model that stays as it was."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from remanence.errors import Mistake
from remanence.seeds import generator
from remanence.training.fisher import DEFINITIONS, diagonal_fisher, load_fisher, save_fisher

pytestmark = pytest.mark.filterwarnings("error:this model cannot be vectorised")
K, V = 4, 7


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, K))

    def forward(self, pixel_values):
        return self.body(pixel_values)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, K))

    def forward(self, pixel_values):
        return self.body(pixel_values)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1))


def qwen2():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            use_sliding_window=True, sliding_window=2, max_window_layers=1, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def seeded(make):
    """Build a double-precision model whose weights come from a generator of the test's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = make().double()
    draw = generator("bn")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0, 0.4, generator=draw)  # sharp enough for classes to differ
    return model


def class_batches(shape, sizes=(3, 2), seed=0):
    draw = generator("classes", seed)
    return [
        {
            "pixel_values": torch.randn(size, *shape, dtype=torch.float64, generator=draw),
            "labels": torch.randint(0, K, (size,), generator=draw),
        }
        for size in sizes
    ]


def token_batches(sizes=(3, 2), length=6, seed=0):
    """Rows of differing lengths with unsupervised beginnings."""
    draw = generator("tokens", seed)
    batches = []
    for size in sizes:
        ids = torch.randint(2, V, (size, length), generator=draw)
        lengths = torch.randint(4, length + 1, (size,), generator=draw)
        mask = (torch.arange(length) < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


CASES = {
    "mlp": (Mlp, lambda: class_batches((5,))),
    "conv": (Conv, lambda: class_batches((1, 6, 6))),
    "llama": (llama, token_batches),
    "gpt2": (gpt2, token_batches),
    "qwen2": (qwen2, token_batches),
}
FP32_INSIDE = 1e-6  # transformers' eager softmax and RMSNorm run in fp32 whatever the model's precision


def tolerance(case, chunk):
    """How closely two ways can agree: GPT-2 has no RMSNorm, and its softmax is in full precision where rows go one by one."""
    return FP32_INSIDE if case in ("llama", "qwen2") or (case == "gpt2" and chunk != 1) else 1e-10


def one_row(batch, number):
    """A row alone, cut to its own length: padding is not even there."""
    row = {name: value[number : number + 1] for name, value in batch.items()}
    if "attention_mask" in row:
        row = {name: value[:, : int(row["attention_mask"].sum())] for name, value in row.items()}
    return row


def predictions(model, row):
    """Log-probabilities and labels at the supervised positions of a single row, written out by hand."""
    out = model(**{name: value for name, value in row.items() if name != "labels"})
    if isinstance(out, torch.Tensor):
        return out.log_softmax(-1), row["labels"], out
    supervised = [t for t in range(row["labels"].shape[1] - 1) if row["labels"][0, t + 1] != -100]
    return out.logits[0, supervised].log_softmax(-1), row["labels"][0, [t + 1 for t in supervised]], out.logits[0]


def slopes(model, value):
    leaves = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in zip(leaves.items(), found)}


def brute(model, batches, definition, row="mean"):
    """Loop over rows, positions and classes with plain backward passes."""
    model.eval()
    total = {name: torch.zeros_like(leaf) for name, leaf in model.named_parameters()}
    count = 0
    for batch in batches:
        values = []
        for number in range(len(batch["labels"])):
            logp, labels, logits = predictions(model, one_row(batch, number))
            if definition == "label_free":
                values.append(logits.square().sum() / (len(logits) if row == "mean" else 1))
                continue
            scale = 1 / len(labels) if row == "mean" else 1
            values.append(-sum(logp[q, label] for q, label in enumerate(labels)) * scale)
            if definition == "exact":
                for q, k in itertools.product(range(len(labels)), range(logp.shape[-1])):
                    for name, slope in slopes(model, logp[q, k]).items():
                        total[name] += logp[q, k].exp().detach() * slope**2 * scale**2
            if definition == "empirical":
                for name, slope in slopes(model, values[-1]).items():
                    total[name] += slope**2
        if definition in ("batched", "label_free"):
            for name, slope in slopes(model, sum(values) / len(values)).items():
                total[name] += slope**2 if definition == "batched" else slope.abs()
        count += 1 if definition in ("batched", "label_free") else len(batch["labels"])
    return {name: value / count for name, value in total.items()}


def agree(found, expected, tolerance=1e-10):
    assert list(found) == list(expected)
    assert sum(value.abs().sum() for value in expected.values()) > 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


MATRIX = [
    *itertools.product(CASES, ["exact", "empirical"], ["mean"], [None, 1]),
    *itertools.product(["mlp", "llama"], ["exact", "empirical"], ["sum"], [None, 1, 2]),
    *itertools.product(CASES, ["batched", "label_free"], ["mean"], [None]),
    *itertools.product(["gpt2"], ["batched", "label_free"], ["sum"], [None]),
]


@pytest.mark.parametrize(("case", "definition", "row", "chunk"), MATRIX)
def test_each_definition_equals_the_loop_over_rows(case, definition, row, chunk):
    make, batches = CASES[case]
    model = seeded(make)
    found = diagonal_fisher(model, batches(), definition=definition, row=row, chunk=chunk)
    agree(found, brute(model, batches(), definition, row), tolerance(case, chunk))


@pytest.mark.parametrize("row", ["mean", "sum"])
def test_exact_is_the_expectation_of_sampled_over_all_label_sequences(row):
    model = seeded(gpt2)
    batch = token_batches(sizes=(1,), length=4)[0]
    batch["labels"][0] = torch.tensor([-100, -100, 0, 0])
    batch["attention_mask"][:] = 1
    expected = None
    logp, labels, _ = predictions(model.eval(), batch)
    for sequence in itertools.product(range(V), repeat=len(labels)):
        labelled = {**batch, "labels": batch["labels"].clone()}
        labelled["labels"][0, 2:] = torch.tensor(sequence)
        odds = sum(logp[q, k] for q, k in enumerate(sequence)).exp().item()
        one = diagonal_fisher(model, [labelled], definition="empirical", row=row, chunk=1)
        expected = {name: odds * value + (0 if expected is None else expected[name]) for name, value in one.items()}
    agree(diagonal_fisher(model, [batch], definition="exact", row=row, chunk=1), expected)


def rung(odds, height):
    """The class on whose step of the cumulative distribution a height falls."""
    below, label = 0.0, 0
    while below + odds[label].item() <= height.item():
        below += odds[label].item()
        label += 1
    return label


@pytest.mark.parametrize("case", ["mlp", "gpt2"])
def test_sampled_is_empirical_on_the_labels_that_the_generator_draws(case):
    make, batches = CASES[case]
    model, data = seeded(make).eval(), batches()
    draw, drawn = generator("draw"), []
    for batch in data:
        labelled = {**batch, "labels": batch["labels"].clone()}
        out = model(**{name: value for name, value in batch.items() if name != "labels"})
        if case == "mlp":
            heights = torch.rand(len(out), 1, dtype=torch.float64, generator=draw)
            labelled["labels"] = torch.tensor([rung(odds, height) for odds, (height,) in zip(out.softmax(-1), heights)])
        else:
            places = [[t for t in range(5) if row[t + 1] != -100] for row in batch["labels"]]
            heights = torch.rand(len(places), max(map(len, places)), dtype=torch.float64, generator=draw)
            for number, place in enumerate(places):
                for q, t in enumerate(place):
                    labelled["labels"][number, t + 1] = rung(out.logits[number, t].softmax(-1), heights[number, q])
        drawn.append(labelled)
    found = diagonal_fisher(model, data, definition="sampled", generator=generator("draw"))
    agree(found, diagonal_fisher(model, drawn, definition="empirical"))


@pytest.mark.parametrize("case", ["conv", "llama"])
def test_sampled_does_not_depend_on_the_chunk(case):
    make, batches = CASES[case]
    one, other = (
        diagonal_fisher(seeded(make), batches(), definition="sampled", generator=generator("draw"), chunk=chunk) for chunk in (1, 2)
    )
    agree(one, other, tolerance(case, None))


def test_average_of_sampled_tends_to_exact():
    model, batch = seeded(Mlp), class_batches((5,), (2,))[0]
    many = {name: value.repeat_interleave(20_000, 0) for name, value in batch.items()}
    found = diagonal_fisher(model, [many], definition="sampled", generator=generator("many"), chunk=40_000)
    expected = diagonal_fisher(model, [batch], definition="exact")
    assert found.trace == pytest.approx(expected.trace, rel=0.03)


def test_logistic_regression_has_its_closed_form():
    """F of weight (k, d) is the mean of p_k (1 - p_k) x_d^2; of the bias, of p_k (1 - p_k)."""

    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(5, K)

        def forward(self, pixel_values):
            return self.line(pixel_values)

    model, (batch,) = seeded(Logistic), class_batches((5,), (6,))
    odds = model(batch["pixel_values"]).softmax(-1).detach()
    spread = odds * (1 - odds)
    expected = {"line.weight": (spread[:, :, None] * batch["pixel_values"][:, None].square()).mean(0), "line.bias": spread.mean(0)}
    agree(diagonal_fisher(model, [batch], definition="exact"), expected, 1e-12)


@pytest.mark.parametrize("case", ["mlp", "conv", "gpt2"])
def test_empirical_equals_batched_at_batch_size_one(case):
    make, batches = CASES[case]
    model = seeded(make)
    singles = [
        {name: value[number : number + 1] for name, value in batch.items()} for batch in batches() for number in range(len(batch["labels"]))
    ]
    agree(diagonal_fisher(model, singles, definition="batched"), diagonal_fisher(model, batches(), definition="empirical", chunk=1))


@pytest.mark.parametrize("definition", ["exact", "empirical", "batched", "label_free"])
def test_padding_does_not_matter(definition):
    model = seeded(gpt2)
    batches = token_batches()
    longer = [
        {
            name: torch.cat([value, torch.full((len(value), 3), {"labels": -100, "input_ids": 5}.get(name, 0))], 1)
            for name, value in batch.items()
        }
        for batch in batches
    ]
    agree(diagonal_fisher(model, longer, definition=definition), diagonal_fisher(model, batches, definition=definition))


@pytest.mark.parametrize("definition", ["exact", "empirical", "batched"])
def test_rows_without_labels_are_not_counted(definition):
    model, (batch,) = seeded(llama), token_batches((3,))
    more = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    more["labels"][3] = -100
    found, expected = diagonal_fisher(model, [more], definition=definition), diagonal_fisher(model, [batch], definition=definition)
    agree(found, expected)
    assert found.count == expected.count


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_model_and_the_generators_stay_as_they_were(case, definition):
    make, batches = CASES[case]
    model = seeded(make).train()
    next(model.children()).eval()
    for number, leaf in enumerate(model.parameters()):
        leaf.grad = torch.full_like(leaf, float(number))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = None if case in ("mlp", "conv") else (model.config._attn_implementation, model.config.use_cache)
    random = torch.get_rng_state()
    diagonal_fisher(model, batches(), definition=definition, generator=generator("labels"))
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((leaf.grad == number).all() for number, leaf in enumerate(model.parameters()))
    assert all(leaf.requires_grad for leaf in model.parameters())
    assert config is None or config == (model.config._attn_implementation, model.config.use_cache)


def test_the_model_is_restored_after_a_failure():
    model = seeded(llama).train()
    with pytest.raises(IndexError):
        diagonal_fisher(model, [{**token_batches()[0], "input_ids": torch.full((3, 6), V + 3)}], chunk=1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


@given(chunk=st.integers(1, 9), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_chunks_and_batches_do_not_change_the_mean_over_rows(chunk, sizes):
    model, (whole,) = seeded(Mlp), class_batches((5,), (sum(sizes),))
    parts = [dict(zip(whole, columns)) for columns in zip(*(value.split(sizes) for value in whole.values()))]
    for definition in ("empirical", "exact"):
        agree(diagonal_fisher(model, parts, definition=definition, chunk=chunk), diagonal_fisher(model, [whole], definition=definition))


def test_two_processes_sum_to_one():
    model, batches = seeded(Mlp), class_batches((5,), (3, 2))
    halves = [diagonal_fisher(model, [batch], reduce="sum") for batch in batches]
    other = iter([torch.tensor(halves[1].count), *halves[1].values()])
    both = diagonal_fisher(model, batches[:1], reduce_sum=lambda tensor: tensor + next(other))
    whole = diagonal_fisher(model, batches)
    agree(both, whole)
    assert both.count == whole.count == 5


def test_tied_weights_are_counted_once_under_any_of_their_names():
    model = seeded(gpt2)
    whole = diagonal_fisher(model, token_batches())
    assert "lm_head.weight" not in whole
    one = diagonal_fisher(model, token_batches(), parameters=["lm_head.weight", "transformer.wte.weight"])
    agree(one, {"transformer.wte.weight": whole["transformer.wte.weight"]})


def test_frozen_parameters_are_skipped_and_reported():
    model = seeded(Mlp)
    whole = diagonal_fisher(model, class_batches((5,)))
    model.body[0].weight.requires_grad_(False)
    found = diagonal_fisher(model, class_batches((5,)))
    assert found.frozen == ("body.0.weight",)
    agree(found, {name: value for name, value in whole.items() if name != "body.0.weight"})


def test_half_precision_is_accumulated_in_fp32():
    model = seeded(llama)
    exact = diagonal_fisher(model, token_batches())
    found = diagonal_fisher(model.bfloat16(), token_batches())
    assert all(value.dtype == torch.float32 for value in found.values())
    assert found.trace == pytest.approx(exact.trace, rel=0.1)


def test_a_model_that_cannot_be_vectorised_goes_row_by_row():
    class Branching(Mlp):
        def forward(self, pixel_values):
            return self.body(pixel_values if pixel_values.sum() > 0 else pixel_values * 2)  # the branch depends on the data

    model, batches = seeded(Branching), class_batches((5,))
    with pytest.warns(UserWarning, match="row by row"):
        found = diagonal_fisher(model, batches)
    agree(found, brute(model, batches, "empirical"))


def test_label_free_needs_no_labels():
    model, batches = seeded(llama), token_batches()
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    agree(diagonal_fisher(model, bare, definition="label_free"), diagonal_fisher(model, batches, definition="label_free"))


def test_a_saved_fisher_comes_back_with_how_it_was_made(tmp_path):
    model = seeded(Mlp)
    model.body[0].bias.requires_grad_(False)
    fisher = diagonal_fisher(model, class_batches((5,)), definition="exact", row="sum")
    save_fisher(tmp_path / "fisher.safetensors", fisher, digest="data", model=model)
    back = load_fisher(tmp_path / "fisher.safetensors", definition="exact", digest="data", model=model)
    assert all(torch.equal(back[name], value) for name, value in fisher.items())
    assert vars(back) == vars(fisher)
    assert back.trace == fisher.trace


@pytest.mark.parametrize("wrong", ["definition", "digest", "weights", "shape"])
def test_a_fisher_of_something_else_is_refused(tmp_path, wrong):
    model, path = seeded(Mlp), tmp_path / "fisher.safetensors"
    save_fisher(path, diagonal_fisher(model, class_batches((5,))), digest="data", model=model)
    if wrong == "weights":
        model.body[0].bias.data += 1
    if wrong == "shape":
        model.body[3] = nn.Linear(6, K + 1).double()
    with pytest.raises(Mistake, match="compute it anew"):
        load_fisher(
            path, definition="exact" if wrong == "definition" else None, digest="other" if wrong == "digest" else "data", model=model
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"definition": "empiricl"}, "did you mean 'empirical'"),
        ({"parameters": ["body.0.weigth"]}, "did you mean 'body.0.weight'"),
        ({"definition": "sampled"}, "generator"),
        ({"row": "total"}, "row"),
        ({"reduce": "max"}, "reduce"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(Mistake, match=words):
        diagonal_fisher(seeded(Mlp), class_batches((5,)), **options)


def test_no_rows_no_labels_and_no_finite_gradient_are_refused():
    model = seeded(Mlp)
    with pytest.raises(Mistake, match="no supervised row"):
        diagonal_fisher(model, [])
    with pytest.raises(Mistake, match="no labels"):
        diagonal_fisher(model, [{"pixel_values": torch.zeros(2, 5).double()}])
    with pytest.raises(Mistake, match="not finite"):
        diagonal_fisher(model, [{"pixel_values": torch.full((2, 5), float("nan")).double(), "labels": torch.zeros(2, dtype=torch.int64)}])
    with pytest.raises(Mistake, match="no parameter"):
        diagonal_fisher(model.requires_grad_(False), class_batches((5,)))


def test_adapters_on_a_frozen_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(seeded(llama), LoraConfig(r=2, target_modules=["q_proj"])).double()
    draw = generator("lora")
    for name, leaf in model.named_parameters():
        if "lora_B" in name:
            leaf.data.normal_(generator=draw)
    found = diagonal_fisher(model, token_batches())
    assert sorted(name.split(".")[-3] for name in found) == ["lora_A", "lora_B"]
    assert len(found.frozen) == sum(not leaf.requires_grad for leaf in model.parameters())
    agree(found, diagonal_fisher(model, token_batches(), chunk=1), FP32_INSIDE)
    assert model.base_model.model.config._attn_implementation == "sdpa"


def test_image_transformers_with_weights_outside_of_layers():
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 6, "patch_size": 3, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = seeded(lambda: ViTForImageClassification(ViTConfig(intermediate_size=12, num_labels=K, **shape)))
    agree(diagonal_fisher(model, class_batches((1, 6, 6))), diagonal_fisher(model, class_batches((1, 6, 6)), chunk=1), FP32_INSIDE)


def test_a_trained_llama_agrees_with_its_plain_backward_passes():
    folder = Path(os.environ.get("REMANENCE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")) / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"the pre-trained model is not at {folder} (set REMANENCE_DATA)")
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    ids = torch.randint(3, model.config.vocab_size, (3, 12), generator=generator("stories"))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    agree(diagonal_fisher(model, [batch]), diagonal_fisher(model, [batch], chunk=1), FP32_INSIDE)
