"""The projection: the constraint holds, nothing moves that need not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.seeds import generator
from remanence.training.projection import agem_project, agem_project_named, dot, flatten


def vector(seed, size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype, generator=generator("projection", seed))


def test_by_hand():
    assert agem_project(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]


@given(seed=st.integers(0, 10_000), size=st.integers(1, 60), scale=st.floats(-3, 3))
@settings(max_examples=80, deadline=None)
def test_afterwards_nothing_conflicts_and_what_did_not_is_unchanged(seed, size, scale):
    g, g_ref = vector(seed, size) * 10**scale, vector(seed + 1, size)
    result = agem_project(g, g_ref)
    assert result @ g_ref >= -1e-6
    if g @ g_ref >= 0:
        assert result is g
    else:
        expected = g - (g @ g_ref) / (g_ref @ g_ref) * g_ref
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(agem_project(result, g_ref), result, atol=1e-9, rtol=1e-9)
        assert result.norm() <= g.norm() * (1 + 1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_named_tensors_project_as_their_concatenation(dtype, sign):
    g = {"a": vector(1, 12, dtype).view(3, 4), "b": vector(2, 5, dtype)}
    g_ref = {name: sign * value + vector(3, value.numel(), dtype).view(value.shape) / 4 for name, value in g.items()}
    found = agem_project_named(g, g_ref)
    assert (dot(g, g_ref) < 0) == (sign < 0)
    torch.testing.assert_close(flatten(found), agem_project(flatten(g), flatten(g_ref)))
    assert all(found[name].dtype == dtype for name in g)
    if sign > 0:
        assert all(found[name] is g[name] for name in g)


def test_large_single_precision_gradients_stay_orthogonal_to_rounding():
    g_ref = vector(1, 100_000, torch.float32) * 100
    result = agem_project(vector(2, 100_000, torch.float32) - g_ref, g_ref)
    assert abs(dot({"": result}, {"": g_ref})) <= 1e-6 * result.double().norm() * g_ref.double().norm()


def test_a_reference_of_zeros_changes_nothing():
    g = vector(0, 4)
    assert agem_project(g, torch.zeros(4, dtype=torch.float64)) is g


def test_flattening_keeps_the_order():
    parts = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([3.0])}
    assert flatten(parts).tolist() == [1, 2, 3]
    assert flatten(parts.values()).tolist() == [1, 2, 3]


def test_other_names_or_shapes_are_refused():
    with pytest.raises(ValueError, match="names"):
        agem_project_named({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(ValueError, match="one shape"):
        agem_project(torch.zeros(2), torch.zeros(3))
