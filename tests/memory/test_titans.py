"""Titans' memory layer: causal, streaming, one memory per row, nothing written by masked tokens."""

import pytest
import torch

from remanence.errors import Mistake
from remanence.memory.state import MemoryState
from remanence.memory.titans import NeuralMemory

VARIANTS = [
    {},
    {"depth": 1, "residual_norm": False, "max_step": 0.1},
    {"depth": 3, "momentum": False},
    {"decay": False, "read": "before"},
    {"gates": "chunk"},
    {"max_grad_norm": 0.5, "conv": 1},
]


def layer(**settings):
    torch.manual_seed(0)
    return NeuralMemory(8, 2, chunk=4, expansion=2, **settings).double()


def text(T, B=2, seed=1):
    return torch.randn(B, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors) and one.seen == other.seen


def difference(one, other):
    pairs = zip(one.tensors.values(), other.tensors.values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel())


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_changing_a_token_leaves_earlier_outputs_bit_identical(settings):
    memory, x = layer(**settings), text(11)
    y, _ = memory(x)
    for s in (0, 3, 4, 6, 10):
        changed = x.clone()
        changed[:, s] += 1
        other, _ = memory(changed)
        assert torch.equal(other[:, :s], y[:, :s])
        assert not torch.equal(other[:, s:], y[:, s:])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_reading_in_pieces_is_reading_at_once(settings, masked):
    memory, x = layer(**settings), text(13)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    y, state = memory(x, mask=mask)
    for pieces in ([8, 5], [3, 2, 8], [1] * 13):
        held, outputs = None, []
        for piece, its_mask in zip(x.split(pieces, 1), [None] * 13 if mask is None else mask.split(pieces, 1), strict=False):
            out, held = memory(piece, held, its_mask)
            outputs.append(out)
        assert torch.allclose(torch.cat(outputs, 1), y, atol=1e-10, rtol=0)
        assert held.seen == state.seen == 13
        assert difference(held, state) < 1e-10


def test_the_gradient_is_the_same_when_reading_in_pieces():
    memory, x = layer(), text(10)
    memory(x)[0].square().sum().backward()
    whole = {name: parameter.grad.clone() for name, parameter in memory.named_parameters()}
    memory.zero_grad()
    first, state = memory(x[:, :7])
    second, _ = memory(x[:, 7:], state)
    torch.cat((first, second), 1).square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert whole[name].abs().max() > 0, name
        assert torch.allclose(parameter.grad, whole[name], atol=1e-9), name


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_rows_of_a_batch_do_not_share_state(settings):
    memory, x = layer(**settings), text(9, B=3)
    mask = torch.tensor([[True] * 9, [False, True, True] * 3, [True] * 5 + [False] * 4])
    y, state = memory(x, mask=mask)
    for row in range(3):
        alone, its_state = memory(x[row : row + 1], mask=mask[row : row + 1])
        assert torch.allclose(alone[0], y[row], atol=1e-12)
        assert difference(its_state, state.rows(torch.tensor([row]))) < 1e-12
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(memory(changed, mask=mask)[0][[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_masked_token_changes_nothing(settings):
    memory, x = layer(**settings), text(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, [0, 4, 5, 9, 11]] = False
    y, state = memory(x, mask=mask)
    changed = torch.where(mask[..., None], x, text(12, seed=7))
    other, its_state = memory(changed, mask=mask)
    assert torch.equal(other[mask], y[mask])
    question = text(3, seed=9)
    assert torch.equal(memory.recall(question, its_state), memory.recall(question, state))
    _, nothing = memory(text(5, seed=3), state, torch.zeros(2, 5, dtype=torch.bool))
    assert nothing.seen == 17
    assert torch.allclose(memory.recall(question, nothing), memory.recall(question, state), atol=1e-12)


def test_masked_tokens_before_a_text_are_as_if_they_were_not_there():
    memory, x = layer(), text(9)
    padded = torch.cat((text(4, seed=5), x), 1)  # a whole chunk of padding keeps the chunks where they were
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, :4] = False
    assert torch.allclose(memory(padded, mask=mask)[0][:, 4:], memory(x)[0], atol=1e-12)


def test_recall_asks_without_writing():
    memory, x = layer(read="before"), text(10)
    _, state = memory(x)
    before = state.clone()
    question = text(1, seed=4)
    asked = memory.recall(question, state)
    assert same(state, before)
    assert torch.allclose(asked, memory(question, state)[0], atol=1e-12)  # read before its own write: what recall says


def test_watch_reports_what_happened_at_each_token():
    memory, x = layer(max_step=0.5), text(10)
    found = memory.watch(x)
    assert set(found) == {"surprise", "write", "momentum", "forget"}
    assert all(part.shape == (2, 2, 10) for part in found.values())
    assert 0 < found["write"].min() < found["write"].max() < 0.5
    _, state = memory(x[:, :6])
    assert torch.allclose(memory.watch(x[:, 6:], state)["surprise"], found["surprise"][..., 6:])
    repeated = text(1).repeat(1, 40, 1)
    surprise = layer().watch(repeated)["surprise"]
    assert (surprise[..., -1] < 0.5 * surprise[..., 3]).all()  # what is seen again surprises less


def test_state_round_trips_bit_exactly_and_does_not_grow(tmp_path):
    memory = layer()
    _, state = memory(text(6))
    _, longer = memory(text(61))
    assert state.bytes == longer.bytes
    state.detach().save(tmp_path / "state.safetensors")
    loaded = MemoryState.load(tmp_path / "state.safetensors")
    assert same(loaded, state)
    assert loaded.config == state.config
    assert torch.equal(memory(text(5, seed=3), loaded)[0], memory(text(5, seed=3), state)[0])


def test_the_memory_changes_while_its_parameters_do_not():
    memory, x = layer(), text(9)
    before = {name: parameter.clone() for name, parameter in memory.named_parameters()}
    _, state = memory(x)
    assert all(torch.equal(parameter, before[name]) for name, parameter in memory.named_parameters())
    assert (state.tensors["W0"] - memory.start[0]).abs().min() > 0


def test_chunk_gates_are_those_of_the_first_token():
    memory, x = layer(gates="chunk"), text(10)
    found, free = memory.watch(x), layer().watch(x)
    for name in ("write", "momentum", "forget"):
        assert torch.equal(found[name], free[name][..., [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]])


def test_bf16_input_keeps_a_float32_state():
    torch.manual_seed(0)
    memory = NeuralMemory(8, 2, chunk=4).bfloat16()
    y, state = memory(text(7).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.tensors["W0"].dtype == torch.float32
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"heads": 3}, {"chunk": 0}, {"depth": 0}, {"gates": "row"}, {"read": "never"}, {"max_step": 0.0}, {"max_grad_norm": -1.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(Mistake, match=next(iter(settings))):
        NeuralMemory(**({"dim": 8, "heads": 2} | settings))


def test_what_does_not_fit_is_refused():
    memory, x = layer(), text(5)
    _, state = memory(x)
    with pytest.raises(Mistake, match="chunk"):
        NeuralMemory(8, 2, chunk=8, expansion=2).double()(x, state)
    with pytest.raises(Mistake, match="sequences"):
        memory(x[:1], state)
    with pytest.raises(Mistake, match="finite"):
        memory(x * torch.inf)
    with pytest.raises(Mistake, match="mask"):
        memory(x, mask=torch.ones(2, 5))
    with pytest.raises(Mistake, match="width"):
        memory(x[..., :4])


def test_a_training_pass_cuts_its_tokens_once_however_long_they_are():
    """Each slice would give a gradient as long as the whole text: a text twice as long would cost four times as much."""

    def slices(T):
        seen, waiting = set(), [layer(recompute=2)(text(T))[0].grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [after for after, _ in node.next_functions]
        return sum("Slice" in node.name() or "Select" in node.name() for node in seen)

    assert slices(64) == slices(16) > 0
