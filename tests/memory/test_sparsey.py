"""Sparsey: the loop and the vectorised form agree bit for bit, one look stores, similar inputs get similar codes, nothing is overwritten."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from remanence.errors import Mistake
from remanence.memory.sparsey import (
    CSAConfig,
    activity,
    back_off,
    draw,
    expansivity,
    familiarity,
    preferences,
    signal,
    strongest,
    weight_at_age,
)
from remanence.memory.sparsey_encode import binarise, episodes, skeletons, strongest_features, strongest_orientations, thin
from remanence.memory.sparsey_level import FOREVER, Field, Macs
from remanence.memory.sparsey_net import Sparsey
from remanence.memory.sparsey_reference import LoopMac
from remanence.memory.sparsey_wiring import Level, neighbours, windows
from remanence.seeds import generator


def patterns(count: int, features: int, active: int, *name: object) -> torch.Tensor:
    """Return rows with exactly `active` features on."""
    order = torch.rand(count, features, generator=generator("patterns", *name)).argsort(1)[:, :active]
    return torch.zeros(count, features, dtype=torch.bool).scatter_(1, order, True)


def signals(x: torch.Tensor, table: torch.Tensor) -> dict[int, float]:
    """Return the active inputs of one mac for the loop."""
    local = x[table]
    return {j: float(local[j]) for j in local.nonzero()[:, 0].tolist()}


CONFIGS = {
    "plain": CSAConfig(),
    "soft": CSAConfig(g_min=0.1, g_exp=1.5, chi=2.5, centre=0.4, slope=7.0, ratchet=True),
    "powers": CSAConfig(g_min=0.1, lam=(0.5, 2.0, 0.7), lam_first=1.5),
    "back-off": CSAConfig(g_min=0.1, backoff=(0.9, 0.6, 0.4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_vectorised_is_the_loop_bit_by_bit_with_the_same_uniforms(name: str) -> None:
    """Faithful means 1: a level of 5 macs with U, H and D, awkward sizes, silent macs, full fields; learning and recognition."""
    csa, M, S, Q, K, above = CONFIGS[name], 5, 13, 3, 7, 11
    random = generator("loop", name)
    near = torch.arange(M * Q * K).expand(M, -1)
    own = torch.where(near // (Q * K) == torch.arange(M)[:, None], near // K % Q, -1)
    fields = {
        "U": Field(torch.rand(M, 29, generator=random).argsort(1)[:, :S], 29, Q, K, freeze=0.3),
        "H": Field(near, M * Q * K, Q, K, own=own, freeze=0.3),
        "D": Field(torch.arange(above).expand(M, -1), above, Q, K, freeze=0.3),
    }
    sizes = {kind: field.table.shape[1] for kind, field in fields.items()}
    level = Macs(fields, Q, K, csa=csa, pi=(3, 7), seed=3)
    loops = [LoopMac(sizes, Q, K, csa=csa, pi=(3, 7), own=own[m].tolist(), freeze=0.3) for m in range(M)]
    exact = 1e-15 if name == "powers" else 0  # torch and Python may round a power differently
    frames = torch.nn.functional.pad((torch.rand(8, 1, 29, generator=random) < 0.4).double(), (0, 1))
    tops = torch.nn.functional.pad((torch.rand(8, 1, above, generator=random) < 0.3).double() * 2, (0, 1))
    last = torch.full((1, M, Q), -1)
    silent = frozen = 0
    for t in range(40):
        first = t % 5 == 0
        inputs = {"U": frames[t % 8]} if first else {"U": frames[t % 8], "H": activity(last, torch.ones(1, M), K), "D": tops[t % 8]}
        seen = [{kind: signals(value[0], fields[kind].table[m]) for kind, value in inputs.items()} for m in range(M)]
        found = level.recognise(inputs, first=first)
        for m, loop in enumerate(loops):
            winners, G, sent = loop.recognise(seen[m], level.ties[m].tolist(), first=first)
            assert winners == found.code[0, m].tolist()
            assert (pytest.approx(found.familiarity[0, m].item(), abs=exact), found.sent[0, m].item()) == (G, sent)
        uniforms = torch.rand(M, Q, generator=random, dtype=torch.float64)
        found = level.learn(inputs, uniforms, first=first)
        for m, loop in enumerate(loops):
            winners, G = loop.learn(seen[m], uniforms[m].tolist(), first=first)
            assert winners == found.code[0, m].tolist()
            assert pytest.approx(found.familiarity[0, m].item(), abs=exact) == G
            for kind, field in fields.items():
                assert loop.weights[kind] == field.weights[m].tolist()
                assert loop.fill(kind) == field.fill(0)[m].item()
        last = found.code
        silent += int((last[..., 0] < 0).sum())
        frozen += sum(int(field.frozen(0).sum()) for field in fields.values())
    assert silent > 0
    assert frozen > 0


@pytest.mark.parametrize("permanence", [None, 50])
def test_a_batch_is_recognised_as_its_rows_one_by_one(permanence: int | None) -> None:
    levels = [Level((2, 3), (5, 4), 6, 5, pi=(2, 9), permanence=permanence), Level((1, 2), (2, 2), 7, 4), Level((1, 1), None, 5, 6)]
    memory = Sparsey(levels, (9, 8), seed=4)
    episodes = patterns(6 * 7, 72, 14, "batch").view(6, 7, 72)
    for episode in episodes[:4]:
        memory.learn(episode)
    whole = memory.recognise(episodes)
    for number, episode in enumerate(episodes):
        alone = memory.recognise(episode)
        assert torch.equal(alone.code, whole.code[number])
        torch.testing.assert_close(alone.familiarity, whole.familiarity[number], rtol=0, atol=0 if permanence is None else 1e-12)


def test_the_first_item_is_novel_and_its_code_uniform() -> None:
    """Faithful means 2: G = 0 and a chi-square over seeds (7 degrees of freedom: 24.3 is the 99.9th percentile)."""
    item = patterns(1, 50, 8, "first")[0]
    counts = torch.zeros(8)
    for seed in range(100):
        stored = Sparsey.mac(50, 24, 8, seed=seed).learn(item)
        assert stored.familiarity == 0
        counts += stored.code.flatten().bincount(minlength=8)
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_a_stored_item_is_fully_familiar_and_gives_its_code_back() -> None:
    """Faithful means 2: right after it was stored, while the memory is far from full."""
    memory = Sparsey.mac(400, 24, 16, seed=1)
    for item in patterns(30, 400, 20, "stored"):
        stored = memory.learn(item)
        again = memory.recognise(item)
        assert again.familiarity == 1
        assert torch.equal(again.code, stored.code)


def test_eta_of_one_is_uniform_and_a_large_chi_with_full_familiarity_is_the_argmax() -> None:
    """Faithful means 3; the argmax needs a steep logistic too: at finite slope the preferences tend to the ratio of the logistic's values."""
    V = torch.rand(2, 3, 5, generator=generator("eta"), dtype=torch.float64) * 0.5
    V[..., 2] = 1.0
    G, c = familiarity(V), torch.full((2,), 0.7, dtype=torch.float64)
    assert torch.equal(preferences(V, torch.ones(2, dtype=torch.float64), c, 10), torch.ones_like(V))
    novel = expansivity(torch.tensor([0.0, 0.2, 0.2001], dtype=torch.float64), 5, CSAConfig(g_min=0.2))
    assert novel[:2].tolist() == [1, 1]
    assert novel[2] > 1
    eta = expansivity(G, 5, CSAConfig(chi=1e12))
    assert eta.tolist() == [1 + 5e12] * 2
    for uniform in (1e-9, 0.5, 1 - 1e-9):
        assert (draw(preferences(V, eta, c, 500.0), torch.full((2, 3), uniform, dtype=torch.float64)) == 2).all()
    soft = preferences(V, eta, c, 10.0)
    logistic = 1 / (1 + torch.exp(-10 * (V - 0.7)))
    torch.testing.assert_close(soft / soft.sum(-1, keepdim=True), logistic / logistic.sum(-1, keepdim=True), rtol=0, atol=1e-6)


def test_eta_and_mu_by_hand() -> None:
    """G = 0.6, G_min = 0.2, g_exp = 2, chi = 2, K = 4: eta = 1 + 0.5^2 x 8 = 3; V = c: mu = 1 + 2/2 = 2."""
    eta = expansivity(torch.tensor([0.6], dtype=torch.float64), 4, CSAConfig(g_min=0.2, g_exp=2, chi=2))
    assert eta.item() == pytest.approx(3)
    V = torch.tensor([[[0.7, 10.0, -10.0]]], dtype=torch.float64)
    torch.testing.assert_close(
        preferences(V, eta, torch.tensor([0.7], dtype=torch.float64), 20.0)[0, 0], torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)
    )


def test_a_draw_follows_its_preferences() -> None:
    mu = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64).expand(1000, 1, 3)
    drawn = draw(mu, ((torch.arange(1000) + 0.5) / 1000)[:, None].double())
    assert drawn.flatten().bincount(minlength=3).tolist() == [250, 0, 750]


def test_similar_inputs_get_similar_codes() -> None:
    """Faithful means 4: the mean overlap of a new code with the stored one rises with the overlap of the inputs, from chance to most."""
    csa = CSAConfig(g_min=0.3, g_exp=2, chi=10, centre=0.7, slope=10)
    kept = (0, 8, 12, 16, 20)
    overlap = torch.zeros(len(kept))
    stored = patterns(40, 400, 20, "sisc")
    for number, item in enumerate(stored):
        memory = Sparsey.mac(400, 24, 16, csa, seed=number)
        code = memory.learn(item).code
        for place, count in enumerate(kept):
            probe = torch.zeros(400, dtype=torch.bool)
            probe[item.nonzero()[:count, 0]] = True
            probe[(~item).nonzero()[: 20 - count, 0]] = True
            macs = memory.grids[0]
            inputs = {"U": torch.nn.functional.pad(probe[None].double(), (0, 1))}
            drawn = macs.choose(
                inputs, torch.rand(1, 1, 24, generator=generator("sisc", number, count), dtype=torch.float64), first=True
            ).code
            overlap[place] += (drawn == code).double().mean() / len(stored)
    assert overlap.diff().min() > 0
    assert overlap[0] < 0.1
    assert overlap[-1] > 0.7


class Count(TorchDispatchMode):
    """Count operations and the elements that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += sum(value.numel() for value in (found if isinstance(found, tuple | list) else [found]) if torch.is_tensor(value))
        return found


def test_an_item_costs_the_same_at_a_hundred_and_at_five_thousand() -> None:
    """Faithful means 5: operations and elements touched are counted; benchmarks/sparsey.py has the seconds."""
    memory = Sparsey.mac(64, 8, 64, csa=CSAConfig(g_min=0.9), freeze=1.0)
    items = patterns(5000, 64, 4, "time")
    work = []
    for upto in (100, 5000):
        memory.partial_fit(items[memory.grids[0].clock : upto - 1])
        with Count() as learned:
            memory.learn(items[upto - 1])
        with Count() as recognised:
            memory.recognise(items[0])
        work.append((learned.operations, learned.elements, recognised.operations, recognised.elements))
    assert memory.grids[0].clock == 5000
    assert work[0] == work[1]


def test_weights_depend_on_the_pairs_stored_and_not_on_their_order() -> None:
    """Faithful means 6: the OR of outer products, binary; no bit is ever cleared."""
    items = torch.nn.functional.pad(patterns(12, 40, 6, "order").double(), (0, 1))
    codes = torch.randint(5, (12, 1, 4), generator=generator("codes"))
    results = []
    for order in (range(12), reversed(range(12))):
        field = Field(torch.arange(40)[None], 40, 4, 5, freeze=1.0)
        for number in order:
            before = field.weights.clone()
            field.learn(items[number : number + 1], codes[number], 1)
            assert (field.weights >= before).all()
        results.append(field.weights)
    winners = torch.nn.functional.one_hot(codes[:, 0], 5).flatten(1)
    expected = ((items[:, :40, None] * winners[:, None]) > 0).any(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][0], expected.to(torch.uint8))


def test_a_full_mac_is_frozen_and_still_measures_familiarity() -> None:
    """Faithful means 7."""
    memory = Sparsey.mac(30, 4, 4, freeze=0.3)
    items = patterns(40, 30, 6, "freeze")
    with pytest.raises(Mistake, match="frozen"):
        memory.partial_fit(items)
    bits = memory.grids[0].fields["U"].weights.clone()
    assert 0.3 < bits.double().mean() < 0.5
    for item in items:
        with pytest.raises(Mistake, match="force"):
            memory.learn(item)
        assert 0 < memory.recognise(item).familiarity <= 1
    assert torch.equal(memory.grids[0].fields["U"].weights, bits)
    memory.learn(items[-1], force=True)
    assert memory.grids[0].fields["U"].weights.sum() > bits.sum()


def test_a_level_that_is_full_goes_on_serving_the_one_above() -> None:
    """Faithful means 7: after its critical period the lower level only recognises, and the upper one still learns."""
    lower, upper = Level((1, 2), (1, 20), 4, 6, freeze=0.2), Level((1, 1), None, 8, 40)
    memory = Sparsey([lower, upper], (1, 40))
    items = patterns(30, 40, 12, "serve")
    memory.partial_fit(items[:15])
    below, above = (macs.fields["U"] for macs in memory.grids)
    assert below.frozen(0).all()
    before = below.weights.clone(), above.weights.clone()
    memory.partial_fit(items[15:])
    assert torch.equal(below.weights, before[0])
    assert above.weights.sum() > before[1].sum()


def test_one_frozen_mac_of_a_level_keeps_its_bits_while_the_others_learn() -> None:
    """Faithful means 7, field by field."""
    memory = Sparsey([Level((1, 2), (1, 20), 4, 4, freeze=0.3, radius=None)], (1, 40))
    left, both = torch.zeros(40, dtype=torch.bool), patterns(20, 40, 12, "half")
    left[:19] = True
    memory.learn(left)
    field = memory.grids[0].fields["U"]
    for item in patterns(3, 20, 19, "fill"):
        memory.learn(torch.cat([item, torch.zeros(20, dtype=torch.bool)]))
        if field.frozen(0)[0]:
            break
    before = field.weights.clone()
    assert field.frozen(0).tolist() == [True, False]
    found = memory.learn(both[0])
    assert torch.equal(field.weights[0], before[0])
    assert field.weights[1].sum() > before[1].sum()
    assert found.familiarity > 0


def test_too_few_or_too_many_inputs_silence_a_mac_and_it_sends_nothing() -> None:
    """Faithful means 8: two macs below, one above; the silent one has no code, no familiarity, and no unit of it is on above."""
    memory = Sparsey([Level((1, 2), (1, 10), 4, 4, pi=(2, 5)), Level((1, 1), None, 4, 4, pi=(1, 2))], (1, 20))
    for left, running in ((1, False), (2, True), (5, True), (6, False)):
        x = torch.zeros(20, dtype=torch.bool)
        x[:left] = True
        x[10:13] = True
        memory.learn(x)
        state, _ = memory._watch(episodes(x, memory.shape))
        assert (state[0].code[0, :, 0] >= 0).tolist() == [running, True]
        if not running:
            assert (state[0].code[0, 0] == -1).all()
            assert (state[0].familiarity[0, 0], state[0].sent[0, 0]) == (0, 0)
        assert (activity(state[0].code, torch.ones(1, 2), 4)[0] > 0).sum() == 4 * (1 + running)
    x = torch.zeros(20, dtype=torch.bool)
    x[0] = True
    nothing = memory.recognise(x)
    assert nothing.familiarity == 0
    assert (nothing.code == -1).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_two_sequences_that_share_a_frame_give_it_different_codes_and_are_recalled(levels: int) -> None:
    """Faithful means 9."""
    specs = [Level((1, 1), None, 24, 16), Level((1, 1), None, 24, 16)][:levels]
    memory = Sparsey(specs, (1, 300), seed=2)
    one, two = patterns(10, 300, 18, "one"), patterns(10, 300, 18, "two")
    two[4] = one[4]
    codes = []
    for sequence in (one, two):
        memory.learn(sequence)
        state = None
        for t in range(5):
            state = memory._step(sequence[None, t], state, t)
        codes.append(state[0].code)
    assert (codes[0] == codes[1]).double().mean() < 0.3
    for sequence in (one, two):
        recalled = memory.recall(sequence[0], 9)
        wrong = (recalled.frames != sequence[1:]).sum(1)
        assert wrong.max() <= 1  # of 300 pixels
        assert recalled.familiarity.min() > 0.95


def test_a_module_gets_nothing_from_itself() -> None:
    memory = Sparsey.mac(100, 5, 4, seed=0)
    memory.learn(patterns(12, 100, 9, "self"))
    weights = memory.grids[0].fields["H"].weights[0].view(5, 4, 5, 4)
    assert weights.sum() > 0
    assert torch.diagonal(weights, dim1=0, dim2=2).sum() == 0


@pytest.mark.parametrize("wrong", ["H", "D", "HD"])
def test_back_off_recovers_what_a_wrong_context_hides(wrong: str) -> None:
    """Faithful means 10."""

    def level(csa: CSAConfig) -> tuple[Macs, torch.Tensor, dict[str, torch.Tensor]]:
        fields = {name: Field(torch.arange(100)[None], 100, 12, 8) for name in "UHD"}
        macs = Macs(fields, 12, 8, csa=csa)
        inputs = {name: torch.nn.functional.pad(patterns(12, 100, 10, name).double(), (0, 1)) for name in "UHD"}
        codes = []
        for number in range(10):
            uniforms = torch.rand(1, 12, generator=generator("back", number), dtype=torch.float64)
            codes.append(macs.learn({name: x[number : number + 1] for name, x in inputs.items()}, uniforms, first=False).code)
        return macs, torch.cat(codes), inputs

    for csa, recovers in ((CSAConfig(), False), (CSAConfig(backoff=(0.9, 0.9, 0.9)), True)):
        macs, codes, inputs = level(csa)
        for number in range(10):
            asked = {name: x[[11 if name in wrong else number]] for name, x in inputs.items()}
            found = macs.recognise(asked, first=False)
            assert torch.equal(found.code[0], codes[number]) or not recovers
            assert (found.familiarity.item() > 0.9) is recovers
        right = macs.recognise({name: x[:10] for name, x in inputs.items()}, first=False)
        assert torch.equal(right.code, codes)


def test_back_off_takes_the_first_tier_that_clears_and_else_the_best_of_all() -> None:
    """One module, one cell of note: U = 0.9, H = 0.5, D = 0.1, so UHD = 0.045, UH = 0.45, U = 0.9."""
    parts = {name: torch.tensor([[[[value, 0.0]]]], dtype=torch.float64) for name, value in (("U", 0.9), ("H", 0.5), ("D", 0.1))}
    present = {name: torch.ones(1, 1, dtype=torch.bool) for name in parts}
    for thresholds, expected in (((0.01, 0.4, 0.8), 0.045), ((0.3, 0.4, 0.8), 0.45), ((0.3, 0.5, 0.8), 0.9), ((0.99, 0.99, 0.99), 0.9)):
        assert familiarity(back_off(parts, present, CSAConfig(backoff=thresholds))).item() == pytest.approx(expected)
    present["D"][:] = False  # a field without input counts as no field that was left out
    assert familiarity(back_off(parts, present, CSAConfig(backoff=(0.4, 0.4, 0.4)))).item() == pytest.approx(0.45)


def test_unrepeated_traces_vanish_and_repeated_ones_stay() -> None:
    """Faithful means 11: window of 20 frames; one item once, one twice within it, one twice but too far apart."""
    memory = Sparsey.mac(300, 6, 8, permanence=20, csa=CSAConfig(g_min=0.2, chi=1e6, slope=200), freeze=1.0)
    field = memory.grids[0].fields["U"]
    once, twice = patterns(2, 300, 12, "trace")
    others = patterns(100, 300, 12, "others")
    memory.learn(once)
    code = memory.learn(twice).code
    assert memory.recognise(once).familiarity > 0.9
    memory.partial_fit(others[:10])
    assert 0.9 < memory.recognise(once).familiarity < 1  # it fades (w(11) of 20 is 0.945)
    again = memory.learn(twice)
    assert torch.equal(again.code, code)
    memory.partial_fit(others[10:50])
    assert memory.recognise(twice).familiarity == 1
    assert torch.equal(memory.recognise(twice).code, code)
    assert memory.recognise(once).familiarity < 0.5
    assert (field.born == FOREVER).sum() > 0
    x = torch.nn.functional.pad(once[None].double(), (0, 1))
    mine = field.born[0, once.nonzero()[:, 0]]
    assert (field.alive(mine[(mine > 0) & (mine <= 2)], memory.grids[0].clock) == 0).all()
    assert field.learn(x, torch.zeros(1, 6, dtype=torch.long), memory.grids[0].clock) is None


def test_a_trace_by_age() -> None:
    age = torch.tensor([0, 1, 9, 10, 11, 1000])
    left = weight_at_age(age, 10, 1.0)
    expected = [1.0, 1.1 / (1 + 1 / 9), 1.1 / 2, 0, 0, 0]
    torch.testing.assert_close(left, torch.tensor(expected, dtype=torch.float64))


def test_permanence_by_brute_force() -> None:
    """Births, second settings and deaths of one field against a dictionary."""
    field = Field(torch.arange(6)[None], 6, 2, 3, permanence=4, freeze=1.0)
    random = generator("brute")
    born: dict[tuple[int, int], int] = {}
    for clock in range(1, 40):
        x = torch.nn.functional.pad((torch.rand(1, 6, generator=random) < 0.3).double(), (0, 1))
        code = torch.randint(3, (1, 2), generator=random)
        field.learn(x, code, clock)
        for j in x[0].nonzero()[:, 0].tolist():
            for q in range(2):
                place = (j, 3 * q + int(code[0, q]))
                before = born.get(place)
                if before != FOREVER:
                    born[place] = FOREVER if before is not None and clock - before < 4 else clock
        expected = torch.zeros(6, 6, dtype=torch.long)
        for place, when in born.items():
            expected[place] = when
        assert torch.equal(field.born[0].long(), expected)


def test_several_hypotheses_are_weighed_and_too_many_are_silent() -> None:
    csa = CSAConfig(hypotheses=(1.0, 2), eps=0.05)
    V = torch.zeros(3, 4, 6, dtype=torch.float64)
    V[0, :, 0] = 1  # one hypothesis
    V[1, :, :2] = torch.tensor([1.0, 0.96])  # two within eps
    V[2, :, :3] = 1  # three
    assert signal(V, csa).tolist() == [1, 2, 0]


def test_ties_are_told_apart_by_the_uniform() -> None:
    V = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64).expand(4, 1, 5)
    uniforms = torch.tensor([0.0, 0.34, 0.7, 0.999], dtype=torch.float64)[:, None]
    assert strongest(V, uniforms).flatten().tolist() == [1, 3, 4, 4]


def test_labels_by_counts_and_by_the_nearest_code() -> None:
    memory = Sparsey.mac(200, 16, 16, readouts=("counts", "nearest"), seed=0)
    items, labels = patterns(30, 200, 14, "labels"), ["a", "b", "c"] * 10
    assert memory.partial_fit(items, labels) is memory
    assert memory.predict(items) == labels
    assert memory.predict(items, "nearest") == labels
    assert memory.score(items, labels) == 1
    assert memory.transform(items).sum(1).tolist() == [16] * 30
    scores = memory.recognise(items[1]).scores
    assert max(scores, key=scores.get) == "b"
    assert memory.similarity(items[0], items[0]) == 1
    assert memory.similarity(items[0], items[1]) < 0.5


def test_counts_by_hand() -> None:
    """Two winners; the first was a's twice and b's once, the second b's alone: P = ((2/3 + 0) / 2, (1/3 + 1) / 2)."""
    memory = Sparsey.mac(10, 2, 2)
    for code, label in (((0, 0), "a"), ((0, 0), "a"), ((0, 1), "b")):
        memory.readout.learn(torch.tensor([[code]]), label)
    torch.testing.assert_close(memory.readout.scores(torch.tensor([[[0, 1]]]), "counts"), torch.tensor([[1 / 3, 2 / 3]]))


@pytest.mark.parametrize("permanence", [None, 30])
def test_saved_and_loaded_goes_on_exactly(tmp_path, permanence: int | None) -> None:
    levels = [Level((2, 2), (6, 6), 5, 6, CSAConfig(backoff=(0.9, 0.8, 0.5)), (1, 20), permanence=permanence), Level((1, 1), None, 6, 5)]
    memory = Sparsey(levels, (10, 10), seed=9, readouts=("nearest", "counts"))
    items = patterns(40, 100, 14, "save").view(8, 5, 100)
    for number, episode in enumerate(items[:5]):
        memory.learn(episode, number % 2)
    memory.save(tmp_path / "memory.safetensors")
    loaded = Sparsey.load(tmp_path / "memory.safetensors")
    for one in (memory, loaded):
        for number, episode in enumerate(items[5:]):
            one.learn(episode, f"new {number}")
    for a, b in zip(memory.grids, loaded.grids, strict=True):
        for name, value in a.fields.items():
            assert torch.equal(value.weights, b.fields[name].weights)
            assert torch.equal(value.filled, b.fields[name].filled)
    assert torch.equal(memory.recognise(items).code, loaded.recognise(items).code)
    assert memory.recognise(items[6]).scores == loaded.recognise(items[6]).scores
    assert memory.classes == loaded.classes == [0, 1, "new 0", "new 1", "new 2"]
    if permanence is None:
        weights = sum(field.weights.numel() for macs in memory.grids for field in macs.fields.values())
        assert (tmp_path / "memory.safetensors").stat().st_size < weights / 8 + 20_000
    (tmp_path / "x").write_bytes(b"junk")
    with pytest.raises(Mistake, match="damaged"):
        Sparsey.load(tmp_path / "x")


REFUSED = {
    "not binary": lambda memory: memory.learn(torch.rand(20)),
    "nothing is on": lambda memory: memory.learn(torch.zeros(20)),
    "20 features": lambda memory: memory.recognise(torch.ones(21)),
    "no frame": lambda memory: memory.recognise(torch.ones(0, 20)),
    "2 episodes": lambda memory: memory.learn(torch.ones(2, 3, 20)),
    "no label": lambda memory: memory.predict(torch.ones(2, 20)),
    "rows of features": lambda memory: memory.partial_fit(torch.ones(20)),
    "3 labels for 2 rows": lambda memory: memory.partial_fit(torch.ones(2, 20), [0, 1, 2]),
    "at least 2 modules": lambda memory: Sparsey.mac(20, 1, 5),
    "of at least 2 cells": lambda memory: Sparsey.mac(20, 5, 1),
    "there is no level": lambda memory: Sparsey([], (1, 20)),
    "fit into the grid": lambda memory: Sparsey([Level((1, 1), (2, 5))], (1, 20)),
    "the fewest": lambda memory: Level(pi=(3, 2)),
    "no readout 'neerest'": lambda memory: Sparsey.mac(20, readouts=("neerest",)),
    "familiarity from 0": lambda memory: CSAConfig(g_min=1.0),
    "at least one frame": lambda memory: memory.recall(torch.ones(20), 0),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_it_cannot_read_is_refused(problem: str) -> None:
    memory = Sparsey.mac(20, 3, 3)
    with pytest.raises(Mistake, match=problem):
        REFUSED[problem](memory)
    assert memory.grids[0].clock == 0


def test_a_readout_that_is_not_kept_is_refused() -> None:
    memory = Sparsey.mac(20, 3, 3).partial_fit(torch.ones(1, 20), ["a"])
    with pytest.raises(Mistake, match="not kept"):
        memory.predict(torch.ones(1, 20), "nearest")


def test_windows_are_spread_over_the_grid() -> None:
    assert windows((1, 5), (1, 2), (1, 3)).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert windows((2, 3), (2, 1), (1, 2)).tolist() == [[0, 1], [3, 4]]
    assert neighbours((1, 3), 1).tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]  # 3 is padding


def test_codes_of_a_higher_level_last_twice_as_long() -> None:
    memory = Sparsey([Level(modules=8, cells=8), Level(modules=8, cells=8), Level(modules=8, cells=8)], (1, 60), seed=0)
    code = memory.learn(patterns(8, 60, 9, "last")).code[:, 0]
    assert [torch.equal(code[t], code[t + 1]) for t in range(7)] == [True, True, True, False, True, True, True]


def test_encoders_by_hand() -> None:
    assert binarise(torch.tensor([[[0.2, 0.7]]])).tolist() == [[False, True]]
    assert strongest_features(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 2).tolist() == [[False, True, True, False, False]]
    ramp = torch.arange(4.0).expand(1, 4, 4)  # brighter to the right: direction 0 everywhere
    assert strongest_orientations(ramp, 16, 4).view(16, 4)[:, 0].all()
    assert strongest_orientations(ramp.transpose(1, 2), 16, 4).view(16, 4)[:, 1].all()
    with pytest.raises(Mistake, match="not finite"):
        binarise(torch.tensor([[float("nan")]]))


def test_strokes_are_thinned_to_one_pixel() -> None:
    thick = torch.zeros(2, 9, 20, dtype=torch.bool)
    thick[0, 3:6, 2:18] = True
    thick[1, :, 8:11] = True
    thinned = thin(thick)
    assert (thinned <= thick).all()
    assert thinned[0].sum(0).max() == 1
    assert thinned[1].sum(1).max() == 1
    assert thinned[0].sum() > 10
    drawn = torch.zeros(1, 28, 28)
    drawn[0, 4:24, 12:16] = 1
    drawn[0, 20:24, 6:22] = 1
    found = skeletons(drawn)
    assert found.shape == (1, 384)
    assert 20 < found.sum() < 60


@pytest.mark.parametrize("module", ["sparsey_net", "sparsey_encode"])
def test_the_examples_in_the_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"remanence.memory.{module}")).failed == 0
