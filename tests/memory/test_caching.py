"""Memory caching against a token-by-token reference: four rules, four recurrences, both starts, both segmentations; and the facts of its paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from remanence.errors import Mistake
from remanence.memory import architectures
from remanence.memory.caching import MemoryCache
from remanence.memory.combine import masked_attention, selected_reads, split
from remanence.memory.deep_rules import Deep, DeepLinear
from remanence.memory.lm import MemoryCachingForCausalLM
from remanence.memory.lm_config import MemoryCachingConfig
from remanence.memory.rules import Delta, Linear, SlidingWindow
from remanence.memory.shelf import weights_of
from remanence.memory.state import MemoryState
from remanence.memory.walk import combine

BASES = {
    "linear": Linear(chunk=3),
    "decayed": Linear(decay=True, chunk=3),
    "swla": SlidingWindow(chunk=3),
    "delta": Delta(chunk=3),
    "dla": DeepLinear(chunk=2),
    "titans": Deep(chunk=2),
}
SHEET = ("decayed", "swla", "dla", "titans")
DIM, HEADS = 6, 2


def make(base, seed: int = 0, **settings) -> MemoryCache:
    """Return a layer in fp64 with gates that differ by token and a connector that is not small."""
    torch.manual_seed(seed)
    settings = {"segment": 5, "heads": HEADS, "top_k": 2} | settings
    layer = MemoryCache(DIM, BASES.get(base, base) if isinstance(base, str) else base, **settings).double()
    with torch.no_grad():
        if layer.gates is not None:
            layer.gates.weight.normal_(std=0.5)
        if layer.connector is not None:
            layer.connector.weight.normal_(std=0.7)
    return layer


def text(tokens: int, rows: int = 2, seed: int = 1) -> Tensor:
    """Return random input."""
    return torch.randn(rows, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(layer: MemoryCache, x: Tensor, lengths: list[int]) -> Tensor:
    """Read token by token: the memory after every token from the base's sequential reference, every cache read one by one, soups really averaged."""
    base = layer.base
    q, k, v, u, pooled, gates = layer._project(x)
    scale, caches, pools, reads = layer.temperature, [], [], []
    state = base.begin(layer.initial, q)
    start = 0
    for length in lengths:
        if layer.init == "independent":
            state = base.begin(layer.initial, q)
        begun = base.close(state)
        for t in range(start, start + length):
            part = slice(start, t + 1)
            _, state = base.reference(q[:, :, part], k[:, :, part], v[:, :, part], {n: g[:, :, part] for n, g in gates.items()}, begun)
            online, sums = base.weights(state), pooled[:, :, part].sum(2)
            now = sums / (t + 1 - start) if layer.pool == "mean" else sums
            here, each = q[:, :, t : t + 1], [*caches, online]
            answers = torch.stack([base.read(here, weights)[:, :, 0] for weights in each])  # (S + 1, B, H, D)
            scores = torch.stack([(u[:, :, t] * pool).sum(-1) * scale for pool in [*pools, now]])
            if layer.rule == "ssc" and len(caches) > layer.top_k:
                bound = scores[:-1].sort(dim=0, descending=True).values[layer.top_k - 1]
                scores[:-1] = torch.where(scores[:-1] >= bound, scores[:-1], -torch.inf)
            gamma = scores.softmax(0)
            if layer.rule == "residual":
                gamma = torch.ones_like(gamma)
            if layer.rule == "average":
                gamma = torch.full_like(gamma, 1 / len(gamma))
            if layer.rule == "soup":
                mixed = {
                    name: sum(g.view(*g.shape, *[1] * (w[name].ndim - 2)) * w[name] for g, w in zip(gamma, each, strict=True))
                    for name in online
                }
                reads.append(base.read(here, mixed)[:, :, 0])
            else:
                reads.append((gamma[..., None] * answers).sum(0))
        caches.append(online)
        pools.append(now)
        start += length
    return layer._leave(torch.stack(reads, 2))


@pytest.mark.parametrize("segment", [5, "log"])
@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("rule", ["grm", "residual", "soup", "ssc"])
@pytest.mark.parametrize("base", list(BASES))
def test_every_rule_base_start_and_segmentation_is_the_token_loop(base, rule, init, segment):
    layer, x = make(base, rule=rule, init=init, segment=segment), text(19)
    wanted = naive(layer, x, split(19, segment))
    found, _ = layer(x)
    assert (found - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 17])
def test_awkward_lengths_and_settings_are_the_token_loop(tokens):
    for base, more in itertools.product(
        SHEET, ({"pool": "sum"}, {"pool_of": "x"}, {"u": "query", "temperature": 30.0}, {"rule": "average"})
    ):
        layer, x = make(base, **more), text(tokens)
        assert (layer(x)[0] - naive(layer, x, split(tokens, 5))).abs().max() < 1e-10, (base, more)


@pytest.mark.parametrize("segment", [1, 2, "log"])
@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("base", ["linear", "decayed"])
def test_the_masked_attention_of_short_segments_is_the_token_loop(base, init, segment):
    for rule in ("grm", "residual", "soup", "average"):
        layer, x = make(base, rule=rule, init=init, segment=segment, heads=1), text(7)  # log: 4, 2, 1
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[1, [1, 4, 5]] = False
        assert (layer(x)[0] - naive(layer, x, split(7, segment))).abs().max() < 1e-10
        if segment != "log":  # piece by piece it is read through the states
            state, read = None, []
            for t in range(7):
                y, state = layer(x[:, t : t + 1], state, mask[:, t : t + 1])
                read.append(y)
            assert (torch.cat(read, 1) - layer(x, None, mask)[0]).abs().max() < 1e-10


@pytest.mark.parametrize("rule", ["grm", "soup", "ssc"])
@pytest.mark.parametrize("base", SHEET)
def test_gradients_are_those_of_the_token_loop(base, rule):
    layer, x = make(base, rule=rule), text(12)
    direction = torch.randn_like(x)
    found = torch.autograd.grad((layer(x)[0] * direction).sum(), list(layer.parameters()))
    wanted = torch.autograd.grad((naive(layer, x, split(12, 5)) * direction).sum(), list(layer.parameters()))
    assert all((one - other).abs().max() < 1e-9 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("base", list(BASES))
def test_one_segment_makes_every_rule_the_base_itself(base):
    x, outputs, one = text(9), [], make(base)
    for rule in ("grm", "soup", "ssc", "residual", "average"):
        layer = make(base, rule=rule, segment=9)
        layer.load_state_dict(one.state_dict(), strict=False)
        q, k, v, _, _, gates = layer._project(x)
        plain, _ = layer.base.run(q, k, v, gates, layer.base.begin(layer.initial, q))
        outputs.append(layer(x)[0])
        assert (outputs[-1] - layer._leave(plain)).abs().max() < 1e-12
    assert all(torch.allclose(outputs[0], other, atol=1e-12) for other in outputs[1:])


def test_linear_residual_is_one_matrix_and_linear_grm_is_not():
    for rule, collapses in (("residual", True), ("grm", False)):
        layer, x = make(Linear(), rule=rule), text(12, rows=1)
        read, _, _, state = layer._walk(x, None, None)
        q, shelf = (
            layer._project(x)[0],
            weights_of({n.removeprefix("cache."): t for n, t in state.tensors.items() if n.startswith("cache.")}),
        )
        single = shelf["M"].sum(2) + state.tensors["live.M"]
        assert torch.allclose(q[:, :, -1:] @ single, read[:, :, -1:], atol=1e-12) == collapses
    # two queries of different gates, one direction: were GRM one matrix, its reads would be proportional to the queries
    layer = make(Linear(), rule="grm", heads=1)
    _, state = layer(text(12, rows=1))
    q = torch.nn.functional.normalize(torch.randn(1, 1, 1, DIM, dtype=torch.float64), dim=-1).expand(1, 1, 2, DIM)
    u = torch.randn(1, 1, 2, DIM, dtype=torch.float64)
    shelf = {n.removeprefix("cache."): t for n, t in state.tensors.items() if n.startswith("cache.")}
    read, _ = combine(layer._plan, q, q @ state.tensors["live.M"], u, q, shelf, None)
    assert (read[:, :, 0] - read[:, :, 1]).abs().max() > 1e-3


def test_soup_is_grm_for_a_matrix_and_differs_for_a_network():
    for base in BASES:
        one, other = make(base, rule="soup"), make(base, rule="grm")
        x = text(17)
        apart = (naive(one, x, split(17, 5)) - other(x)[0]).abs().max()
        assert apart < 1e-10 if BASES[base].matrix else apart > 1e-6, base


@pytest.mark.parametrize("base", SHEET)
def test_ssc_over_all_caches_is_grm(base):
    x = text(17)  # three caches
    assert torch.allclose(make(base, rule="ssc", top_k=3)(x)[0], make(base, rule="grm")(x)[0], atol=1e-12)
    assert not torch.allclose(make(base, rule="ssc", top_k=1)(x)[0], make(base, rule="grm")(x)[0], atol=1e-6)


@pytest.mark.parametrize("base", SHEET)
def test_ssc_never_touches_a_cache_that_was_not_chosen(base):
    torch.manual_seed(0)
    layer = make(base)
    q = torch.randn(2, HEADS, 7, 3, dtype=torch.float64)
    _, state = layer(text(27))
    weights = weights_of({n.removeprefix("cache."): t for n, t in state.tensors.items() if n.startswith("cache.")})
    chosen = torch.tensor([0, 3]).expand(2, HEADS, 7, 2)
    found = selected_reads(layer.base, q, weights, chosen)
    spoiled = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in spoiled.values():
        tensor[:, :, [1, 2, 4]] = torch.nan
    assert torch.equal(found, selected_reads(layer.base, q, spoiled, chosen))
    assert torch.allclose(found, layer.base.read(q[:, :, None], weights)[:, :, [0, 3]].permute(0, 1, 3, 2, 4), atol=1e-12)


def test_segments_of_one_token_are_gated_attention():
    layer, x = make(Linear(), segment=1), text(11)
    q, k, v, u, _, _ = layer._project(x)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    wanted = (((u @ k.mT).masked_fill(future, -torch.inf).softmax(-1)) * (q @ k.mT)) @ v
    assert torch.allclose(layer._walk(x, None, None)[0], wanted, atol=1e-12)
    ones = torch.ones_like(k[..., :1])  # a memory of values alone: key and query of width one, always 1
    found = masked_attention(
        ones, ones, v, ones[..., 0], ones[..., 0], (u @ k.mT).masked_fill(future, -torch.inf).softmax(-1), [1] * 11, False
    )
    assert torch.allclose(found, torch.nn.functional.scaled_dot_product_attention(u, k, v, is_causal=True, scale=1.0), atol=1e-12)


def test_logarithmic_split_is_the_binary_expansion():
    assert split(37, "log") == [32, 4, 1]
    assert [split(2**n, "log") for n in range(6)] == [[2**n] for n in range(6)]
    assert split(12, 5) == [5, 5, 2]
    assert split(12, 5, seen=3) == [2, 5, 5]
    assert split(2, 5, seen=12) == [2]
    assert split(5, 5, seen=10) == [5]


@pytest.mark.parametrize("rule", ["grm", "soup", "ssc"])
@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("base", SHEET)
def test_a_later_token_changes_no_bit_of_an_earlier_output_or_share(base, init, rule):
    layer, x = make(base, init=init, rule=rule), text(13, rows=1)
    read, online, _, _ = layer._walk(x, None, None)
    for s in range(5, 11):  # every place of a segment, and the first of the next
        other = x.clone()
        other[:, s] += 1
        read_other, online_other, _, _ = layer._walk(other, None, None)
        assert torch.equal(read[:, :, :s], read_other[:, :, :s])
        assert torch.equal(online[:, :, :s], online_other[:, :, :s])
        assert not torch.equal(read[:, :, s], read_other[:, :, s])


@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("base", list(BASES))
def test_cached_states_are_the_bases_bit_for_bit_and_the_cache_grows_by_no_more(base, init):
    layer, x = make(base, init=init), text(17)
    _, state = layer(x)
    q, k, v, _, _, gates = layer._project(x)
    run = layer.base.begin(layer.initial, q)
    for number, start in enumerate((0, 5, 10)):
        part = slice(start, start + 5)
        run = layer.base.begin(layer.initial, q) if init == "independent" else layer.base.close(run)
        _, run = layer.base.run(q[:, :, part], k[:, :, part], v[:, :, part], {n: g[:, :, part] for n, g in gates.items()}, run)
        for name, weight in layer.base.weights(run).items():
            assert torch.equal(state.tensors[f"cache.{name}"][:, :, number], weight)
    sizes = []
    for tokens in (6, 11, 16):  # one, two, three caches
        tensors = layer(text(tokens))[1].tensors
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
    weights = sum(w.numel() * w.element_size() for w in layer.base.weights(run).values())
    pooled_key, bookkeeping = 2 * DIM * 8, 2 * 4 * 8  # two rows; count, id, used, reads
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == weights + pooled_key + bookkeeping


def test_shares_follow_contents_and_not_places():
    layer, x = make(Linear(), segment=4, heads=1, u="query", temperature=5.0), text(13, rows=1)
    swapped = torch.cat([x[:, 8:12], x[:, 4:8], x[:, :4], x[:, 12:]], 1)

    def last_shares(y: Tensor) -> Tensor:
        q, _, _, u, _, _ = layer._project(y[:, -1:])
        state = layer(y)[1]
        shelf = {n.removeprefix("cache."): t for n, t in state.tensors.items() if n.startswith("cache.")}
        return combine(layer._plan, q, q, u, state.tensors["pool.total"][:, :, None], shelf, None)[1][0, 0, 0]

    one, other = last_shares(x), last_shares(swapped)
    assert torch.allclose(one[[2, 1, 0, 3]], other, atol=1e-12)
    assert one[:3].std() > 1e-3


@pytest.mark.parametrize("rule", ["grm", "residual", "soup", "ssc"])
@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("base", list(BASES))
def test_streaming_with_a_cache_file_is_reading_at_once(base, init, rule, tmp_path):
    layer, x = make(base, rule=rule, init=init), text(18)
    whole, last = layer(x)
    for cuts in ([3, 5, 10, 11, 16, 18], list(range(1, 19))):
        state, read = None, []
        for start, end in itertools.pairwise([0, *cuts]):
            if state is not None and start == 10:
                state.save(tmp_path / "cache.safetensors")
                state = MemoryState.load(tmp_path / "cache.safetensors")
            y, state = layer(x[:, start:end], state)
            read.append(y)
        assert (torch.cat(read, 1) - whole).abs().max() < 1e-10
        assert all((state.tensors[name].double() - value.double()).abs().max() < 1e-10 for name, value in last.tensors.items())
        assert (layer.recall(x, state) - layer.recall(x, last)).abs().max() < 1e-10


@pytest.mark.parametrize("base", list(BASES))
def test_recall_is_the_last_read_without_a_write(base):
    for rule in ("grm", "residual", "soup", "ssc", "average"):
        layer, x = make(base, rule=rule), text(17)
        y, state = layer(x)
        before = state.clone()
        assert torch.allclose(layer.recall(x[:, -1:], state), y[:, -1:], atol=1e-12)
        assert all(torch.equal(before.tensors[name], value) for name, value in state.tensors.items())


@pytest.mark.parametrize("base", list(BASES))
def test_masked_tokens_change_nothing_and_rows_share_nothing(base):
    for rule, init in (("grm", "independent"), ("ssc", "checkpoint"), ("residual", "independent"), ("soup", "checkpoint")):
        layer, x = make(base, rule=rule, init=init), text(18)
        mask = torch.ones(2, 18, dtype=torch.bool)
        mask[0, [2, 7, 8]] = mask[1, 4:12] = False
        other = torch.where(mask[..., None], x, 9.0)
        (y, state), (y_other, state_other) = layer(x, None, mask), layer(other, None, mask)
        assert torch.equal(y[mask], y_other[mask])
        assert all(torch.equal(value, state_other.tensors[name]) for name, value in state.tensors.items())
        alone, _ = layer(x[1:], None, mask[1:])
        assert torch.allclose(alone[0], y[1], atol=1e-12)


@pytest.mark.parametrize("base", list(BASES))
def test_forgetting_a_segment_is_never_having_read_it(base):
    for rule, gone in (("grm", [0]), ("ssc", [1, 2]), ("residual", [3]), ("soup", [0, 3]), ("grm", [3]), ("soup", [1])):
        layer, x = make(base, rule=rule), text(24)
        mask = torch.ones(2, 18, dtype=torch.bool)
        for number in gone:
            mask[:, 5 * number : 5 * number + 5] = False
        _, state = layer(x[:, :18])
        _, never = layer(x[:, :18], None, mask)
        state = layer.forget(state, gone)
        assert torch.allclose(layer.recall(x, state), layer.recall(x, never), atol=1e-12)
        if 3 not in gone:  # an emptied live segment begins anew, where a masked one keeps its place
            assert torch.allclose(layer(x[:, 18:], state)[0], layer(x[:, 18:], never)[0], atol=1e-12)
        assert state.tensors["cache.id"].shape[1] == 3 - len([number for number in gone if number < 3])


def test_forgetting_is_refused_where_later_memories_contain_the_segment():
    layer, x = make("linear", init="checkpoint"), text(12)
    with pytest.raises(Mistake, match="later memories contain"):
        layer.forget(layer(x)[1], [0])
    layer = make("linear")
    with pytest.raises(Mistake, match="no segment 7 is held"):
        layer.forget(layer(x)[1], [7])


@pytest.mark.parametrize("evict", ["oldest", "lowest_gate"])
def test_an_evicting_cache_is_bounded_and_streams_exactly(evict):
    layer, x = make("delta", evict=evict, max_segments=2, u="query", temperature=8.0), text(41)
    whole, last = layer(x)
    assert last.tensors["cache.M"].shape[2] == 2
    state, read = None, []
    for start in range(0, 41, 3):
        y, state = layer(x[:, start : start + 3], state)
        read.append(y)
    assert (torch.cat(read, 1) - whole).abs().max() < 1e-10
    assert torch.equal(state.tensors["cache.id"], last.tensors["cache.id"])
    if evict == "oldest":
        assert last.tensors["cache.id"].tolist() == [[6, 7]] * 2
    else:
        assert last.tensors["cache.id"].tolist() != [[6, 7]] * 2


def test_detached_caches_pass_no_gradient_and_offloaded_ones_read_the_same():
    x = text(17).requires_grad_()
    layer = make("linear", detach_cache_after=1)
    layer(x)[0][:, -1].sum().backward()
    assert x.grad[:, :10].abs().max() == 0
    assert x.grad[:, 10:15].abs().max() > 0
    for rule in ("grm", "ssc"):
        assert torch.equal(make("linear", rule=rule, offload="cpu")(x)[0], make("linear", rule=rule)(x)[0])


def test_post_training_reads_the_average_with_the_trained_weights():
    trained, x = make("decayed", segment=64), text(17)
    later = trained.post_training(5)
    assert (later(x)[0] - naive(later, x, [5, 5, 5, 2])).abs().max() < 1e-10
    assert torch.equal(later(x[:, :5])[0], trained(x[:, :5])[0])


def test_watch_tells_what_happened_at_each_token():
    layer, x = make("delta", heads=1), text(8, rows=1)
    seen = layer.watch(x)
    _q, k, v, _, _, gates = layer._project(x)
    memory = torch.zeros(DIM, DIM, dtype=torch.float64)
    for t in range(8):
        memory = torch.zeros_like(memory) if t == 5 else memory
        error = v[0, 0, t] - k[0, 0, t] @ memory
        assert torch.isclose(seen["surprise"][0, 0, t], torch.outer(k[0, 0, t], error).norm())
        memory = memory + gates["write"][0, 0, t] * torch.outer(k[0, 0, t], error)
    assert torch.equal(seen["write"], gates["write"])
    assert seen["forget"].abs().max() == 0
    assert torch.equal(seen["online"][0, 0, :5], torch.ones(5, dtype=torch.float64))
    assert seen["online"][0, 0, 5:].max() < 1
    for base in BASES:
        assert all(value.shape == (1, HEADS, 8) for value in make(base).watch(x).values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"segment": 0}, "number of tokens from 1"),
        ({"rule": "grmm"}, "grm"),
        ({"heads": 4}, "do not divide"),
        ({"max_segments": 3}, "go together"),
        ({"evict": "oldest"}, "go together"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(Mistake, match=words):
        make("linear", **settings)


def test_states_that_do_not_fit_are_refused():
    x = text(8)
    _, state = make("linear")(x)
    with pytest.raises(Mistake, match="segment"):
        make("linear", segment=4)(x, state)
    with pytest.raises(Mistake, match="base"):
        make("decayed")(x, state)
    log = make("linear", segment="log")
    with pytest.raises(Mistake, match="whole sequence"):
        log(x, log(x)[1])
    with pytest.raises(Mistake, match="sequences"):
        make("linear")(x[:1], state)


@pytest.mark.parametrize("base", SHEET)
def test_memories_of_a_half_precision_layer_are_in_fp32(base):
    for rule in ("grm", "ssc", "soup"):
        layer, x = make(base, rule=rule).float(), text(17).float()
        wanted, _ = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, _ = layer(x)
        half, state = layer.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in state.tensors.values() if value.is_floating_point())
        assert (half - wanted).abs().max() < 0.2
        assert (mixed - wanted).abs().max() < 0.2
        assert layer.recall(x.bfloat16(), state).isfinite().all()


def test_a_language_model_with_a_cache_reads_in_pieces_and_loads_again(tmp_path):
    architectures.register()
    torch.manual_seed(0)
    config = MemoryCachingConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        variant="lmm",
        n_persistent=2,
        memory={"base": {"name": "titans", "chunk": 4}, "segment": 6, "heads": 2},
    )
    model, ids = MemoryCachingForCausalLM(config).double().eval(), torch.randint(0, 50, (2, 20))
    whole, cache, logits = model(ids).logits, None, []
    for start in range(0, 20, 7):
        out = model(ids[:, start : start + 7], cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    assert (torch.cat(logits, 1) - whole).abs().max() < 1e-10
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.allclose(loaded(ids).logits, whole, atol=1e-12)
