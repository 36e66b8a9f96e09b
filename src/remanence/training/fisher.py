r"""The diagonal of Fisher information: how much each weight matters to what the model predicts, in five definitions under their own names.

Notation: row r of the data has the supervised positions q = 1..n_r (one for a classifier; for a language model the positions whose next
token carries a label), log-probabilities logp_q, and weights w_q (1/n_r with `row="mean"`, 1 with `row="sum"`). Its loss is
NLL_r = -sum_q w_q logp_q[y_q].

| definition | per-weight value (mean over rows r or batches b) | labels | backward passes |
|---|---|---|---|
| exact | sum_q w_q^2 sum_k p_q[k] (d logp_q[k])^2 | none: all classes, all of the vocabulary | n_r V per row |
| sampled | (d NLL_r)^2 | one draw from the model for each position | 1 per row, and a forward pass to draw |
| empirical | (d NLL_r)^2 | observed | 1 per row |
| batched | (d mean_r NLL_r)^2 | observed | 1 per batch |
| label_free | \|d mean_r sum_q w_q \|\|logits_q\|\|^2\| | none | 1 per batch |

`exact` takes a language model's tokens as independent given the observed prefix. It is the expectation of `sampled` over its draws (the
cross terms vanish since E_k[d logp_q[k]] = 0), so the two share a scale. It costs V backward passes for each supervised token: for small
V only. `batched` is no Fisher diagonal (the square of a mean, not the mean of squares): it shrinks with the batch size, and is here
since released code of several papers computes it. Its mean is over rows, as in the others. Fishers that differ in definition, `row` or
batch size differ by orders of magnitude: report `Fisher.trace` beside every lambda or alpha.

Sources: Martens (arXiv 1412.1193) for exact, sampled and empirical; Foster et al. (arXiv 2308.07707) for batched; Foster et al.
(arXiv 2402.19308) for label_free.

`sampled` and `empirical` take their squares from one pass forward and back over many rows, by `training.row_gradients`, where the model's layers allow it; the
first two rows are checked against plain backward passes. Elsewhere, and for `exact`, rows go through vmap.

Memory: one accumulator of the model's size, and `chunk` gradients at a time.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from transformers import PreTrainedModel

from remanence.errors import Mistake, nearest
from remanence.storage import digest_tensors, load_tree, save_tree
from remanence.training.processes import exchanged, from_main, is_sharded, keep_sharded, whole
from remanence.training.row_gradients import RowGradients, Unsuited, agrees

DEFINITIONS = ("exact", "sampled", "empirical", "batched", "label_free")
GRADIENT_BYTES = 2**28  # what per-row gradients may take at a time when `chunk` is not given ...
GRADIENTS = 128  # ... and how many, since activations grow with them too
ROWS = 256  # rows in one pass where gradients follow from layers' inputs and outputs, and these fit `GRADIENT_BYTES`


class Fisher(dict[str, Tensor]):
    """Hold importance by parameter name, with how it was made.

    Attributes:
        definition: one of `DEFINITIONS`.
        row: "mean" or "sum" over a row's supervised positions.
        reduce: "mean" or "sum" over rows (batches for `batched` and `label_free`).
        count: rows (or batches) that were counted, over all processes.
        frozen: parameters that were skipped since they do not require a gradient.
    """

    def __init__(self, values: Mapping[str, Tensor], *, definition: str, row: str, reduce: str, count: int, frozen: Iterable[str] = ()):
        super().__init__(values)
        self.definition, self.row, self.reduce, self.count, self.frozen = definition, row, reduce, count, tuple(frozen)

    @property
    def trace(self) -> float:
        """The sum over all weights."""
        return math.fsum(whole(value.sum(dtype=torch.float64)).item() for value in self.values())


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    definition: str = "empirical",
    parameters: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    row: str = "mean",
    reduce: str = "mean",
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Fisher:
    """Compute the diagonal of the Fisher information on a set of batches, in evaluation mode; the model is left as it was.

    Shared (tied) weights are counted once, with the gradient of all their uses summed before squaring. Rows without a supervised
    position are not counted. A model that vmap cannot run goes row by row, with a warning.

    Args:
        model: a classifier or causal language model; it is called with the batch's tensors except `labels`, and returns logits or an output
            with `.logits`, (B, K) or (B, T, V).
        batches: dicts of tensors; `labels` (B,) for classes or (B, T) with -100 where unsupervised (not needed for `label_free`).
        definition: see the module's table.
        parameters: names to compute it for; any name of a tied weight will do, its first one is the key. `None`: all that need a gradient.
        generator: draws the labels of `sampled`.
        row: a language model's row loss is the "mean" or the "sum" over its supervised tokens.
        reduce: "mean" over rows (batches for `batched` and `label_free`), or their "sum".
        chunk: rows or gradients held at a time; 1 goes row by row by plain backward passes; `None`: as many as fit `GRADIENT_BYTES`.
        progress: called after each batch with the number of batches done.
        reduce_sum: sums a tensor over processes (all-reduce), whose batches are then taken as different ones; applied to every sum and to the count.

    A sharded model (FSDP2) can only run where all its processes run, and a square is no sum over processes: so they take every row together, one at a
    time, exchanging their batches first if `reduce_sum` says that these differ. The result is sharded like the parameters.

    Returns:
        One tensor per parameter, non-negative, fp64 for fp64 parameters and fp32 for all others.

    Raises:
        Mistake: unknown option or parameter, nothing to compute, no supervised row, `sampled` without a generator, or a gradient that is
            not finite.
    """
    _check_option("definition", definition, DEFINITIONS)
    _check_option("row", row, ("mean", "sum"))
    _check_option("reduce", reduce, ("mean", "sum"))
    if definition == "sampled" and generator is None:
        raise Mistake("Fisher", "definition 'sampled' draws labels and has no generator", "pass generator=seeds.generator(...)")
    sharded = is_sharded(model)
    if sharded:
        keep_sharded(model)
        batches, reduce_sum, chunk = exchanged(batches) if reduce_sum is not None else batches, None, 1
    chosen, frozen = _choose(model, parameters)
    quick = (
        None
        if sharded or chunk == 1 or definition not in ("sampled", "empirical")
        else _Quick(model, chosen, ROWS if chunk is None else chunk)
    )
    if chunk is None:
        size = sum(weight.numel() * weight.element_size() for weight in chosen.values())
        chunk = min(GRADIENTS, max(1, GRADIENT_BYTES // size))
    elif chunk < 1:
        raise Mistake("Fisher", f"chunk is {chunk}", "give at least 1")
    totals = {name: torch.zeros_like(weight, dtype=_wide(weight)) for name, weight in chosen.items()}
    count = 0
    device = next(iter(chosen.values())).device
    with _still(model, eager=False):
        for number, batch in enumerate(batches, start=1):
            rows = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
            count += _add_batch(model, chosen, totals, rows, definition, row, generator, chunk, quick)
            if progress is not None:
                progress(number)
    counted = torch.tensor(count, dtype=torch.int64, device=device)
    if reduce_sum is not None:
        counted = reduce_sum(counted)
        totals = {name: reduce_sum(total) for name, total in totals.items()}
    count = int(counted.item())
    if count == 0:
        raise Mistake("Fisher", "the batches hold no supervised row", "check that the data are not empty and the labels not all -100")
    broken = next((name for name, total in totals.items() if not whole(torch.isfinite(total).all())), None)
    if broken is not None:
        raise Mistake(f"parameter '{broken}'", "its Fisher information is not finite", "look for NaN in the weights or data, or use fp32")
    if reduce == "mean":
        totals = {name: total / count for name, total in totals.items()}
    return Fisher(totals, definition=definition, row=row, reduce=reduce, count=count, frozen=frozen)


def save_fisher(path: str | Path, fisher: Fisher, *, digest: str = "", model: nn.Module | None = None) -> None:
    """Write a Fisher diagonal with how it was made, atomically.

    Args:
        path: the safetensors file.
        fisher: what `diagonal_fisher` returned.
        digest: identifies the data set.
        model: the model it belongs to; a digest of its weights is kept, for `load_fisher` to compare.
    """
    about = {name: getattr(fisher, name) for name in ("definition", "row", "reduce", "count", "frozen")}
    weights = "" if model is None else digest_tensors(model.named_parameters())
    save_tree(path, {"fisher": dict(fisher), "about": about, "digest": digest, "weights": weights})


def load_fisher(path: str | Path, *, definition: str | None = None, digest: str | None = None, model: nn.Module | None = None) -> Fisher:
    """Read what `save_fisher` wrote, tensors on the CPU.

    Args:
        path: the file.
        definition: refuse a Fisher of another definition.
        digest: refuse a Fisher of another data set.
        model: refuse a Fisher whose names or shapes are not this model's or, where the file keeps the weights' digest, of other weights.

    Raises:
        Mistake: the file is missing, damaged, holds something else, or differs from what was asked for.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or "fisher" not in tree:
        raise Mistake(path, "holds no Fisher information", "name a file that save_fisher wrote")
    fisher = Fisher(tree["fisher"], **tree["about"])
    if definition is not None and fisher.definition != definition:
        raise Mistake(path, f"holds the {fisher.definition} Fisher, not {definition}", "compute it anew: definitions differ in scale")
    if digest is not None and tree["digest"] != digest:
        raise Mistake(path, "was computed on other data", "compute it anew on this data set")
    if model is not None:
        weights = dict(model.named_parameters())
        strange = [name for name, value in fisher.items() if name not in weights or weights[name].shape != value.shape]
        if strange:
            raise Mistake(path, f"holds '{strange[0]}', which the model lacks or has in another shape", "compute it anew for this model")
        if tree["weights"] and tree["weights"] != digest_tensors(model.named_parameters()):
            raise Mistake(path, "was computed for other weights", "compute it anew for this model")
    return fisher


def _check_option(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise Mistake("Fisher", f"unknown {option} '{value}'", nearest(value, known))


def _choose(model: nn.Module, parameters: Iterable[str] | None) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Return the parameters to compute (by first name) and the names of those skipped as frozen."""
    first = dict(model.named_parameters())
    name_of = {id(weight): name for name, weight in first.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    if parameters is None:
        names = list(first)
    else:
        parameters = list(parameters)
        unknown = next((name for name in parameters if name not in every), None)
        if unknown is not None:
            raise Mistake("model", f"has no parameter '{unknown}'", nearest(unknown, every))
        names = list(dict.fromkeys(name_of[id(every[name])] for name in parameters))
    chosen = {name: first[name] for name in names if first[name].requires_grad}
    if not chosen:
        raise Mistake("model", "has no parameter to compute Fisher information for", "unfreeze some, or name others")
    return chosen, [name for name in names if name not in chosen]


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32  # squares of half-precision gradients underflow


@contextlib.contextmanager
def _still(model: nn.Module, eager: bool) -> Iterator[None]:
    """Hold the model in evaluation mode, without a cache and, for vmap, with eager attention: the fused kernels' masks branch on data."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(module.config): module.config for module in modes if isinstance(module, PreTrainedModel)}.values()
    attention = [config._attn_implementation for config in configs]
    cache = [(config, config.use_cache) for config in configs if "use_cache" in vars(config)]
    try:
        model.eval()
        for config in configs if eager else ():
            config._attn_implementation = "eager"
        for config, _ in cache:
            config.use_cache = False
        yield
    finally:
        for config, value in cache:
            config.use_cache = value
        for config, name in zip(configs, attention) if eager else ():  # an outer configuration sets its inner ones, which come after it
            config._attn_implementation = name
        for module, training in modes.items():
            module.training = training


def _add_batch(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    totals: dict[str, Tensor],
    batch: dict[str, Tensor],
    definition: str,
    row: str,
    generator: torch.Generator | None,
    chunk: int,
    quick: _Quick | None,
) -> int:
    """Add a batch's share to `totals`; return what it counts for."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    at, targets, weights = supervision(batch, row, labelled=definition != "label_free")
    kept = (weights > 0).any(dim=1)
    if not kept.any():
        return 0
    inputs = {name: value[kept] if len(value) == len(kept) else value for name, value in inputs.items()}
    at, targets, weights = at[kept], targets[kept], weights[kept]
    if definition in ("batched", "label_free"):
        with torch.enable_grad():
            logits = _logits(model(**inputs), at)
            value = _value(logits, targets, weights, definition).mean()
            slopes = _slopes(model, value, list(chosen.values()))
        for total, slope in zip(totals.values(), slopes):
            wide = slope.to(total.dtype)
            total += wide.abs() if definition == "label_free" else wide.square()
        return 1
    if definition == "sampled":
        targets = _draw_labels(model, inputs, at, max(chunk, quick.step if quick else 1), cast(torch.Generator, generator))
        targets = from_main(targets) if is_sharded(model) else targets
    _add_rows(model, chosen, totals, inputs, (at, targets, weights), definition == "exact", chunk, quick)
    return len(targets)


Supervision = tuple[Int[Tensor, "B Q"], Int[Tensor, "B Q"], Float[Tensor, "B Q"]]  # positions in the logits, target classes, weights


def supervision(batch: Mapping[str, Tensor], row: str, labelled: bool = True) -> Supervision:
    """Return where each row of a batch is supervised: positions, target classes, and weights (0 where a row has fewer than Q positions).

    Classes (`labels` of shape (B,)) have one position each. The logits at position t of a language model predict the label at t + 1.
    Without labels (`label_free`) every attended position of a language model counts, and one per example elsewhere.

    Raises:
        Mistake: labels are wanted and absent.
    """
    if labelled:
        if "labels" not in batch:
            raise Mistake("batch", "has no labels", "add the column, or use a definition without labels (label_free)")
        labels = batch["labels"]
        following = labels[:, None] if labels.ndim == 1 else labels[:, 1:]
        marked = following != -100
    else:
        first = next(iter(batch.values()))
        tokens = batch.get("attention_mask", batch.get("input_ids"))
        following = torch.zeros(len(first), 1 if tokens is None else tokens.shape[1], dtype=torch.int64, device=first.device)
        marked = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(following, dtype=torch.bool)
    counts = marked.sum(dim=1)
    width = max(1, int(counts.max())) if len(counts) else 1
    at = marked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]  # the marked positions of each row, in order, first
    real = marked.gather(1, at)
    targets = torch.where(real, following.gather(1, at), 0)
    scale = 1 / counts.clamp(min=1).double() if row == "mean" else torch.ones_like(counts, dtype=torch.float64)
    return at, targets, real * scale[:, None]


def _logits(output: Any, at: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q V"]:
    """Return the logits at the supervised positions."""
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.ndim == 2:
        return logits[:, None]
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))


def _value(
    logits: Float[Tensor, "B Q V"], targets: Int[Tensor, "B Q"], weights: Float[Tensor, "B Q"], definition: str
) -> Float[Tensor, "B"]:
    """Return each row's scalar: its loss, or its weighted sum of squared logits for `label_free`."""
    logits = logits.to(_wide(logits))
    if definition == "label_free":
        each = logits.square().sum(dim=-1)
    else:
        each = -logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    return (each * weights.to(each.dtype)).sum(dim=1)


def _draw_labels(
    model: nn.Module, inputs: dict[str, Tensor], at: Int[Tensor, "B Q"], chunk: int, generator: torch.Generator
) -> Int[Tensor, "B Q"]:
    """Draw one label per position from the model's own predictions, by inverting their cumulative sum: the same for any chunk."""
    heights = torch.rand(at.shape, dtype=torch.float64, generator=generator, device=generator.device).to(at.device)
    drawn = []
    for start in range(0, len(at), chunk):
        here = slice(start, start + chunk)
        part = {name: value[here] if len(value) == len(at) else value for name, value in inputs.items()}
        with torch.no_grad():
            stairs = _logits(model(**part), at[here]).double().softmax(dim=-1).cumsum(dim=-1)
        drawn.append(
            torch.searchsorted(stairs, heights[here][..., None] * stairs[..., -1:], right=True)[..., 0].clamp(max=stairs.shape[-1] - 1)
        )
    return torch.cat(drawn)


def _add_rows(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    totals: dict[str, Tensor],
    inputs: dict[str, Tensor],
    supervised: Supervision,
    exact: bool,
    chunk: int,
    quick: _Quick | None,
) -> None:
    """Add the squared gradients of single rows to `totals`, `chunk` gradients at a time."""
    size = len(supervised[0])

    def part(start: int, stop: int) -> tuple[dict[str, Tensor], Supervision]:
        here = slice(start, stop)
        rows = {name: value[here] if len(value) == size else value for name, value in inputs.items()}
        return rows, (supervised[0][here], supervised[1][here], supervised[2][here])

    done = quick.add(totals, part, size) if quick is not None else 0
    if chunk > 1 and done < size:
        step = chunk
        if exact:  # each row needs Q V gradients
            rows, (at, _, _) = part(0, 1)
            with torch.no_grad():
                step = max(1, chunk // _logits(model(**rows), at).numel())
        try:
            with _still(model, eager=True):
                while done < size:
                    squares = squared_by_row(model, chosen, *part(done, done + step), exact, max(1, chunk // step))
                    for name, square in squares.items():
                        totals[name] += square
                    done += step
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "vmap" not in str(error) and "functorch" not in str(error):
                raise
            reason = str(error).splitlines()[0][:120]
            warnings.warn(f"this model cannot be vectorised over rows, going row by row ({reason})", stacklevel=2)
    for number in range(done, size):
        _add_one_row(model, chosen, totals, *part(number, number + 1), exact)


class _Quick:
    """Take many rows in one pass for as long as that agrees with plain backward passes over single rows.

    Args:
        model: the model.
        chosen: parameters by name.
        limit: rows in one pass at most.
    """

    def __init__(self, model: nn.Module, chosen: dict[str, nn.Parameter], limit: int):
        self.model, self.chosen, self.limit, self.step = model, chosen, limit, 1
        self.checked, self.layers = 0, frozenset[nn.Module]()
        self.rows: RowGradients | None = None
        with contextlib.suppress(Unsuited):
            self.rows = RowGradients(model, chosen)

    def add(self, totals: dict[str, Tensor], part: Callable[[int, int], tuple[dict[str, Tensor], Supervision]], size: int) -> int:
        """Add the rows 0 .. size - 1 of a batch to `totals`; return how many were added before the model turned out to be unsuited."""
        done = 0
        while self.rows is not None and done < size:
            check = self.checked < min(2, size - done)  # a single row cannot show whether rows touch each other
            stop = min(size, done + (min(2, size - done) if check else self.step))
            inputs, (at, targets, weights) = part(done, stop)

            def losses(inputs: dict[str, Tensor] = inputs, at: Tensor = at, targets: Tensor = targets, weights: Tensor = weights) -> Tensor:
                return _value(_logits(self.model(**inputs), at), targets, weights, "empirical")

            try:
                squares = self.rows.squares(losses, stop - done)
            except Unsuited:
                self.rows = None
                break
            except torch.OutOfMemoryError:
                if check or self.step == 1:
                    raise
                self.step //= 2
                continue
            if check:
                plain = {name: torch.zeros_like(total) for name, total in totals.items()}
                for number in range(done, stop):
                    _add_one_row(self.model, self.chosen, plain, *part(number, number + 1), False)
                if not agrees(squares, plain, self.chosen):
                    self.rows = None
                    break
                self.checked, self.layers = stop - done, self.rows.layers
                self.step = min(self.limit, max(1, GRADIENT_BYTES // max(1, self.rows.row_bytes)))
            elif self.rows.layers != self.layers:  # a layer that was not checked
                self.rows = None
                break
            for name, square in squares.items():
                totals[name] += square
            done = stop
        return done


def squared_by_row(
    model: nn.Module, chosen: Mapping[str, Tensor], inputs: dict[str, Tensor], supervised: Supervision, exact: bool, chunk: int
) -> dict[str, Tensor]:
    """Return, per parameter, the sum over rows of the squared gradient of the row's loss, or of its `exact` expectation, by vmap over rows.

    The plain form beside it is `_add_one_row`; a test ties them.
    """
    weights = {name: weight.detach() for name, weight in chosen.items()}
    size = len(supervised[0])
    mapped = {name: 0 if len(value) == size else None for name, value in inputs.items()}

    def logits(weights: dict[str, Tensor], row: dict[str, Tensor], at: Tensor) -> Tensor:
        whole = {name: value[None] if mapped[name] == 0 else value for name, value in row.items()}
        return _logits(functional_call(model, weights, (), whole), at[None])

    def loss(weights: dict[str, Tensor], row: dict[str, Tensor], at: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return _value(logits(weights, row, at), target[None], weight[None], "empirical")[0]

    def expected(weights: dict[str, Tensor], row: dict[str, Tensor], at: Tensor, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
        def logp(weights: dict[str, Tensor]) -> Tensor:
            found = logits(weights, row, at)
            return found.to(_wide(found)).log_softmax(dim=-1).flatten()  # (Q V,)

        value, pull = vjp(logp, weights)  # type: ignore[misc]  # three values with has_aux only
        many = len(value) // len(weight)
        share = value.exp() * weight.to(value.dtype).square().repeat_interleave(many)
        total = {name: torch.zeros_like(item, dtype=_wide(item)) for name, item in weights.items()}
        for start in range(0, len(value), chunk):
            axes = torch.arange(start, min(start + chunk, len(value)), device=value.device)
            units = (axes[:, None] == torch.arange(len(value), device=value.device)).to(value.dtype)
            slopes = cast(dict[str, Tensor], vmap(pull)(units)[0])
            part = share[axes]
            total = {name: total[name] + torch.tensordot(part, slope.to(part.dtype).square(), dims=1) for name, slope in slopes.items()}
        return total

    at, targets, scale = supervised
    with torch.no_grad():  # nothing is recorded for the parameters outside
        each = vmap(expected if exact else grad(loss), in_dims=(None, mapped, 0, 0, 0))(weights, inputs, at, targets, scale)
    if exact:
        return {name: value.sum(dim=0) for name, value in each.items()}
    return {name: value.to(_wide(value)).square().sum(dim=0) for name, value in each.items()}


def _add_one_row(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    totals: dict[str, Tensor],
    inputs: dict[str, Tensor],
    supervised: Supervision,
    exact: bool,
) -> None:
    """Add one row's share by plain backward passes: for models too large to hold two gradients, and models that vmap cannot run."""
    at, targets, scale = supervised
    leaves = list(chosen.values())
    with torch.enable_grad():
        logits = _logits(model(**inputs), at)
        if not exact:
            values = _value(logits, targets, scale, "empirical")
            shares = [1.0]
        else:
            logp = logits.to(_wide(logits)).log_softmax(dim=-1)
            values = logp.flatten()
            shares = (logp.detach().exp() * scale.to(logp.dtype).square()[..., None]).flatten().tolist()
        for value, share in zip(values, shares):
            if share == 0:
                continue
            slopes = _slopes(model, value, leaves, again=exact)
            for total, slope in zip(totals.values(), slopes):
                total += share * slope.to(total.dtype).square()


def _slopes(model: nn.Module, value: Tensor, leaves: list[nn.Parameter], *, again: bool = False) -> Sequence[Tensor]:
    """Return the gradient of a scalar; that of a sharded model passes through `.grad`, where FSDP2 leaves the mean over processes."""
    if not is_sharded(model):
        return torch.autograd.grad(value, leaves, retain_graph=again, allow_unused=True, materialize_grads=True)
    kept = [(weight, weight.grad) for weight in model.parameters()]
    for weight, _ in kept:
        weight.grad = None
    value.backward(retain_graph=again)
    slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for weight, before in kept:
        weight.grad = before
    return slopes
