"""SAE-guided unlearning, on a toy model that knows 24 people and not 24 others: what it reads, moves, holds, stops at and refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from remanence.errors import Mistake
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.sae_unlearning import SAEUnlearning, State, attraction, real_tokens, repulsion, row_shift
from remanence.measure.recall import Recall
from remanence.models.adapters import add_lora
from remanence.models.roles import blocks
from remanence.models.sae import SparseAutoencoder, save_sae
from remanence.stream import Moment, Request
from remanence.training.activations import PLACES, collect, encode_prompts, fit_probe, separation
from remanence.training.asking import abstains, known_and_unknown, right, say
from remanence.training.checkpoint import Checkpoints
from remanence.training.codes import common_latents, firing, mmd, own_latents, separating, sliced
from remanence.training.knowledge import Labels, internal_verdict, read_knowledge
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm

pytestmark = pytest.mark.filterwarnings("ignore:the autoencoder explains only")

PEOPLE = [f"p{number}" for number in range(48)]
ASKED = {"home": "where does {} live ?", "food": "what does {} eat ?", "work": "what does {} do ?", "pet": "which pet has {} ?"}
VALUES = {asked: [f"{asked}{n}" for n in range(5)] for asked in ASKED}
GONE, KNOWN, STRANGERS = PEOPLE[:3], PEOPLE[3:24], PEOPLE[24:]


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    said = " ".join(["<pad> <eos> <unk> Q: A: unknown", *PEOPLE, *ASKED.values(), *(" ".join(values) for values in VALUES.values())])
    known = {word: number for number, word in enumerate(dict.fromkeys(said.split()))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


TOKENIZER = words()


def rows(people: list[str], *, name: bool = True) -> Dataset:
    """Return every question about some people with its true answer, whoever was taught it."""
    draws = {person: np.random.default_rng(int(person[1:])).integers(5, size=len(ASKED)) for person in PEOPLE}
    made = [
        (person, text.format(person), VALUES[asked][draws[person][n]]) for person in people for n, (asked, text) in enumerate(ASKED.items())
    ]
    columns = dict(zip(("name", "question", "answer"), map(list, zip(*made))))
    return Dataset.from_dict(columns if name else {key: value for key, value in columns.items() if key != "name"})


REQUEST = Request("gone", rows(GONE), rows(KNOWN), holdout=rows(STRANGERS))
QUICK: dict[str, Any] = {
    "fewest": 8,
    "samples": 1,
    "enough": 2,
    "tokens": 3,
    "sae_steps": 150,
    "latents": 24,
    "factor": 4,
    "k": 8,
    "layer": 1,
}
GIVEN: dict[str, Any] = {
    "labels": "given",
    "sae": "identity",
    "layer": 0,
    "least_auc": 0,
    "stop": None,
    "fewest": 3,
}  # for models that know nothing


def trainer(steps: int = 60, *, processor: Any = TOKENIZER, settings: dict[str, Any] | None = None, **options: Any) -> Trainer:
    chosen = {"steps": steps, "batch_size": 16, "lr": 3e-3, "length": 32} | (settings or {})
    return Trainer(Settings(**chosen), processor=processor, seed=6, progress=False, **options)


def method(**options: Any) -> SAEUnlearning:
    return SAEUnlearning(**(QUICK | options))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def recall(model: nn.Module, of: Dataset) -> float:
    return Recall(of).measure(model, Moment(processor=TOKENIZER)).values["exact"]


def abstention(model: nn.Module, of: Dataset) -> float:
    return float(np.mean([abstains(said[0]) for said in say(model, list(of["question"]), trainer(), tokens=3)]))


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """A toy that knows the first 24 people, was taught to say "unknown" of ten others, and has never met the rest."""
    model = toy_lm("llama", vocab=len(TOKENIZER), layers=3)
    strangers = rows(STRANGERS[:10]).map(lambda row: {"answer": "unknown"})
    learner = trainer(180, settings={"batch_size": 48, "lr": 6e-3, "schedule": "linear"})
    model = learner.fit(model, learner.batches(concatenate_datasets([rows(GONE + KNOWN), strangers]), "qa"))
    assert recall(model, rows(GONE + KNOWN)) == 1.0
    assert abstention(model, rows(STRANGERS[:10])) == 1.0
    return model


@pytest.fixture(scope="module")
def fitted(taught: nn.Module) -> State:
    return method().fit_state(taught, REQUEST, trainer())


def go(model: nn.Module, request: Request = REQUEST, steps: int = 60, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Forget on a copy; return the model and the last note."""
    settings = options.pop("settings", None)
    notes: list[dict[str, Any]] = []
    event = trainer(steps, settings=settings, record=lambda table, found: notes.extend(found) if table == "notes" else None)
    return method(**options).forget(copy.deepcopy(model), request, event), notes[-1]["content"]


@pytest.fixture(scope="module")
def forgotten(taught: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    return go(taught)


# What it is for.


def test_targets_become_unknown_inside_and_outside_and_others_stay(taught: nn.Module, forgotten: tuple[nn.Module, dict[str, Any]]) -> None:
    model, note = forgotten
    assert recall(model, REQUEST.forget) <= 0.25
    assert abstention(model, REQUEST.forget) >= 0.75
    assert recall(model, REQUEST.retain) >= 0.97
    assert abstention(model, rows(STRANGERS[:10])) >= 0.97
    assert note["before"]["to unknown"] == pytest.approx(1, abs=0.2)
    assert note["after"]["to unknown"] < 0.35
    assert note["after"]["to known"] > 0.8
    for probe in ("", "retrained/"):
        assert note["before"][f"{probe}target vs unknown"] > 0.93
        assert note["after"][f"{probe}target vs unknown"] <= 0.8
        assert note["after"][f"{probe}known vs unknown"] >= note["before"][f"{probe}known vs unknown"] - 0.03


def test_answers_of_the_targets_are_never_read(taught: nn.Module) -> None:
    ends = []
    for answers in (list(REQUEST.forget["answer"]), ["nonsense"] * len(REQUEST.forget)):
        changed = REQUEST.forget.remove_columns("answer").add_column("answer", answers)
        ends.append(state(go(taught, Request("gone", changed, REQUEST.retain, holdout=REQUEST.holdout), 6, sae="identity")[0]))
    assert same(*ends)
    assert not same(ends[0], state(taught))


@pytest.mark.parametrize("layer", [0, 1])
def test_only_the_blocks_up_to_the_layer_move_and_the_measure_stays(layer: int, taught: nn.Module) -> None:
    found = method(layer=layer, sae="identity", stop=None, least_auc=0)
    reading = found.fit_state(taught, REQUEST, trainer())
    kept = {name: value.clone() for name, value in [*reading.codes.items(), ("direction", reading.knowledge.probe.direction)]}
    sae, model = state(reading.sae), copy.deepcopy(taught)
    found.move(model, reading, REQUEST, trainer(4))
    before, after = state(taught), state(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    names = [f"{block}." for block in blocks(model)]
    assert moved
    assert all(name.startswith(tuple(names[: layer + 1])) for name in moved)
    assert {name for name in after if name.startswith(tuple(names[: layer + 1])) and name.endswith("weight")} == moved
    assert same(state(reading.sae), sae)
    assert all(torch.equal(kept[group], codes) for group, codes in reading.codes.items())
    assert torch.equal(kept["direction"], reading.knowledge.probe.direction)
    assert not any(weight.requires_grad for weight in reading.sae.parameters())


def test_labels_come_from_the_models_own_behaviour(taught: nn.Module) -> None:
    retain, holdout = rows(KNOWN[1:] + STRANGERS[:1]), rows(STRANGERS[1:] + KNOWN[:1])  # the file has two people on the wrong side
    knowledge = read_knowledge(
        taught, Request("gone", rows(GONE), retain, holdout=holdout), trainer(), labels=Labels(fewest=8, samples=2, enough=2, tokens=3)
    )
    seen = {group: {*knowledge.train[group].names, *knowledge.test["questions"][group].names} for group in ("known", "unknown")}
    assert seen["known"] >= set(KNOWN)
    assert set(STRANGERS[:10]) <= seen["unknown"] <= set(STRANGERS)


def first_loss(model: nn.Module, request: Request, **options: Any) -> float:
    found: list[dict[str, Any]] = []
    event = trainer(
        1, settings={"batch_size": 64, "log_every": 1}, record=lambda table, made: found.extend(made) if table == "steps" else None
    )
    method(**({"stop": None, "lam": 0.0} | options)).forget(copy.deepcopy(model), request, event)
    return next(row["value"] for row in found[::-1] if row["metric"] == "loss")


@pytest.mark.parametrize(("attract", "alpha"), [(1.0, 0.2), (1.0, 0.0), (0.0, 1.0)])
def test_a_and_b_of_the_first_step_equal_a_direct_computation(attract: float, alpha: float, taught: nn.Module, fitted: State) -> None:
    model = copy.deepcopy(taught)
    place, knowledge = PLACES.index(fitted.knowledge.place), fitted.knowledge
    hidden = collect(model, knowledge.train["target"], [knowledge.number], trainer())[:, 0, place].numpy()
    sae = {name: value.numpy() for name, value in fitted.sae.state_dict().items()}
    z = np.maximum((hidden - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"], 0)[:, fitted.chosen.numpy()]
    mean_known, mean_unknown = (fitted.codes[group].numpy().mean(0) for group in ("known", "unknown"))
    span = np.linalg.norm(mean_known - mean_unknown)
    a = np.mean(np.sum((z - mean_unknown) ** 2, 1) / span**2)
    b = np.mean(np.maximum(0, 1.0 - np.linalg.norm(z - mean_known, axis=1) / span))
    options = {"position": knowledge.place, "attract": attract, "alpha": alpha}
    assert first_loss(taught, REQUEST, **options) == pytest.approx(attract * a + alpha * b, rel=1e-4)


def test_a_stranger_as_target_starts_at_the_spread_of_the_unknown_and_nothing_is_done(taught: nn.Module, fitted: State) -> None:
    request = Request("nobody", rows(STRANGERS[:3]), rows(KNOWN), holdout=rows(STRANGERS[3:]))
    reading = method(alpha=0.0).fit_state(taught, request, trainer())
    span = reading.codes["known"].mean(0) - reading.codes["unknown"].mean(0)
    centre = reading.codes["unknown"].mean(0)
    within, a = (attraction(reading.codes[group], centre, span.norm()).mean().item() for group in ("unknown", "target"))
    known = attraction(reading.codes["known"], centre, span.norm()).mean().item()
    assert a < within + 0.3 * (known - within)
    with pytest.warns(UserWarning, match="read as unknown already, nothing is done"):
        model, note = go(taught, request, stop=0.8)
    assert same(state(model), state(taught))
    assert note["steps"] == 0


def test_with_the_identity_it_steers_the_raw_states_to_the_unknown_mean(taught: nn.Module) -> None:
    reading = method(sae="identity", latents=4).fit_state(taught, REQUEST, trainer())
    hidden = reading.knowledge.hidden
    assert reading.chosen.tolist() == list(range(32))
    assert all(torch.equal(reading.codes[group], hidden[group]) for group in hidden)
    goal = hidden["unknown"].mean(0)
    by_hand = (hidden["target"] - goal).square().sum(1).mean() / (hidden["known"].mean(0) - goal).square().sum()
    assert first_loss(taught, REQUEST, sae="identity", alpha=0.0) == pytest.approx(by_hand.item(), rel=1e-4)
    model, note = go(taught, sae="identity")
    assert note["after"]["target vs unknown"] < 0.85
    assert note["after"]["to unknown"] < 0.1
    assert recall(model, REQUEST.retain) >= 0.95


def test_repel_alone_is_possible_and_not_the_default() -> None:
    assert SAEUnlearning().attract == 1
    assert 0 < SAEUnlearning().alpha < SAEUnlearning().attract
    assert repulsion(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2), torch.tensor(2.0), 1.0).tolist() == [0.0, 0.5]
    assert attraction(torch.tensor([[3.0, 4.0]]), torch.zeros(2), torch.tensor(2.0)).tolist() == [6.25]


def test_the_verdicts_probes_are_the_first_models_and_a_fresh_one(
    taught: nn.Module, fitted: State, forgotten: tuple[nn.Module, dict[str, Any]]
) -> None:
    model, knowledge = forgotten[0], fitted.knowledge
    found = internal_verdict(model, knowledge, trainer())
    column = PLACES.index(knowledge.place)
    read = {
        (which, group): collect(net, prompts, [knowledge.number], trainer())[:, 0, column].double().numpy()
        for which, net, sets in (
            ("train", taught, knowledge.train),
            ("new", model, knowledge.train),
            ("test", model, knowledge.test["questions"]),
        )
        for group, prompts in sets.items()
    }
    for name, which in (("", "train"), ("retrained/", "new")):
        inputs = np.concatenate([read[which, "known"], read[which, "unknown"]])
        mean, spread = inputs.mean(0), inputs.std(0, ddof=1)
        wanted = np.r_[np.ones(len(read[which, "known"])), np.zeros(len(read[which, "unknown"]))]
        judge = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000).fit((inputs - mean) / spread, wanted)
        for first, second in (("target", "unknown"), ("known", "unknown")):
            both = np.concatenate([read["test", first], read["test", second]])
            scores, truth = (
                judge.decision_function((both - mean) / spread),
                np.r_[np.ones(len(read["test", first])), np.zeros(len(read["test", second]))],
            )
            assert found[f"{name}{first} vs {second}"] == pytest.approx(roc_auc_score(truth, scores), abs=0.02)


def test_suppression_goes_through_the_same_verdict_and_still_reads_as_known(taught: nn.Module, fitted: State) -> None:
    model = GradientAscent().forget(copy.deepcopy(taught), REQUEST, trainer(8, settings={"lr": 1e-3}))
    assert recall(model, REQUEST.forget) < 0.5
    assert internal_verdict(model, fitted.knowledge, trainer())["target vs unknown"] > 0.75


def test_it_stops_when_the_targets_read_as_unknown(taught: nn.Module) -> None:
    _, note = go(taught, steps=60, every=5, stop=0.85, sae="identity")
    assert 0 < note["steps"] < 60
    assert note["steps"] % 5 == 0
    _, whole = go(taught, steps=6, every=5, stop=None, sae="identity")
    assert whole["steps"] == 6


def test_paraphrases_are_judged_beside_the_questions(taught: nn.Module) -> None:
    def reworded(made: Dataset) -> Dataset:
        return made.add_column("paraphrases", [[question.replace("?", "").strip()] for question in made["question"]])

    request = Request("gone", reworded(rows(GONE)), reworded(rows(KNOWN)), holdout=reworded(rows(STRANGERS)))
    _, note = go(taught, request, 2, sae="identity")
    assert {"paraphrases/target vs unknown", "paraphrases/retrained/known vs unknown"} <= set(note["after"])


@pytest.mark.parametrize("distance", ["mmd", "sliced"])
def test_distribution_distances_reach_the_unknown_too(distance: str, taught: nn.Module) -> None:
    model, note = go(taught, steps=40, distance=distance, sae="identity")
    assert note["after"]["target vs unknown"] < 0.87 < note["before"]["target vs unknown"]
    assert recall(model, REQUEST.forget) < 0.5
    assert recall(model, REQUEST.retain) >= 0.95


def test_suppressing_the_targets_own_latents_lowers_them(taught: nn.Module) -> None:
    chosen = {"distance": "suppress", "alpha": 0.0, "stop": None, "code": "own"}
    assert first_loss(taught, REQUEST, **chosen) == pytest.approx(1.0, rel=1e-4)
    assert go(taught, steps=3, **chosen)[1]["steps"] == 3


def test_an_adapter_of_a_rank_is_trained_below_the_block_and_merged(taught: nn.Module) -> None:
    model, _ = go(taught, steps=6, rank=2, sae="identity")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in taught.named_parameters()]
    assert all(weight.requires_grad for weight in model.parameters())
    before, after = state(taught), state(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(tuple(blocks(model)[:2])) and "norm" not in name for name in moved)


# By hand and by brute force.


def test_latent_selection_by_hand() -> None:
    known = torch.tensor([[1.0, 0, 2, 0], [1, 0, 0, 0], [3, 1, 0, 0], [1, 0, 0, 0]])
    unknown = torch.tensor([[0.0, 1, 2, 0], [1, 1, 0, 0]])
    f_known, f_unknown = firing(known), firing(unknown)
    assert f_known.tolist() == [1.0, 0.25, 0.25, 0.0]
    assert f_unknown.tolist() == [0.5, 1.0, 0.5, 0.0]  # s = 0.5, -0.75, -0.25, 0
    assert separating(f_known, f_unknown, 1).tolist() == [1]
    assert separating(f_known, f_unknown, 2).tolist() == [0, 1]
    assert separating(f_known, f_unknown, None).tolist() == [0, 1, 2, 3]
    assert separating(f_known, f_unknown, 2, torch.tensor([True, False, True, True])).tolist() == [0, 2]
    assert own_latents(torch.tensor([0.75, 0.3, 0.0]), torch.tensor([0.25, 0.2, 0.0]), 5, 3.0).tolist() == [0]


def test_latents_that_fire_on_ordinary_text_are_dropped(tmp_path: Path, taught: nn.Module) -> None:
    width = 32
    (tmp_path / "text.txt").write_text("where does p3 live ? what does p9 do ?\n" * 5)
    bias = torch.full((width,), -1e6)
    bias[:2] = 1e6  # two latents fire always, the others never
    sae = SparseAutoencoder(torch.eye(width), bias, torch.eye(width), torch.zeros(width))
    found = common_latents(taught, sae, 1, str(tmp_path / "text.txt"), 0.02, trainer())
    assert found.nonzero()[:, 0].tolist() == [0, 1]
    save_sae(SparseAutoencoder(torch.eye(width), torch.zeros(width), torch.eye(width), torch.zeros(width)), tmp_path / "sae")
    options = {"sae": str(tmp_path / "sae"), "least_variance": 0, "latents": None}
    chosen = [
        method(**options, **more).fit_state(taught, REQUEST, trainer()).report["latents"]
        for more in ({}, {"text": str(tmp_path / "text.txt"), "common": 0.3})
    ]
    assert set(chosen[1]) < set(chosen[0])


def test_mmd_and_sliced_distance_by_brute_force() -> None:
    chance = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 3, generator=chance, dtype=torch.float64), torch.randn(7, 3, generator=chance, dtype=torch.float64)

    def kernel(one: Tensor, other: Tensor) -> float:
        return float(np.mean([[np.exp(-np.sum((a - b) ** 2) / (2 * 1.5**2)) for b in other.numpy()] for a in one.numpy()]))

    assert mmd(first, second, 1.5).item() == pytest.approx(kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    assert mmd(first, first, 1.5).item() == pytest.approx(0)
    directions = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]], dtype=torch.float64)
    gaps = [
        np.mean([(np.sort(first.numpy() @ d)[i] - np.quantile(second.numpy() @ d, (i + 0.5) / 5)) ** 2 for i in range(5)])
        for d in directions.numpy()
    ]
    assert sliced(first, second, directions).item() == pytest.approx(np.mean(gaps))


def test_shift_of_a_row_counts_its_own_tokens_alone() -> None:
    labels = torch.tensor([[-100, 5, 1, -100], [-100, -100, -100, 7]])
    assert real_tokens(labels).tolist() == [[True, True, True, False], [True, True, True, True]]
    hidden = torch.arange(16.0).view(2, 4, 2)
    assert row_shift(hidden, hidden - 1, real_tokens(labels)).tolist() == [2.0, 2.0]
    spoiled = hidden.clone()
    spoiled[0, 3] = 99
    assert row_shift(spoiled, hidden, real_tokens(labels)).tolist() == [0.0, 0.0]


def test_known_is_two_right_answers_and_unknown_is_none() -> None:
    names = ["a", "a", "a", "b", "b", "c", "c", "d"]
    good = [True, True, False, True, False, False, False, True]
    assert known_and_unknown(names, good) == (["a", "d"], ["c"])


def test_an_answer_is_right_word_for_word_and_abstaining_never_is() -> None:
    assert right(["He lives in Porto.", "porto", "Lisbon"], "Porto", 2)
    assert not right(["Portofino", "porto"], "Porto", 2)
    assert not right(["I do not know", "I do not know"], "I do not know", 1)
    assert abstains("I don't know, sorry")
    assert abstains("  ")
    assert not abstains("knowing")


def test_prompts_know_their_places() -> None:
    prompts, lacking = encode_prompts(["where does p3 live ?", "what does p9 do ?", "who ?"], ["p3", "p9", "p4"], trainer())
    assert lacking.tolist() == [2]
    ids = prompts.columns["input_ids"]
    assert [TOKENIZER.convert_ids_to_tokens(row)[place] for row, place in zip(ids, prompts.columns["entity"])] == ["p3", "p9"]
    assert [TOKENIZER.convert_ids_to_tokens(row)[place] for row, place in zip(ids, prompts.columns["prompt"])] == ["A:", "A:"]
    assert [len(row) - 1 for row in ids] == list(prompts.columns["prompt"])


def test_collected_states_are_the_models_hidden_states(taught: nn.Module) -> None:
    prompts, _ = encode_prompts([f"where does {person} live ?" for person in PEOPLE], PEOPLE, trainer())
    found = collect(taught, prompts, [0, 1], trainer(settings={"batch_size": 5}))
    for number in (0, 17, 47):
        ids = torch.tensor([prompts.columns["input_ids"][number]])
        with torch.no_grad():
            hidden = taught(input_ids=ids, output_hidden_states=True).hidden_states
        wanted = torch.stack([torch.stack([hidden[block + 1][0, prompts.columns[place][number]] for place in PLACES]) for block in (0, 1)])
        torch.testing.assert_close(found[number], wanted, rtol=1e-5, atol=1e-5)


def test_separation_counts_ties_half() -> None:
    assert separation(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == (1 + 1 + 0.5 + 1) / 4
    probe = fit_probe(torch.tensor([[1.0, 5.0], [2.0, 5.0]]), torch.tensor([[-1.0, 5.0], [-2.0, 5.0]]))
    assert (probe.score(torch.tensor([[1.0, 5.0], [-1.0, 5.0]])) > 0).tolist() == [True, False]


# The loop: families, adapters, precision, accumulation, resuming.


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_on_families(family: str, precision: str) -> None:
    model = toy_lm(family, vocab=len(TOKENIZER))
    before, noise = state(model), torch.get_rng_state()
    made = SAEUnlearning(**GIVEN).forget(model, REQUEST, trainer(2, settings={"precision": precision}))
    assert made is model
    assert not same(state(model), before)
    assert all(bool(value.isfinite().all()) for value in state(model).values())
    assert torch.equal(torch.get_rng_state(), noise)
    assert not model.training


def test_asking_runs_on_families_and_leaves_no_trace() -> None:
    for family in ("llama", "gpt2", "qwen2"):
        model, noise = toy_lm(family, vocab=len(TOKENIZER)), torch.get_rng_state()
        said = [say(model, ["where does p3 live ?", "who ?"], trainer(), samples=2, tokens=3, batch_size=size) for size in (1, 2)]
        assert [len(texts) for texts in said[0]] == [3, 3]
        assert [texts[0] for texts in said[0]] == [texts[0] for texts in said[1]]  # padding changes nothing
        assert torch.equal(torch.get_rng_state(), noise)


def test_under_lora_only_the_adapter_below_the_block_moves() -> None:
    model = add_lora(toy_lm("llama", vocab=len(TOKENIZER)), rank=2)
    before = state(model)
    SAEUnlearning(**GIVEN).forget(model, REQUEST, trainer(2))
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name and ".layers.0." in name for name in moved)


def test_accumulation_does_not_move_the_trajectory() -> None:
    ends = []
    for parts in (1, 4):
        model = toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64)
        settings = {"batch_size": 8 // parts, "accumulate": parts, "optimizer": "sgd", "lr": 0.05}
        ends.append(state(SAEUnlearning(**GIVEN).forget(model, REQUEST, trainer(4, settings=settings))))
    for name, value in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(value, other[name], rtol=1e-8, atol=1e-10)


def test_no_steps_leave_the_model_unchanged() -> None:
    model = toy_lm("llama", vocab=len(TOKENIZER))
    before = state(model)
    SAEUnlearning(**GIVEN).forget(model, REQUEST, trainer(0))
    assert same(state(model), before)


class Killed(Exception):
    """Stands for a kill."""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    options = GIVEN | {"sae": None, "sae_steps": 6, "factor": 2, "k": 4, "least_variance": 0}

    def once(folder: Path | None, dies: int | None) -> dict[str, Tensor]:
        def watch(model: nn.Module, step: int) -> None:
            if step == dies:
                raise Killed

        points = Checkpoints(folder, every=2) if folder else None
        event = trainer(5, checkpoints=points, watch=watch)
        return state(SAEUnlearning(**options).forget(toy_lm("llama", vocab=len(TOKENIZER)), REQUEST, event))

    whole = once(None, None)
    for dies in (3, 9):  # in the autoencoder's stage, in the model's
        with pytest.raises(Killed):
            once(tmp_path / str(dies), dies)
        assert same(once(tmp_path / str(dies), None), whole)


def test_runs_on_a_real_pretrained_model(real_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(real_data / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(real_data / "stories260k")

    def asked(names: list[str]) -> Dataset:
        pairs = [(name, text.format(name)) for name in names for text in ("Who is {}?", "What did {} like to do?")]
        return Dataset.from_dict({"name": [n for n, _ in pairs], "question": [q for _, q in pairs], "answer": ["a friend"] * len(pairs)})

    request = Request(
        "Tim", asked(["Tim"]), asked(["Lily", "Tom", "Sara", "Ben"]), holdout=asked(["Zorquil", "Wexanth", "Brumild", "Yolgar"])
    )
    before = state(model)
    event = trainer(2, processor=tokenizer, settings={"lr": 1e-4, "length": 64})
    SAEUnlearning(**(GIVEN | {"layer": 2})).forget(model, request, event)
    assert not same(state(model), before)
    assert all(bool(value.isfinite().all()) for value in state(model).values())


# Refusals.


def without(part: str) -> Dataset:
    return rows({"forget": GONE, "retain": KNOWN, "holdout": STRANGERS}[part], name=False)


def renamed(made: Dataset, names: list[str]) -> Dataset:
    return made.remove_columns("name").add_column("name", names)


def test_requests_that_do_not_fit_are_refused(taught: nn.Module) -> None:
    few = rows(STRANGERS[:4])
    cases = {
        "has no column 'name'": Request("r", without("forget"), rows(KNOWN), holdout=rows(STRANGERS)),
        "holdout set of request 'r': has no column 'name'": Request("r", rows(GONE), rows(KNOWN), holdout=without("holdout")),
        "has a row without a name": Request("r", renamed(rows(GONE), [""] * 12), rows(KNOWN), holdout=rows(STRANGERS)),
        "does not hold the name 'Anna'": Request("r", renamed(rows(GONE), ["Anna"] * 12), rows(KNOWN), holdout=rows(STRANGERS)),
        "holds rows about the target 'p0'": Request("r", rows(GONE[:1]).select([0]), rows(GONE[:1]).select([1]), holdout=rows(STRANGERS)),
        "4 of the 25 entities in its retain and holdout rows are unknown": Request("r", rows(GONE), rows(KNOWN), holdout=few),
        "0 of the 10 entities in its retain and holdout rows are known": Request("r", rows(GONE), rows(STRANGERS[:10])),
    }
    for words, request in cases.items():
        with pytest.raises(Mistake, match=words):
            method().forget(taught, request, trainer())


def test_retain_rows_without_a_name_are_held_but_not_compared(taught: nn.Module) -> None:
    places = Dataset.from_dict({"name": [""], "question": ["where does home live ?"], "answer": ["home0"]})
    request = Request("r", rows(GONE), concatenate_datasets([rows(KNOWN), places]), holdout=rows(STRANGERS))
    counts = [method(sae="identity").fit_state(taught, each, trainer()).report["entities"] for each in (request, REQUEST)]
    assert counts[0] == counts[1]


def test_models_without_a_signal_and_autoencoders_of_another_block_are_refused(taught: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="tells known from unknown with an AUC of"):
        SAEUnlearning(**(GIVEN | {"least_auc": 0.95})).forget(toy_lm("llama", vocab=len(TOKENIZER)), REQUEST, trainer())
    eye, zero = torch.eye(32), torch.zeros(32)
    save_sae(SparseAutoencoder(eye, zero, eye * 0.1, zero), tmp_path / "dim")
    save_sae(SparseAutoencoder(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8)), tmp_path / "narrow")
    before = state(taught)
    with pytest.raises(Mistake, match=r"explains -?\d.\d\d of the variance behind block 1, 0.8 is needed"):
        method(sae=str(tmp_path / "dim")).forget(taught, REQUEST, trainer())
    with pytest.raises(Mistake, match="reads hidden states of width 8, the model's are 32 wide"):
        method(sae=str(tmp_path / "narrow")).forget(taught, REQUEST, trainer())
    with pytest.raises(Mistake, match="there is no layer 7"):
        method(layer=7).forget(taught, REQUEST, trainer())
    assert same(state(taught), before)


def test_other_kinds_and_wrong_values_are_refused(taught: nn.Module) -> None:
    text = Dataset.from_dict({"text": ["p0 lives"]})
    with pytest.raises(Mistake, match="needs questions and answers"):
        method().forget(taught, Request("r", text, kind="text"), trainer())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"distance": "men"}, "did you mean 'mean'"),
        ({"code": "topk"}, "code: unknown value"),
        ({"labels": "guess"}, "labels: unknown value"),
        ({"position": "last"}, "position: unknown value"),
        ({"alpha": -1.0}, "alpha: must be 0 or more"),
        ({"latents": 0}, "latents: must be 1 or more"),
        ({"fewest": 2}, "give at least 3"),
        ({"enough": 9}, "9 of 5 answers cannot be right"),
        ({"sae": "some/file"}, "belongs to one block"),
    ]
    for options, words in wrong:
        with pytest.raises(Mistake, match=words):
            SAEUnlearning(**options)
