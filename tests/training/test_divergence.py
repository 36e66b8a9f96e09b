"""The divergence: by hand, by finite differences, its order and its factor."""

import math

import pytest
import torch

from remanence.seeds import generator
from remanence.training.divergence import kl


def logits(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator("kl", seed))


def test_by_hand_with_the_teacher_first():
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl(teacher, student).item() == pytest.approx(forward, abs=1e-15)
    assert kl(student, teacher).item() == pytest.approx(backward, abs=1e-15)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_gradient_is_that_of_finite_differences_and_of_the_formula(temperature, squared):
    """d/dz of the mean over N positions is T (q - p) / N with the factor T^2, and (q - p) / (T N) without."""
    teacher, student = logits(0, 2, 3, 5), logits(1, 2, 3, 5).requires_grad_()
    (slope,) = torch.autograd.grad(kl(teacher, student, temperature, squared_temperature=squared), student)
    distance = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(slope, distance * (temperature if squared else 1 / temperature) / 6, atol=1e-12, rtol=1e-12)
    step = 1e-6
    for place in [(0, 0, 0), (1, 2, 4)]:
        moved = torch.zeros_like(student)
        moved[place] = step
        ends = [kl(teacher, student + sign * moved, temperature, squared_temperature=squared).item() for sign in (1, -1)]
        assert slope[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)


def test_at_the_teacher_value_and_gradient_are_zero():
    teacher = logits(0, 4, 5)
    student = teacher.clone().requires_grad_()
    value = kl(teacher, student, 2.0)
    assert value.item() == 0
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-15


def test_masked_positions_count_neither_above_nor_below_the_line():
    teacher, student = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    student[~mask] = float("nan")
    assert kl(teacher, student, 2.0, mask).item() == pytest.approx(kl(teacher[mask], student[mask], 2.0).item(), abs=1e-14)
    assert kl(teacher, student, 2.0, torch.zeros(2, 3, dtype=torch.bool)).item() == 0


def test_classes_ruled_out_by_both_add_nothing():
    teacher, student = logits(0, 2, 5), logits(1, 2, 5)
    expected = kl(teacher[:, :4], student[:, :4])
    teacher[:, 4] = student[:, 4] = -math.inf
    assert kl(teacher, student).item() == pytest.approx(expected.item(), abs=1e-14)


def test_half_precision_is_widened():
    teacher, student = logits(0, 2, 5).bfloat16(), logits(1, 2, 5).bfloat16()
    assert kl(teacher, student).dtype == torch.float32
    torch.testing.assert_close(kl(teacher, student), kl(teacher.float(), student.float()))


def test_shapes_and_temperature_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="positive"):
        kl(torch.zeros(2, 3), torch.zeros(2, 3), 0)
