"""How far one model's predictions are from another's."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kl(
    teacher_logits: Float[Tensor, "... V"],
    student_logits: Float[Tensor, "... V"],
    temperature: float = 1.0,
    mask: Bool[Tensor, "..."] | None = None,
    *,
    squared_temperature: bool = True,
) -> Float[Tensor, ""]:
    """Compute the mean over positions of KL(softmax(teacher / T) || softmax(student / T)), the teacher first (Hinton et al. 2015).

    Half-precision logits are widened to fp32. The teacher is not detached: compute its logits under `torch.no_grad()`.

    Args:
        teacher_logits: (..., V).
        student_logits: of the same shape.
        temperature: T > 0, in both softmaxes.
        mask: positions (...) that count; `None`: all. No position at all gives 0.
        squared_temperature: multiply by T^2, so that the gradient keeps its scale over temperatures.

    Raises:
        ValueError: the shapes differ or T is not positive.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"expected logits of one shape, got {tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}")
    if temperature <= 0:
        raise ValueError(f"expected a positive temperature, got {temperature}")
    wide = torch.promote_types(torch.promote_types(teacher_logits.dtype, student_logits.dtype), torch.float32)
    teacher = (teacher_logits.to(wide) / temperature).log_softmax(dim=-1)
    student = (student_logits.to(wide) / temperature).log_softmax(dim=-1)
    odds = teacher.exp()
    each = torch.where(odds > 0, odds * (teacher - student), 0).sum(dim=-1)  # classes that the teacher rules out (-inf) add nothing
    if mask is not None:
        each = torch.where(mask.bool(), each, 0)
        mean = each.sum() / mask.bool().sum().clamp(min=1)
    else:
        mean = each.mean()
    return mean * temperature**2 if squared_temperature else mean
