"""Make binary frames of other data, of nearly constant count: Sparsey stores sets of active inputs, and dense ones collapse it.

>>> import torch
>>> from remanence.memory.sparsey_encode import strongest_orientations
>>> images = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
>>> frames = strongest_orientations(images, strongest=24)
>>> tuple(frames.shape), frames.sum(1).tolist()
((2, 512), [24, 24])
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from remanence.errors import Mistake


def episodes(x: object, shape: tuple[int, int], *, rows: bool = False) -> Bool[Tensor, "N T F"]:
    """Return input as episodes of binary frames: a frame (F,), an episode (T, F), a batch of them (N, T, F), or rows (N, F) of one frame each.

    Raises:
        Mistake: it is not binary, is empty, or has another size than `shape`.
    """
    found = torch.as_tensor(x)
    if rows and found.ndim != 2:
        raise Mistake("X", f"has shape {tuple(found.shape)}", "give rows of features (N, F)")
    if rows:
        found = found[:, None]
    elif 1 <= found.ndim <= 3:
        found = found[(None,) * (3 - found.ndim)]
    features = shape[0] * shape[1]
    if found.ndim != 3 or found.shape[-1] != features:
        raise Mistake("input", f"has shape {tuple(found.shape)}", f"this memory reads frames of {features} features")
    if found.numel() == 0:
        raise Mistake("input", "has no frame", "give at least one")
    if found.dtype != torch.bool and not bool(((found == 0) | (found == 1)).all()):
        raise Mistake("input", "is not binary", "encode it first: `binarise` or `strongest_orientations` of memory.sparsey_encode")
    if not bool(found.bool().any(-1).all()):
        raise Mistake("input", "a frame is empty: nothing is on", "leave it out, or encode it otherwise")
    return found.bool()


def binarise(images: Float[Tensor, "N *shape"], threshold: float = 0.5) -> Bool[Tensor, "N F"]:
    """Return which values lie above a threshold."""
    return (_finite(images) > threshold).flatten(1)


def strongest_features(features: Float[Tensor, "N F"], strongest: int) -> Bool[Tensor, "N F"]:
    """Return which features are among the largest of their row, the same number in each; among equal ones the first."""
    _finite(features)
    if not 1 <= strongest <= features.shape[1]:
        raise Mistake("strongest", f"is {strongest} of {features.shape[1]} features", "give a number from 1 to that of features")
    order = features.argsort(dim=1, descending=True, stable=True)[:, :strongest]
    return torch.zeros(features.shape, dtype=torch.bool).scatter_(1, order, True)


def strongest_orientations(images: Float[Tensor, "N H W"], strongest: int = 24, orientations: int = 8) -> Bool[Tensor, "N F"]:
    """Return the strongest edges of each image: its feature (row, column, direction) is the size of the gradient that points there.

    Args:
        images: grey values.
        strongest: edges kept per image.
        orientations: directions told apart, of the whole circle.
    """
    down, right = torch.gradient(_finite(images).double(), dim=(1, 2))
    size = (down**2 + right**2).sqrt()
    towards = (torch.atan2(down, right) * (orientations / (2 * math.pi))).round().long() % orientations
    edges = torch.zeros(*images.shape, orientations, dtype=torch.float64).scatter_(-1, towards[..., None], size[..., None])
    return strongest_features(edges.flatten(1), strongest)


def skeletons(images: Float[Tensor, "N H W"], size: tuple[int, int] = (24, 16), threshold: float = 0.5) -> Bool[Tensor, "N F"]:
    """Return the strokes of drawings, one pixel wide: what is drawn is centred, scaled to fill `size` in its own proportions, binarised, thinned.

    Args:
        images: bright on dark, in [0, 1].
        size: rows and columns of the result.
        threshold: of the scaled image.
    """
    drawn = _finite(images) > threshold
    if not bool(drawn.flatten(1).any(1).all()):
        raise Mistake("images", "in one of them nothing is brighter than the threshold", "lower it or leave that image out")
    spans = torch.stack([_span(drawn.any(axis)) for axis in (2, 1)], 1)  # (N, 2, 2): rows and columns, first and last
    step = ((spans[..., 1] - spans[..., 0] + 1) / torch.tensor(size)).amax(1)[:, None]  # pixels of the image per pixel of the result
    y, x = (spans[:, axis].mean(1, keepdim=True) + step * (torch.arange(size[axis]) - (size[axis] - 1) / 2) for axis in (0, 1))
    y, x = (place / (length - 1) * 2 - 1 for place, length in zip((y, x), images.shape[1:], strict=True))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    scaled = torch.nn.functional.grid_sample(images[:, None].float(), grid.float(), align_corners=True)[:, 0]
    return thin(scaled > threshold).flatten(1)


def thin(images: Bool[Tensor, "N H W"]) -> Bool[Tensor, "N H W"]:
    """Thin strokes to one pixel (Zhang and Suen 1984), all images at a time, until nothing changes."""
    while True:
        before = images
        for turn in (0, 1):
            p = _ring(images)
            neighbours = p.sum(0)
            rises = (~p & p.roll(-1, 0)).sum(0)
            north, east, south, west = p[0], p[2], p[4], p[6]
            corner = ~(north & east & south) & ~(east & south & west) if turn == 0 else ~(north & east & west) & ~(north & south & west)
            images = images & ~((neighbours >= 2) & (neighbours <= 6) & (rises == 1) & corner)
        if bool((images == before).all()):
            return images


def _ring(images: Bool[Tensor, "N H W"]) -> Bool[Tensor, "8 N H W"]:
    """Return the eight neighbours of each pixel, clockwise from the north."""
    wide = torch.nn.functional.pad(images, (1, 1, 1, 1))
    height, width = images.shape[1:]
    around = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
    return torch.stack([wide[:, line : line + height, column : column + width] for line, column in around])


def _span(drawn: Bool[Tensor, "N L"]) -> Float[Tensor, "N 2"]:
    """Return the first and the last place that is drawn."""
    first = drawn.to(torch.uint8).argmax(1)
    last = drawn.shape[1] - 1 - drawn.flip(1).to(torch.uint8).argmax(1)
    return torch.stack([first, last], 1).double()


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise Mistake("encoder", "the input holds values that are not finite", "mend the data")
    return values
