r"""SAE-guided unlearning: move the hidden states of the forgotten entities to where the model keeps entities that it has never known.

Forgetting is defined as a state: at one block and place of the prompt, the code of a target in a sparse autoencoder must look like the codes of unknown
entities. Nothing is pushed at the output, so the model says of the target what it says of strangers, and the layers above stay as they are.

Paper: Yamashita et al. 2025, "Sparse-Autoencoder-Guided Internal Representation Unlearning for Large Language Models", arXiv 2509.15631.
Objective: L = attract A + alpha B + lam L_ret; A = \|z - mu_U\|^2 / D^2, B = max(0, margin - \|z - mu_K\| / D), D = \|mu_K - mu_U\|,
L_ret = hold \|h_l(x_r) - h_l0(x_r)\|^2 / var + NLL(x_r).

| paper | here | shape | default |
|---|---|---|---|
| targets T | forget rows, column `name`; a question must hold its name. Answers are never read | | |
| K, U: known and unknown entities | names of the retain and the holdout rows, told apart by the model's own answers (`labels`) | | asked |
| l and the position | layer, position: the best held-out probe (never the last block by itself) | | auto, auto |
| enc, D | sae: a file, identity, or `None`: a TopK one of factor x D latents is trained | (D, N) | None, 8, k 16 |
| S, by s_i = f_K(i) - f_U(i), shares of prompts where z_i > 0 | latents: how many, or all; common: share of the tokens of `text` above which one is dropped | (m,) | 64, 2 % |
| z, the plain ReLU code | code: relu, or own (the autoencoder's) | (B, m) | relu |
| alpha, m_r, lambda (ours) | alpha, margin, lam; hold | scalars | 0.2, 1, 1; 10 |
| variants of A (ours) | distance: mean, mmd, sliced; suppress: push down latents that fire for T alone, after CRISP (arXiv 2508.13650) | name | mean |
| stop at this AUC of T against U, T as far from K as U is | stop, looked at every `every` steps | scalar | 0.55, 10 |

Differs from the paper: only its abstract was available; loss, layers and constants are ours, known and unknown after Ferrando et al. (arXiv 2411.14257).
Retain rows without a name are held and not compared. NLL is over supervised tokens. mmd and sliced compare the targets of each micro-batch.
Stopping looks at the first probe on the questions: judge by the retrained one and the paraphrases in the note `sae-unlearning`, and by what the model says.
Steps and rate are the trainer's (the desk: 150 steps of 16, rate 5e-4); an epoch is a pass over the forget rows. Cost: the answers of all candidates, the
autoencoder, then per step a forward pass of l blocks with gradients, one of the whole model, and one of l blocks as they were, of which a copy is held.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.adapters import add_lora, merge_lora
from remanence.models.roles import ATTENTION, MLP, ROLES, blocks, pick
from remanence.models.sae import SparseAutoencoder, explained_variance, fitting, identity_sae, load_sae, train_sae
from remanence.models.taps import output_of, tap
from remanence.seeds import derive
from remanence.stream import Request
from remanence.training.activations import PLACES, at_places, real_tokens, row_shift
from remanence.training.batches import Batch
from remanence.training.codes import GAPS, common_latents, firing, gap_to, own_latents, separating
from remanence.training.knowledge import GROUPS, Knowledge, Labels, internal_verdict, read_knowledge, states_of
from remanence.training.losses import nll
from remanence.training.questions import ask
from remanence.training.reference import frozen_copy
from remanence.training.requests import retain_of
from remanence.training.trainer import Step, Trainer

CHOICES = {"position": (None, *PLACES), "distance": ("mean", *GAPS, "suppress"), "code": ("relu", "own")}
COUNTS = ("latents", "rank", "every", "factor", "k", "sae_steps", "tokens", "enough")  # fields that are 1 or more
TRAINED_VARIANCE = 0.95  # that an autoencoder trained here should explain


@dataclass(frozen=True)
class State:
    """What the objective compares with; all of it from the model as it was, and frozen.

    Args:
        knowledge: block, place, prompts and probe.
        sae: of that block.
        chosen: latents that count.
        codes: of the train prompts on these latents: known, unknown, target.
        variance: mean squared distance of the candidates' hidden states from their mean.
        report: for the ledger.
    """

    knowledge: Knowledge
    sae: SparseAutoencoder
    chosen: Int[Tensor, "m"]
    codes: Mapping[str, Float[Tensor, "N m"]]
    variance: float
    report: dict[str, Any]


@dataclass(frozen=True)
class SAEUnlearning:
    """Make known entities look unknown inside.

    Args:
        sae: path of an autoencoder of the block `layer`; `identity`: steer the raw hidden states; `None`: train one.
        layer: number of the block whose output is moved, from 0; `None` takes the one whose probe tells known from unknown best.
        position: entity (last token of the name) | prompt (last token before the answer); `None` takes the better one.
        latents: how many latents count; `None`: all.
        text: text file (any format of kind text); latents that fire on more than `common` of its tokens are dropped.
        common: see `text`.
        attract: weight of the pull to unknown codes.
        alpha: weight of the push away from known codes.
        margin: distance from the known mean, in units of D, at which the push ends.
        lam: weight of what holds the retain rows; at 0 they are not trained on.
        hold: weight of the hidden states in it.
        distance: mean | mmd | sliced | suppress.
        code: relu | own.
        rank: of an adapter on the blocks up to `layer`, merged at the end; `None` trains these blocks themselves (or an adapter that is there).
        stop: AUC of target against unknown that ends training; `None`: never.
        every: steps between two looks at it.
        labels: asked: the model's answers say which candidates it knows | given: retain entities are known, holdout entities are not.
        samples: sampled answers per question, beside the greedy one.
        enough: of these must be right.
        tokens: longest answer.
        fewest: known and unknown entities that are needed, each.
        least_auc: of known against unknown on held-out entities; below it there is nothing to move.
        least_variance: that the autoencoder must explain.
        factor: latents per dimension of a trained autoencoder.
        k: latents that fire at a time in it.
        sae_steps: its training steps.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    sae: str | None = None
    layer: int | None = None
    position: str | None = None
    latents: int | None = 64
    text: str | None = None
    common: float = 0.02
    attract: float = 1.0
    alpha: float = 0.2
    margin: float = 1.0
    lam: float = 1.0
    hold: float = 10.0
    distance: str = "mean"
    code: str = "relu"
    rank: int | None = None
    stop: float | None = 0.55
    every: int = 10
    labels: str = "asked"
    samples: int = 4
    enough: int = 3
    tokens: int = 16
    fewest: int = 20
    least_auc: float = 0.75
    least_variance: float = 0.8
    factor: int = 8
    k: int = 16
    sae_steps: int = 1200

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise Mistake(
                    f"sae-unlearning.{name}", f"unknown value {getattr(self, name)!r}", nearest(getattr(self, name), filter(None, known))
                )
        for name, value in vars(self).items():
            least = 1 if name in COUNTS else 0
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise Mistake(f"sae-unlearning.{name}", f"must be {least} or more, and finite, got {value!r}", "correct the value")
        self._labels()
        if self.sae not in (None, "identity") and self.layer is None:
            raise Mistake("sae-unlearning.layer", "an autoencoder belongs to one block", "say which block's output it reads")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Read what is known, fit the state, move the targets, and note the internal verdict; a target that reads as unknown already is left alone.

        Raises:
            Mistake: what `fit_state` raises, or nothing to train below the block.
        """
        state = self.fit_state(model, request, trainer)
        before = self.verdict(model, state, trainer)
        report = state.report | {"request": request.name, "before": before, "steps": 0}
        if self._arrived(before):
            warnings.warn(f"request '{request.name}': the targets read as unknown already, nothing is done", stacklevel=2)
            trainer.note("sae-unlearning", report)
            return model
        begun, flags = trainer.steps_done, [(weight, weight.requires_grad) for weight in model.parameters()]
        if self.rank is None:
            self.move(model, state, request, trainer)
        else:
            low = pick(model, (*ATTENTION, *MLP), layers=range(state.knowledge.number + 1), kind="weight")
            seed = derive(trainer.seed, "sae", "lora")
            adapted = add_lora(model, self.rank, 2 * self.rank, [weight.module for weight in low], seed)
            self.move(adapted, state, request, trainer)
            model = merge_lora(adapted)
            for weight, flag in flags:
                weight.requires_grad_(flag)
        trainer.note("sae-unlearning", report | {"steps": trainer.steps_done - begun, "after": self.verdict(model, state, trainer)})
        return model

    def verdict(self, model: nn.Module, state: State, trainer: Trainer) -> dict[str, float]:
        """Return `internal_verdict` on a model, after whatever method, and the distances of the targets' mean code to mu_K and mu_U in units of D."""
        knowledge, sae = state.knowledge, state.sae
        mean = (
            sae.encode(states_of(model, knowledge.train["target"], knowledge, trainer).to(sae.b_dec), self.code)[:, state.chosen]
            .mean(0)
            .cpu()
        )
        goals = {group: state.codes[group].mean(0) for group in ("known", "unknown")}
        away = {f"to {group}": ((mean - goal).norm() / (goals["known"] - goals["unknown"]).norm()).item() for group, goal in goals.items()}
        return internal_verdict(model, knowledge, trainer) | away

    def fit_state(self, model: nn.Module, request: Request, trainer: Trainer) -> State:
        """Tell known from unknown, read or train the autoencoder, and select its latents; the model is not changed.

        Raises:
            Mistake: not a language model, another kind than qa, too few entities, no signal, or an autoencoder that does not fit the block.
        """
        ask("sae-unlearning", model, request)
        if str(trainer.accelerator.distributed_type).endswith("FSDP"):
            raise Mistake("sae-unlearning", "cannot look into a sharded model", "run it in one process, or replicated")
        pick(model, ROLES, layers=[self.layer or 0])  # refuses a layer that is not there
        choice: dict[str, Any] = {"labels": self._labels(), "number": self.layer, "place": self.position, "least": self.least_auc}
        knowledge = read_knowledge(model, request, trainer, **choice)
        everyone = torch.cat(list(knowledge.candidates.values()))
        if self.sae is None:
            sae = train_sae(knowledge.candidates, trainer, factor=self.factor, k=self.k, steps=self.sae_steps)
        else:
            sae = identity_sae(knowledge.width) if self.sae == "identity" else load_sae(self.sae)
        sae = fitting(sae, everyone, f"block {knowledge.number}", self.least_variance, TRAINED_VARIANCE if self.sae is None else 0.0)
        fires = {group: firing(sae.encode(hidden)) for group, hidden in knowledge.hidden.items()}
        allowed = None if self.text is None else ~common_latents(model, sae, knowledge.number, self.text, self.common, trainer)
        if self.distance == "suppress":
            chosen = own_latents(fires["target"], fires["known"], self.latents)
        else:
            chosen = separating(fires["known"], fires["unknown"], None if self.sae == "identity" else self.latents, allowed)
        if not len(chosen):
            raise Mistake("sae-unlearning.latents", "no latent is left", "raise `common`, or take another autoencoder")
        codes = {group: sae.encode(hidden, self.code)[:, chosen] for group, hidden in knowledge.hidden.items()}
        report = dict(knowledge.report) | {
            "block": knowledge.number,
            "position": knowledge.place,
            "explained_variance": explained_variance(sae, everyone),
            "explained_variance_target": explained_variance(sae, knowledge.hidden["target"]),
            "latents": chosen.tolist(),
            "distance": (codes["known"].mean(0) - codes["unknown"].mean(0)).norm().item(),
        }
        return State(knowledge, sae, chosen, codes, everyone.var(0, correction=0).sum().item(), report)

    def _labels(self) -> Labels:
        return Labels(self.labels, self.samples, self.enough, self.tokens, self.fewest, "sae-unlearning")

    def move(self, model: nn.Module, state: State, request: Request, trainer: Trainer) -> None:
        """Train the blocks up to the state's."""
        device, names, number = trainer.accelerator.device, blocks(model), state.knowledge.number
        block, above = names[number], names[number + 1] if number + 1 < len(names) else None
        inside = {weight.name for weight in pick(model, ROLES, layers=range(number + 1))}
        moving = [name for name, weight in model.named_parameters() if weight.requires_grad and name in inside]
        if not moving:
            raise Mistake("sae-unlearning", f"no parameter up to block {number} requires a gradient", "free some")
        held = self.lam > 0
        retain = trainer.batches(retain_of(request, "SAE unlearning"), request.kind, stream="retain") if held else None
        pairs = trainer.pairs(state.knowledge.train["target"].batches(trainer, "forget"), retain)
        reference = frozen_copy(model, moving).to(device) if held else model
        sae, chosen = state.sae.to(device), state.chosen.to(device)
        distance = self._distance(state, trainer)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            rows = batch["forget"]
            hidden = at_places(output_of(model, rows, block, before=above), rows[state.knowledge.place])
            value = distance(sae.encode(hidden, self.code)[..., chosen]).sum() / rows.rows
            if not held:
                return value
            kept = batch["retain"]
            with tap(model, [block], detach=False) as seen:
                answers = nll(model, kept)
            with torch.no_grad():
                before = output_of(reference, kept, block, before=above)
            moved = row_shift(seen[block][-1], before, real_tokens(kept["labels"])).sum() / kept.rows
            return value + self.lam * (self.hold * moved / state.variance + answers)

        def enough(model: nn.Module, step: Step) -> bool:
            look = self.stop is not None and (step.number + 1) % self.every == 0
            return look and self._arrived(internal_verdict(model, state.knowledge, trainer, most=200, retrained=False))

        trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs), parameters=moving, after_step=enough)

    def _distance(self, state: State, trainer: Trainer) -> Callable[[Tensor], Tensor]:
        """Return the forget term of codes (B, m), one value per row (of a distribution's distance the micro-batch's, in equal shares)."""
        known, unknown, target = (state.codes[group].to(trainer.accelerator.device) for group in GROUPS)
        mean, centre, span = known.mean(0), unknown.mean(0), (known.mean(0) - unknown.mean(0)).norm()
        gap = gap_to(self.distance, unknown, known, trainer.generator("sae", "slices")) if self.distance in GAPS else None

        def apart(codes: Tensor) -> Tensor:
            if gap is not None:
                return gap(codes).expand(len(codes))
            if self.distance == "suppress":
                return codes.relu().mean(-1) / target.relu().mean()
            return attraction(codes, centre, span)

        return lambda codes: self.attract * apart(codes) + self.alpha * repulsion(codes, mean, span, self.margin)

    def _arrived(self, found: Mapping[str, float]) -> bool:
        """Say whether targets read as unknown, and known entities are as far from them as from the unknown ones."""
        near = self.stop is not None and found["target vs unknown"] <= self.stop
        return near and found["known vs target"] >= found["known vs unknown"] - 0.03


def attraction(codes: Float[Tensor, "B m"], unknown: Float[Tensor, "m"], span: Float[Tensor, ""]) -> Float[Tensor, "B"]:
    """Return A = ||z - mu_U||^2 / D^2 of each row (ours)."""
    return (codes - unknown).square().sum(-1) / span.square()


def repulsion(codes: Float[Tensor, "B m"], known: Float[Tensor, "m"], span: Float[Tensor, ""], margin: float) -> Float[Tensor, "B"]:
    """Return B = max(0, margin - ||z - mu_K|| / D) of each row (ours)."""
    return (margin - (codes - known).norm(dim=-1) / span).relu()
