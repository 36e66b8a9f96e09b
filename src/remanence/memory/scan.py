r"""The loop over chunks of a test-time memory (dual.py), with its backward pass written out by hand: fewer and larger operations than autograd's.

Per chunk and layer the forward pass is dual.py's: gradients a outer delta at the chunk's start, reading as masked linear attention, and one update of
weights and momentum. The backward pass goes through the same chunks in reverse and needs the second derivative of the inner network: of gelu,
phi(z) (2 - z^2), and of the layer norm's backward pass. Tests hold both to `dual.read_write_reference`.

Kept for the backward pass per chunk: the weights and momentum that entered it and six activations of width E. With `recompute` = g the insides of g chunks
at a time are computed again instead: weights are then kept once per g chunks, for a third more time.
"""

from __future__ import annotations

from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from remanence.memory.gates import Steps
from remanence.memory.inner import Bias, Norm, Weights, finish, gelu_with_slopes, layer_norm_backward, standardised


class Chunks(NamedTuple):
    """What C chunks read and write."""

    q: Float[Tensor, "C N b D"]
    k: Float[Tensor, "C N b D"]
    v: Float[Tensor, "C N b D"]
    extra: Float[Tensor, "C N b E"] | None


class Kept(NamedTuple):
    """What the backward pass of a chunk needs: per layer inputs, slopes and deltas, of keys and of queries."""

    W: Weights
    S: Weights
    a: list[Tensor]
    slope: list[Tensor]
    bent: list[Tensor]  # d delta_l / d z_l: back-propagated error times the second derivative of gelu
    delta: list[Tensor]
    out: Tensor  # zhat with a norm, the prediction without
    std: Tensor | None
    r: Tensor
    x: list[Tensor]
    query_slope: list[Tensor]
    scores: list[Tensor]
    query_zhat: Tensor | None
    query_std: Tensor | None


def scan(
    bias: Bias, W: Weights, S: Weights, chunks: Chunks, steps: Steps, norm: Norm | None, closed: int, recompute: int
) -> tuple[Float[Tensor, "C N b D"], Weights, Weights]:
    """Read C chunks; return what is read, and weights and momentum behind the first `closed`, which are all or all but the last."""
    train = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (*chunks, *steps, *(norm or ()), *W, *S))
    size = recompute if recompute and train else max(closed, 1)
    count = len(chunks.q)
    lengths = [min(size, closed - begin) for begin in range(0, closed, size)] + [1] * (count - closed)
    groups = zip(
        *(repeat(None) if one is None else one.split(lengths) for one in (*chunks, *steps))
    )  # one node: slices would each fill a whole gradient
    ys = []
    for number, part in enumerate(islice(groups, len(lengths))):
        y, *ends = _Scan.apply(bias, train, bool(recompute), len(W), *part, *(norm or (None, None)), *W, *S)
        ys.append(y)
        if number < len(lengths) - (count - closed):
            W, S = tuple(ends[: len(W)]), tuple(ends[len(W) :])
    return ys[0] if len(ys) == 1 else torch.cat(ys), W, S


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Bias, train: bool, again: bool, depth: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.bias, ctx.depth = bias, depth
        ctx.save_for_backward(*tensors)
        y, W, S, ctx.kept = _forward(bias, depth, tensors, keep=train and not again)
        return y, *W, *S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_ends: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            kept = ctx.kept or _forward(ctx.bias, ctx.depth, ctx.saved_tensors, keep=True)[3]
            chunks, steps, norm, W, _ = _named(ctx.depth, ctx.saved_tensors)
            dW, dS = list(d_ends[: len(W)]), list(d_ends[len(W) :])
            d_chunks = Chunks(*(part if part is None else torch.empty_like(part) for part in chunks))  # type: ignore[arg-type]
            d_steps = Steps(*(part if part is None else torch.zeros_like(part) for part in steps))  # type: ignore[arg-type]
            d_norm = None if norm is None else [torch.zeros_like(part) for part in norm]
            for c in reversed(range(len(dy))):
                here, gates = Chunks(*_at(chunks, c)), Steps(*_at(steps, c))
                back = backward_chunk(ctx.bias, kept.pop(), here, gates, norm, dy[c], dW, dS, Steps(*_at(d_steps, c)), d_norm)
                for whole, part in zip(d_chunks, back, strict=True):
                    if whole is not None and part is not None:
                        whole[c] = part
        return (None, None, None, None, *d_chunks, *d_steps, *(d_norm or (None, None)), *dW, *dS)


def forward_chunk(
    bias: Bias, W: Weights, S: Weights, chunk: Chunks, gates: Steps, norm: Norm | None, keep: bool
) -> tuple[Float[Tensor, "N b D"], Weights, Weights, Kept | None]:
    """Read one chunk; return what is read, weights and momentum behind it, and what its backward pass needs."""
    q, k, v, extra = chunk
    a, slope, bends, bent, std = [k], list[Tensor](), list[Tensor](), list[Tensor](), None
    for weight in W[:-1]:
        value, its_slope, bend = gelu_with_slopes(torch.bmm(a[-1], weight), keep)
        a.append(value)
        slope.append(its_slope)
        if bend is not None:
            bends.append(bend)
    out = torch.bmm(a[-1], W[-1])
    if norm is None:
        r = bias(out, v, extra)
        delta = [r]
    else:
        out, std = standardised(out)
        r = bias(torch.addcmul(k, out, norm[0]) + norm[1], v, extra)
        delta = [layer_norm_backward(r * norm[0], out, std)]
    for l in reversed(range(len(W) - 1)):
        error = torch.bmm(delta[0], W[l + 1].mT)
        delta.insert(0, error * slope[l])
        if keep:
            bent.insert(0, error.mul_(bends[l]))
    x, query_slope, scores, z = [q], [], [], q
    for l, weight in enumerate(W):
        scores.append(torch.bmm(x[l], a[l].mT))
        z = torch.bmm(x[l], weight).mul_(gates.beta)
        if gates.f is not None:
            z.addcmul_(torch.bmm(x[l], S[l]), gates.f)
        z.baddbmm_(scores[l] * gates.G, delta[l], alpha=-1)
        if l < len(W) - 1:
            value, its_slope, _ = gelu_with_slopes(z, False)
            x.append(value)
            query_slope.append(its_slope)
    query_zhat, query_std = (None, None) if norm is None or not keep else standardised(z)
    y = finish(z, q, norm)
    new_W, new_S = [], []
    for l, weight in enumerate(W):
        new = weight * gates.last_beta
        if gates.last_f is not None and gates.last_m is not None and gates.last_n is not None:
            new.addcmul_(S[l], gates.last_f)
            new_S.append((S[l] * gates.last_m).baddbmm_(a[l].mT, delta[l] * gates.last_n, alpha=-1))
        new_W.append(new.baddbmm_(a[l].mT, delta[l] * gates.last_G, alpha=-1))
    kept = Kept(W, S, a, slope, bent, delta, out, std, r, x, query_slope, scores, query_zhat, query_std) if keep else None
    return y, tuple(new_W), tuple(new_S), kept


def backward_chunk(
    bias: Bias, kept: Kept, chunk: Chunks, gates: Steps, norm: Norm | None, dy: Tensor, dW: list[Tensor], dS: list[Tensor], d_gates: Steps,
    d_norm: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Go back through one chunk: return the gradients by q, k, v and extra; turn dW and dS from those behind it into those before it, and fill the rest."""
    da, d_delta = _through_write(kept, gates, dW, dS, d_gates)
    dq = _through_read(kept, gates, norm, dy, dW, dS, da, d_delta, d_gates, d_norm)
    dk, dv, d_extra = _through_gradients(bias, kept, chunk, norm, dW, da, d_delta, d_norm)
    return dq, dk, dv, d_extra


def _through_write(kept: Kept, gates: Steps, dW: list[Tensor], dS: list[Tensor], d_gates: Steps) -> tuple[list[Tensor], list[Tensor]]:
    """Go back through W <- beta W + f S - a^T diag(G) delta and S <- m S - a^T diag(n) delta; return the gradients by a and delta."""
    da, d_delta = [], []
    for l, (a, delta) in enumerate(zip(kept.a, kept.delta, strict=True)):
        by_delta = torch.bmm(a, dW[l])
        d_gates.last_beta.add_((kept.W[l] * dW[l]).sum((1, 2), keepdim=True))
        d_gates.last_G.sub_((by_delta * delta).sum(-1, keepdim=True))
        da.append(torch.bmm(delta, dW[l].mT).mul_(gates.last_G).neg_())
        d_delta.append(by_delta.mul_(gates.last_G).neg_())
        if gates.last_f is not None and gates.last_m is not None and gates.last_n is not None:
            d_gates.last_f.add_((kept.S[l] * dW[l]).sum((1, 2), keepdim=True))  # type: ignore[union-attr]
            d_gates.last_m.add_((kept.S[l] * dS[l]).sum((1, 2), keepdim=True))  # type: ignore[union-attr]
            by_delta = torch.bmm(a, dS[l])
            d_gates.last_n.sub_((by_delta * delta).sum(-1, keepdim=True))  # type: ignore[union-attr]
            d_delta[l].addcmul_(by_delta, gates.last_n, value=-1)
            da[l].addcmul_(torch.bmm(delta, dS[l].mT), gates.last_n, value=-1)
            dS[l] = (dS[l] * gates.last_m).addcmul_(dW[l], gates.last_f)
        dW[l] = dW[l] * gates.last_beta
    return da, d_delta


def _through_read(
    kept: Kept, gates: Steps, norm: Norm | None, dy: Tensor, dW: list[Tensor], dS: list[Tensor], da: list[Tensor], d_delta: list[Tensor],
    d_gates: Steps, d_norm: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    """Go back through z = beta x W + f x S - (G * x a^T) delta, layer by layer; return the gradient by the queries."""
    dz = dy
    if norm is not None and d_norm is not None and kept.query_zhat is not None and kept.query_std is not None:
        d_norm[0].add_((dy * kept.query_zhat).sum(1, keepdim=True))
        d_norm[1].add_(dy.sum(1, keepdim=True))
        dz = layer_norm_backward(dy * norm[0], kept.query_zhat, kept.query_std)
    dx = dz
    for l in reversed(range(len(kept.W))):
        dz = dx * kept.query_slope[l] if l < len(kept.W) - 1 else dz
        x = kept.x[l]
        d_masked = torch.bmm(dz, kept.delta[l].mT).neg_()
        d_delta[l].baddbmm_((kept.scores[l] * gates.G).mT, dz, alpha=-1)
        d_gates.G.addcmul_(d_masked, kept.scores[l])
        d_scores = d_masked.mul_(gates.G)
        da[l].baddbmm_(d_scores.mT, x)
        by_x = torch.bmm(dz, kept.W[l].mT)
        d_gates.beta.add_((x * by_x).sum(-1, keepdim=True))
        dx = by_x.mul_(gates.beta).baddbmm_(d_scores, kept.a[l])
        dW[l].baddbmm_(x.mT, dz * gates.beta)
        if gates.f is not None and d_gates.f is not None:
            by_x = torch.bmm(dz, kept.S[l].mT)
            d_gates.f.add_((x * by_x).sum(-1, keepdim=True))
            dx.addcmul_(by_x, gates.f)
            dS[l].baddbmm_(x.mT, dz * gates.f)
    return dx if norm is None else dx.add_(dy)


def _through_gradients(
    bias: Bias, kept: Kept, chunk: Chunks, norm: Norm | None, dW: list[Tensor], da: list[Tensor], d_delta: list[Tensor], d_norm: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Go back through delta_l = (delta_{l+1} W_{l+1}^T) gelu'(z_l), the error, and the keys' forward pass; return the gradients by k, v and extra."""
    d_bent = []
    for l in range(len(kept.W) - 1):
        d_bent.append(d_delta[l] * kept.bent[l])
        d_error = d_delta[l].mul_(kept.slope[l])
        d_delta[l + 1].baddbmm_(d_error, kept.W[l + 1])
        dW[l + 1].baddbmm_(d_error.mT, kept.delta[l + 1])
    dr, zhat, std, dz_more = d_delta[-1], kept.out, kept.std, None
    prediction = zhat
    if norm is not None and std is not None and d_norm is not None:
        g = kept.r * norm[0]
        dg = layer_norm_backward(dr, zhat, std)
        d_zhat = (dr * (g * zhat).mean(-1, keepdim=True) + g * (dr * zhat).mean(-1, keepdim=True)).div_(-std)
        dz_more = zhat * ((dr * kept.delta[-1]).mean(-1, keepdim=True) / -std)  # through the deviation: d std / d z = zhat / D
        d_norm[0].add_((dg * kept.r).sum(1, keepdim=True))
        dr, prediction = dg * norm[0], torch.addcmul(chunk.k, zhat, norm[0]) + norm[1]
    dp, dv, d_extra = _through_bias(bias, prediction, chunk.v, chunk.extra, dr)
    dz, dk = dp, None
    if norm is not None and std is not None and d_norm is not None and dz_more is not None:
        d_norm[0].add_((dp * zhat).sum(1, keepdim=True))
        d_norm[1].add_(dp.sum(1, keepdim=True))
        dz, dk = layer_norm_backward(d_zhat.addcmul_(dp, norm[0]), zhat, std).add_(dz_more), dp
    for l in reversed(range(len(kept.W))):
        dW[l].baddbmm_(kept.a[l].mT, dz)
        da[l].baddbmm_(dz, kept.W[l].mT)
        if l:
            dz = da[l].mul_(kept.slope[l - 1]).add_(d_bent[l - 1])
    return da[0] if dk is None else da[0].add_(dk), dv, d_extra


def _through_bias(bias: Bias, prediction: Tensor, v: Tensor, extra: Tensor | None, dr: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of a bias function by its three arguments, by autograd."""
    with torch.enable_grad():
        arguments = [part.detach().requires_grad_() for part in (prediction, v, extra) if part is not None]
        error = bias(arguments[0], arguments[1], arguments[2] if extra is not None else None)
        dp, dv, *more = torch.autograd.grad(error, arguments, dr, allow_unused=True, materialize_grads=True)
    return dp, dv, more[0] if more else None


def _forward(bias: Bias, depth: int, tensors: tuple[Tensor | None, ...], keep: bool) -> tuple[Tensor, Weights, Weights, list[Kept]]:
    chunks, steps, norm, W, S = _named(depth, tensors)
    y, kept = torch.empty_like(chunks.q, memory_format=torch.contiguous_format), []
    for c in range(len(y)):
        y[c], W, S, its = forward_chunk(bias, W, S, Chunks(*_at(chunks, c)), Steps(*_at(steps, c)), norm, keep)
        if its is not None:
            kept.append(its)
    return y, W, S, kept


def _named(depth: int, tensors: tuple[Any, ...]) -> tuple[Chunks, Steps, Norm | None, Weights, Weights]:
    norm, weights = tensors[12:14], tensors[14:]
    return Chunks(*tensors[:4]), Steps(*tensors[4:12]), None if norm[0] is None else norm, weights[:depth], weights[depth:]


def _at(parts: tuple[Any, ...], c: int) -> list[Any]:
    return [part if part is None else part[c] for part in parts]
