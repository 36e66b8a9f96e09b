"""Sparsey: binary sparse codes chosen by familiarity, so that one look stores an input and similar inputs get similar codes.

A coding field ("mac") is Q winner-take-all modules of K cells; a code is one winner per module. The code selection algorithm measures how familiar the input
is (G) and adds noise in inverse proportion: a familiar input brings its old code back, a novel one gets a new code at random, what lies between overlaps in
proportion. To learn is to set the binary weights from the active inputs to the winners: no gradient, one trial, a time that does not grow with what is stored.

Superposed Episodic and Semantic Memory via Sparse Distributed Representation, Rinkus and Leveille 2017, arXiv 1710.07829; the algorithm as in Rinkus 2010 and
2014 (Front. Neuroanat. 4:17; Front. Comput. Neurosci. 8:160). The numbers of steps below are cited by the functions:

     1  gate        run only if pi_low <= active inputs <= pi_high
     2  sums        u(i) = sum over active j of F(zeta_j) w(j, i); likewise h(i), d(i)
     3  normalise   U(i) = min(1, u(i) / active inputs)
     4  evidence    V(i) = U^lam_U H^lam_H D^lam_D; on the first frame of an episode V = U^lam_first
     5  familiarity G = mean over modules of max over cells of V
     6  hypotheses  zeta = round(mean over modules of cells within eps of the best); F(zeta) = zeta^A for zeta <= B, else 0
     7  expansivity eta = 1 + (max(0, G - G_min) / (1 - G_min))^g_exp chi K
     8  mu(i) = 1 + (eta - 1) / (1 + exp(-s (V(i) - c)))
     9  rho(i) = mu(i) / sum over its module; one winner per module is drawn (learning); argmax V (recognition)
    10  w(j, i) <- 1 for every active input j and winner i

| symbol | here | shape | default |
|---|---|---|---|
| Q, K | `modules`, `cells` | | |
| w | `weights` | (M, S, Q K) of uint8, M macs, S inputs of each | 0 |
| G_min, g_exp, chi, c, s | `CSAConfig.g_min`, `g_exp`, `chi`, `centre`, `slope` | | 0.2, 2, 100, 0.7, 20 |
| lam, eps, (A, B) | `lam`, `eps`, `hypotheses` | | 1, 0.02, (1, 2) |
| pi | `pi`, counted in active inputs (pixels, or macs below) | | all |
| sat | `freeze`, share of weights set | | 0.5 |
| P, a | `permanence`, `decay` | frames | none, 1 |

Differs from the paper: weights are 0 or 1 (there up to 127). F, lam and the decay curve w(age) = (1 + a/P) / (1 + a/(P - age)) are ours; F weighs what is sent
in recognition, in learning every code sends 1. A field without any active input is left out of the product. Ties of recognition fall by uniforms fixed per
module, so that recognition is a function of input and weights and a batch is the same as its rows. The ratchet moves c from `centre` to 0.9 in step with the
fill of U.

Cost: O(active inputs x Q K) per mac and item to learn, whatever is stored; one product of (N, S) and (S, Q K) to recognise N at once. One byte per weight in
memory (S Q K), one bit on disk; permanence adds 4 bytes per weight and one scan of them per item.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake

RATCHET = 0.9  # where the ratchet leaves the centre


@dataclass(frozen=True)
class CSAConfig:
    """The dial between new codes and old ones.

    Args:
        g_min: familiarity up to which a code is drawn uniformly; to lie above the mean G of inputs never seen.
        g_exp: power of the familiarity above it.
        chi: how far the best cell stands out at full familiarity, in units of K.
        centre: evidence at which the logistic is half way.
        slope: of the logistic.
        ratchet: move the centre towards 0.9 as weights fill.
        lam: powers of U, H and D.
        lam_first: power of U on the first frame of an episode.
        eps: how close to the best a cell must come to count as another hypothesis.
        hypotheses: (A, B): a mac with zeta hypotheses sends zeta^A, and nothing above B.
        backoff: thresholds of G for all fields, all but one, one; None: always all fields. If none is cleared, the most familiar version is kept.
    """

    g_min: float = 0.2
    g_exp: float = 2.0
    chi: float = 100.0
    centre: float = 0.7
    slope: float = 20.0
    ratchet: bool = False
    lam: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lam_first: float = 1.0
    eps: float = 0.02
    hypotheses: tuple[float, int] = (1.0, 2)
    backoff: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.g_min < 1:
            raise Mistake("g_min", f"is {self.g_min}", "a familiarity from 0 to below 1")
        if self.chi < 0 or self.g_exp <= 0 or self.slope <= 0:
            raise Mistake("csa", f"chi={self.chi}, g_exp={self.g_exp}, slope={self.slope}", "chi is at least 0, the others above 0")


class Frame(NamedTuple):
    """What macs did with one frame; a silent mac has code -1, familiarity 0, and sends 0."""

    code: Int[Tensor, "N M Q"]
    familiarity: Float[Tensor, "N M"]
    sent: Float[Tensor, "N M"]


def evidence(
    parts: dict[str, Float[Tensor, "N M Q K"]], present: dict[str, Bool[Tensor, "N M"]], csa: CSAConfig, first: bool
) -> Float[Tensor, "N M Q K"]:
    """Multiply the fields that are present, each to its power (step 4)."""
    if first:
        return _power(parts["U"], csa.lam_first)
    total = torch.ones_like(next(iter(parts.values())))
    for name, lam in zip("UHD", csa.lam, strict=True):
        if name in parts:
            total = total * torch.where(present[name][..., None, None], _power(parts[name], lam), 1.0)
    return total


def _power(value: Tensor, lam: float) -> Tensor:
    return value if lam == 1 else value**lam


def familiarity(V: Float[Tensor, "*M Q K"]) -> Float[Tensor, "*M"]:
    """Average the best evidence of each module (step 5); summed in order, so that the loop gets the same bits."""
    return V.amax(-1).cumsum(-1)[..., -1] / V.shape[-2]


def signal(V: Float[Tensor, "*M Q K"], csa: CSAConfig) -> Float[Tensor, "*M"]:
    """Return F(zeta), the weight of what a mac sends when several codes fit equally (step 6)."""
    power, most = csa.hypotheses
    zeta = (V.amax(-1, keepdim=True) - csa.eps <= V).double().sum(-1).mean(-1).round()
    return torch.where(zeta <= most, zeta**power, 0.0)


def expansivity(G: Float[Tensor, "*M"], cells: int, csa: CSAConfig) -> Float[Tensor, "*M"]:
    """Return eta (step 7): 1 for what is novel, up to 1 + chi K."""
    return 1 + ((G - csa.g_min).clamp(min=0) / (1 - csa.g_min)) ** csa.g_exp * (csa.chi * cells)


def preferences(V: Float[Tensor, "*M Q K"], eta: Float[Tensor, "*M"], centre: Float[Tensor, "*M"], slope: float) -> Float[Tensor, "*M Q K"]:
    """Return mu, how much each cell is to be preferred (step 8)."""
    eta, centre = eta[..., None, None], centre[..., None, None]
    return 1 + (eta - 1) / (1 + torch.exp(-slope * (V - centre)))


def draw(mu: Float[Tensor, "*M Q K"], uniforms: Float[Tensor, "*M Q"]) -> Int[Tensor, "*M Q"]:
    """Draw one winner per module in proportion to mu, by inverting the distribution at `uniforms` (step 9)."""
    upto = mu.cumsum(-1)
    return (upto <= uniforms[..., None] * upto[..., -1:]).sum(-1).clamp(max=mu.shape[-1] - 1)


def strongest(V: Float[Tensor, "*M Q K"], uniforms: Float[Tensor, "*M Q"]) -> Int[Tensor, "*M Q"]:
    """Return the cell of most evidence in each module (step 9, recognition); among n ties the floor(n u)-th."""
    upto = (V.amax(-1, keepdim=True) == V).cumsum(-1)
    return (upto <= (uniforms * upto[..., -1]).long()[..., None]).sum(-1)


def back_off(
    parts: dict[str, Float[Tensor, "N M Q K"]], present: dict[str, Bool[Tensor, "N M"]], csa: CSAConfig
) -> Float[Tensor, "N M Q K"]:
    """Return the evidence of the first version that is familiar enough: all fields, then the best without one, then the best alone.

    Per mac: of the versions that leave out n of the fields present, the one of largest G, for the smallest n whose threshold it clears.
    """
    versions = [kept for size in range(1, len(parts) + 1) for kept in itertools.combinations(parts, size)]
    V = torch.stack([evidence({name: parts[name] for name in kept}, present, csa, first=False) for kept in versions])  # (C, N, M, Q, K)
    there = torch.stack([torch.stack([present[name] for name in kept]).all(0) for kept in versions])  # (C, N, M)
    size = torch.tensor([len(kept) for kept in versions], device=V.device)[:, None, None]
    left_out = torch.stack(list(present.values())).sum(0) - size
    G = torch.where(there, familiarity(V), -1.0)
    chosen = G.argmax(0)
    for number, threshold in reversed(list(enumerate(csa.backoff or ()))):
        best, which = torch.where(left_out == number, G, -1.0).max(0)
        chosen = torch.where(best >= threshold, which, chosen)
    return V.gather(0, chosen[None, ..., None, None].expand(1, *V.shape[1:]))[0]


def weight_at_age(age: Int[Tensor, "*S"], window: int, decay: float) -> Float[Tensor, "*S"]:
    """Return what is left of a weight set `age` frames ago and not again since: 1 at first, 0 from `window` on (ours)."""
    left = (window - age).clamp(min=1).double()
    return torch.where(age < window, (1 + decay / window) / (1 + decay / left), 0.0)


def activity(code: Int[Tensor, "N M Q"], sent: Float[Tensor, "N M"], cells: int) -> Float[Tensor, "N units"]:
    """Spread codes over all cells of their macs, each winner with the weight that its mac sends; the last unit is always off (padding)."""
    count, macs, modules = code.shape
    place = torch.arange(macs * modules, device=code.device).view(macs, modules) * cells + code
    silent = code < 0
    found = torch.zeros(count, macs * modules * cells + 1, dtype=torch.float64, device=code.device)
    found.scatter_(1, torch.where(silent, macs * modules * cells, place).flatten(1), sent[..., None].expand(code.shape).flatten(1).double())
    found[:, -1] = 0
    return found
