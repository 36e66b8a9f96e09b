r"""Squared gradients of single rows, summed over rows or over weights, from one ordinary pass: a layer's inputs and the gradients of its outputs suffice.

Of row b, with inputs a (T, in) and gradients of the outputs g (T, out), the weight of a linear layer has the gradient G_b = g_b^T a_b; with one position per row
the sum over rows of its square is (g^2)^T (a^2) (Goodfellow, "Efficient Per-Example Gradient Computations", arXiv 1510.01799). A convolution is the same on its
unfolded input (Rochette et al., arXiv 1912.06015). The scale of a norm sees sum_t g_t xhat_t, an embedding the sum of g over each token's places in the row. Where
a parameter is used more than once (tied weights, a layer called twice) the gradients of its uses are added before squaring.

The layers known are `nn.Linear`, `nn.Conv2d`, `nn.Embedding`, transformers' `Conv1D`, batch (with kept statistics), layer, group and RMS norms. A model is unsuited
(`Unsuited`) where a parameter is asked for that lies in another module, or that the graph of the loss reaches by more ways than through its own layers' calls, or where
a layer does not see the rows as its first dimension. That the rows do not touch each other is for the caller to check on a few rows (`agrees`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

CACHE_BYTES = 2**21  # of per-row gradients at a time on a processor, so that they are squared while in its cache ...
DEVICE_BYTES = 2**28  # ... and on a device
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


class Unsuited(Exception):
    """Say that a model's gradients by row do not follow from its layers' inputs and outputs."""


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Args:
        layer: the module.
        given: its input, rows first.
        version: of the input when it was given; a later change in place would spoil it.
        edge: where the gradient of its output arrives; a change in place of the output does not move it.
    """

    layer: nn.Module
    given: Tensor
    version: int
    edge: GradientEdge


class RowGradients:
    """Compute squared per-row gradients of a model's parameters by the layers that hold them: their sum over rows, or each row's norm.

    Args:
        model: in evaluation mode when `squares` or `norms` is called.
        chosen: the parameters by name, a tied one once.

    Attributes:
        row_bytes: what one row's inputs and gradients of outputs took in the latest call.
        layers: the layers that it passed through.

    Raises:
        Unsuited: one of them lies in a module of unknown kind.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]):
        names = {id(weight): name for name, weight in chosen.items()}
        self.chosen, self.row_bytes, self.layers = chosen, 0, frozenset[nn.Module]()
        self.holds: dict[nn.Module, dict[str, str]] = {}  # of each layer, its own names for chosen parameters -> theirs
        for layer in model.modules():
            own = {local: names[id(weight)] for local, weight in layer._parameters.items() if id(weight) in names}
            if own:
                if not _known(layer):
                    raise Unsuited(f"{type(layer).__name__} is no layer of known kind")
                self.holds[layer] = own

    def squares(self, losses: Callable[[], Float[Tensor, " B"]], rows: int) -> dict[str, Tensor]:
        """Return, per parameter, the sum over rows of the squared gradient of the row's loss, in fp64 or fp32.

        Args:
            losses: runs the model and returns the loss of each row.
            rows: B.

        Raises:
            Unsuited: see the module's head.
        """
        of = self._uses(losses, rows)
        with torch.no_grad():
            return {name: _sum_of_squares(weight, of[name], rows) for name, weight in self.chosen.items()}

    def norms(self, losses: Callable[[], Float[Tensor, " B"]], rows: int) -> Float[Tensor, " B"]:
        """Return the Euclidean norm of the gradient of each row's loss over all chosen parameters, in fp64; the arguments are those of `squares`.

        Raises:
            Unsuited: see the module's head.
        """
        of = self._uses(losses, rows)
        with torch.no_grad():
            return torch.stack([_squares_by_row(weight, of[name], rows) for name, weight in self.chosen.items()]).sum(dim=0).sqrt()

    def _uses(self, losses: Callable[[], Float[Tensor, " B"]], rows: int) -> dict[str, list[tuple[Use, str, Tensor]]]:
        """Run forward and back; return each parameter's uses, with the gradients of the outputs."""
        found: list[Use] = []
        with torch.enable_grad():
            with self._recorded(found, rows):
                total = losses().sum()
            if total.grad_fn is None:
                raise Unsuited("the loss has no gradient")
            nodes, ways = _reach(total.grad_fn)
            uses = [use for use in found if use.edge.node in nodes]
            if any(use.given._version != use.version for use in uses):
                raise Unsuited("an input was changed in place")
            calls = Counter(name for use in uses for name in self.holds[use.layer].values())
            odd = next((name for name, weight in self.chosen.items() if ways[id(weight)] != calls[name]), None)
            if odd is not None:
                raise Unsuited(f"'{odd}' is used outside its layer")
            slopes = torch.autograd.grad(total, [use.edge for use in uses]) if uses else ()  # no gradient of a weight is computed here
        self.layers = frozenset(use.layer for use in uses)
        self.row_bytes = sum(use.given.nbytes + slope.nbytes for use, slope in zip(uses, slopes)) // max(1, rows)
        of: dict[str, list[tuple[Use, str, Tensor]]] = {name: [] for name in self.chosen}
        for use, slope in zip(uses, slopes):
            for local, name in self.holds[use.layer].items():
                of[name].append((use, local, slope))
        return of

    @contextlib.contextmanager
    def _recorded(self, found: list[Use], rows: int) -> Iterator[None]:
        """Note every call of the layers that matter."""

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            given = (*args, *kwargs.values())
            if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
                raise Unsuited(f"a {type(layer).__name__} takes or gives more than a tensor")
            if not output.requires_grad:
                return None
            (value,) = given
            spread = isinstance(layer, nn.Embedding) and len(value) == 1 < rows  # positions, one line of them for all rows
            if spread:
                value, output = value.expand(rows, *value.shape[1:]), output.expand(rows, *output.shape[1:])
            if value.ndim < _least_dimensions(layer) or len(value) != rows:
                raise Unsuited(f"a {type(layer).__name__} does not see the rows first")
            found.append(Use(layer, value, value._version, get_gradient_edge(output)))
            return output if spread else None

        handles = []
        try:
            for layer in self.holds:
                if layer._forward_hooks:
                    raise Unsuited("a layer has a hook of its own, which may change what it gives")
                handles.append(layer.register_forward_hook(note, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def agrees(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Return whether two dicts of squares are equal up to rounding: of a weight's largest, and of the noise where gradients cancel to zero."""
    highest = max((value.max().item() for value in expected.values() if value.numel()), default=0.0)
    for name, value in expected.items():
        half = weights[name].dtype.itemsize < 4
        close, noise = (5e-2, 1e-4) if half else (1e-4, 1e-10)
        bound = close * value.max() + noise * highest if value.numel() else 0.0
        if not bool(((found[name] - value).abs() <= bound).all()):  # false for NaN too
            return False
    return True


def _known(layer: nn.Module) -> bool:
    """Return whether the layer is of a kind whose gradients by row follow from its input and the gradient of its output."""
    kind = type(layer)
    if kind in (nn.Linear, Conv1D, nn.LayerNorm, nn.GroupNorm):
        return True
    if isinstance(layer, nn.Conv2d) and kind is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding) and kind is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and kind in NORMS:
        return layer.running_mean is not None
    return _is_rms(layer)


def _is_rms(layer: nn.Module) -> bool:
    return type(layer).__name__.endswith("RMSNorm") and [(n, w is not None and w.ndim) for n, w in layer._parameters.items()] == [
        ("weight", 1)
    ]


def _least_dimensions(layer: nn.Module) -> int:
    return 4 if isinstance(layer, nn.Conv2d) else 1 if isinstance(layer, nn.Embedding) else 2


def _reach(root: Node) -> tuple[set[Node], Counter[int]]:
    """Return the nodes behind a loss, and by how many ways it reaches each leaf (by its id)."""
    seen, ways, open_ = {root}, Counter[int](), [root]
    while open_:
        for node, _ in open_.pop().next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                ways[id(leaf)] += 1
            elif node not in seen:
                seen.add(node)
                open_.append(node)
    return seen, ways


def _sum_of_squares(weight: Tensor, uses: Sequence[tuple[Use, str, Tensor]], rows: int) -> Tensor:
    """Return the sum over rows of the squared gradient, the gradients of a row's uses added first."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if len(uses) == 1:
        use, local, slope = uses[0]
        if local == "weight" and (single := _single_place(use, slope)) is not None:
            given, slope = (value.to(wide).square() for value in single)
            return (given.T @ slope if isinstance(use.layer, Conv1D) else slope.T @ given).reshape(weight.shape)
        if isinstance(use.layer, nn.Embedding):
            return _embedding_squares(use.layer, use.given, slope.to(wide))
    total = torch.zeros_like(weight, dtype=wide)
    for _, each in _gradients(weight, uses, rows, wide):
        total += each.square_().sum(dim=0).reshape(total.shape)
    return total


def _squares_by_row(weight: Tensor, uses: Sequence[tuple[Use, str, Tensor]], rows: int) -> Float[Tensor, " B"]:
    """Return each row's squared norm of the gradient of one parameter, the gradients of a row's uses added first."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    found = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    if len(uses) == 1:
        use, local, slope = uses[0]
        if local == "weight" and (single := _single_place(use, slope)) is not None:  # |g a^T|^2 = |g|^2 |a|^2
            given, slope = (value.to(wide).square().sum(dim=1, dtype=torch.float64) for value in single)
            return given * slope
        if isinstance(use.layer, nn.Embedding):
            return _embedding_squares_by_row(use.layer, use.given, slope.to(wide))
    for here, each in _gradients(weight, uses, rows, wide):
        found[here] = each.flatten(1).square_().sum(dim=1, dtype=torch.float64)
    return found


def _gradients(
    weight: Tensor, uses: Sequence[tuple[Use, str, Tensor]], rows: int, wide: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "B ..."]]]:
    """Yield places of rows and their gradients of one parameter, as many at a time as fit the cache."""
    room = CACHE_BYTES if weight.device.type == "cpu" else DEVICE_BYTES
    size = torch.finfo(wide).bits // 8
    step = max(1, room // (size * max(_row_size(use.layer, use.given, local, weight) for use, local, _ in uses))) if uses else 1
    for start in range(0, rows if uses else 0, step):
        here = slice(start, start + step)
        first, *others = (_by_row(use.layer, local, use.given[here], slope[here].to(wide)) for use, local, slope in uses)
        yield here, sum(others, first)


def _single_place(use: Use, slope: Tensor) -> tuple[Float[Tensor, "B I"], Float[Tensor, "B O"]] | None:
    """Return inputs and gradients of outputs of a linear layer or a convolution that has one position per row; else nothing."""
    layer, given = use.layer, use.given
    if isinstance(layer, nn.Linear | Conv1D) and given[0].numel() == given.shape[-1]:
        return given.flatten(1), slope.flatten(1)
    if isinstance(layer, nn.Conv2d) and layer.groups == slope.shape[2] == slope.shape[3] == 1:
        return _patches(layer, given).flatten(1), slope.flatten(1)
    return None


def _row_size(layer: nn.Module, given: Tensor, local: str, weight: Tensor) -> int:
    """Return how many numbers one row takes on the way to its gradient."""
    spread = given[0].numel() * layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) and local == "weight" else given[0].numel()
    return max(weight.numel(), spread, 1)


def _by_row(layer: nn.Module, local: str, given: Tensor, slope: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """Return the gradient of each row of one parameter of a layer, in the parameter's shape (a convolution's weight: its numbers in that order)."""
    rows = len(given)
    if isinstance(layer, nn.Embedding):
        whole = slope.new_zeros(rows, *layer.weight.shape)
        places, slope = _places(layer, given, slope)
        whole.flatten(0, 1).index_add_(0, places, slope)
        return whole
    given = given.to(slope.dtype)
    if isinstance(layer, nn.Linear | Conv1D):
        slope = slope.reshape(rows, -1, slope.shape[-1])  # (B, T, out)
        if local == "bias":
            return slope.sum(dim=1)
        given = given.reshape(rows, -1, given.shape[-1])  # (B, T, in)
        left, right = (slope, given) if isinstance(layer, nn.Linear) else (given, slope)
        return torch.bmm(left.transpose(1, 2), right)
    if isinstance(layer, nn.Conv2d):
        slope = slope.flatten(2)  # (B, out, places)
        if local == "bias":
            return slope.sum(dim=2)
        patches = _patches(layer, given).unflatten(2, (layer.groups, -1)).transpose(1, 2)  # (B, groups, places, in k k)
        return torch.matmul(slope.unflatten(1, (layer.groups, -1)), patches).reshape(rows, *layer.weight.shape)
    by_channel = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm)
    each = slope if local == "bias" else slope * _normed(layer, given)
    if by_channel:
        return each.reshape(rows, each.shape[1], -1).sum(dim=2)
    ending = cast(Tensor, layer.weight).ndim
    return each.reshape(rows, -1, *each.shape[each.ndim - ending :]).sum(dim=1)


def _patches(layer: nn.Conv2d, given: Float[Tensor, "B C H W"]) -> Float[Tensor, "B places I"]:
    """Return what a convolution sees at each place."""
    (up, side), (high, wide) = cast(tuple[int, int], layer.padding), layer.kernel_size
    if layer.dilation != (1, 1):
        return F.unfold(given, layer.kernel_size, layer.dilation, (up, side), layer.stride).transpose(1, 2)
    windows = F.pad(given, (side, side, up, up)).unfold(2, high, layer.stride[0]).unfold(3, wide, layer.stride[1])  # quicker than F.unfold
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _normed(layer: nn.Module, given: Tensor) -> Tensor:
    """Return what a norm multiplies by its scale."""
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        mean, var = (None if value is None else value.to(given.dtype) for value in (layer.running_mean, layer.running_var))
        return F.batch_norm(given, mean, var, None, None, False, 0.0, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(given, list(layer.normalized_shape), None, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(given, layer.num_groups, None, None, layer.eps)
    one = torch.ones_like(cast(Tensor, layer.weight), dtype=given.dtype)  # affine in the scale s, as s xhat or (1 + s) xhat
    return functional_call(layer, {"weight": one}, (given,)) - functional_call(layer, {"weight": torch.zeros_like(one)}, (given,))


def _places(
    layer: nn.Embedding, ids: Int[Tensor, "B ..."], slope: Float[Tensor, "B ... D"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, "N D"]]:
    """Return, for each token, its place in a table of all rows' embeddings, and its gradient (none for padding)."""
    rows = torch.arange(len(ids), device=ids.device).reshape(-1, *[1] * (ids.ndim - 1))
    if layer.padding_idx is not None:
        slope = slope.masked_fill((ids == layer.padding_idx)[..., None], 0.0)
    return (rows * layer.num_embeddings + ids).flatten(), slope.flatten(0, -2)


def _embedding_squares(layer: nn.Embedding, ids: Int[Tensor, "B ..."], slope: Float[Tensor, "B ... D"]) -> Float[Tensor, "V D"]:
    """Return the sum over rows of the squared gradient without a table per row: only the tokens that a row has are touched."""
    present, by_row = _touched(layer, ids, slope)
    return slope.new_zeros(layer.weight.shape).index_add_(0, present % layer.num_embeddings, by_row.square())


def _embedding_squares_by_row(layer: nn.Embedding, ids: Int[Tensor, "B ..."], slope: Float[Tensor, "B ... D"]) -> Float[Tensor, " B"]:
    present, by_row = _touched(layer, ids, slope)
    found = torch.zeros(len(ids), dtype=torch.float64, device=slope.device)
    return found.index_add_(0, present // layer.num_embeddings, by_row.square().sum(dim=1, dtype=torch.float64))


def _touched(
    layer: nn.Embedding, ids: Int[Tensor, "B ..."], slope: Float[Tensor, "B ... D"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n D"]]:
    """Return the places (row V + token) that rows touch in their own tables, and the gradient at each."""
    places, slope = _places(layer, ids, slope)
    present, which = places.unique(return_inverse=True)
    return present, slope.new_zeros(len(present), slope.shape[-1]).index_add_(0, which, slope)
