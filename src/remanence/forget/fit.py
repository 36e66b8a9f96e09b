r"""Serve a long stream of deletion requests: drop what was deleted before, choose a gentle or a harsh loss by how strongly the model reacts, touch few layers.

Single-shot methods, repeated, wear a model down after tens of requests. For every request x, FIT filters out the chunks that earlier requests have covered
(F), measures the gradient of the loss with respect to the input embeddings and takes random labels, NPO or NPO with a KL term by its size (I), and trains
only the K blocks without which the loss on x changes most (T).

Paper: Xu et al. 2026, "FIT: Defying Catastrophic Forgetting in Continual LLM Unlearning" (v2: "FIT to Forget"), arXiv 2601.21682; code XiaoyuXU1/FIT.

| paper | here | shape | default |
|---|---|---|---|
| theta_0, the model before the first request; M, what was deleted | theta, memory | weights; (M, D) unit vectors | |
| e(c), SimCSE | encoder: self (mean last hidden state of theta_0), sentence (MiniLM, offline), a folder or hub id | (D,) | self |
| c kept if max cos(e(c), M) < tau, or \|NLL(x) - NLL(x without c)\| > eps | tau, eps; tau: .inf filters nothing | nats per token | 0.9, 0.2 |
| chunk | chunk: characters of a text; a question with its answer and a chat are one chunk each | | 128 |
| IMP = \|\|d NLL(x*) / d E(x*)\|\|_F | `importance` | | |
| IMP < low: RLabel, < high: NPO, else NPO+KL | tiers: quantile (tertiles of the last 32 IMPs), or [low, high]; [6, 12] in the code | | quantile |
| s_l = \|NLL without block l - NLL\|; K | `layer_effects`; layers: a number, below 1 a share of the model's | (L,) | 0.25 (8 of 32) |
| NPO: -(2/beta) log sigmoid(beta (s - s_0)); weight of the KL | beta, alpha | | 0.1, 1 |
| cosine to 0.1 of the rate | floor: where the trainer's schedule ends | | 0.1 |

Differs from the paper: KL is KL(p_0 || p), where the code has a cross-entropy. A record that was deleted before, word for word, is dropped without a look. The
loss test is blind where the model knows a text by heart (every NLL is near 0), so by default (guard) a chunk that is no less likely now than under theta_0 is
kept: no earlier request has covered it. The tiers start from 20 draws of retain rows. Windows are the trainer's rows; norms stay frozen, q and k norms too.
If something else than FIT changes the model between two requests, theta_0, M and the tiers begin anew. M and the hashes of records are personal data still.
Cost per request: C embeddings; for suspicious chunks a pass over x, over it without each of them, and under theta_0; IMP: one forward and backward pass;
attribution: about L/2 forward passes (128 tokens of a text; records whole); the steps. Memory: theta_0 beside the model, optimizer state of K blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.blocks import block_weights
from remanence.models.encoders import Encoder, load_encoder
from remanence.models.forward import is_language_model, unwrapped, vocabulary
from remanence.seeds import derive
from remanence.stream import Request, keys_of
from remanence.training.attribution import gradient_and_tokens, importance, layer_effects, nll_and_tokens
from remanence.training.batches import Batch, Batches
from remanence.training.chunks import Chunks, cut_rows, row_sums
from remanence.training.losses import nll
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.processes import is_sharded
from remanence.training.random_labels import RandomLabels
from remanence.training.reference import fingerprint, frozen_copy, mean_kl
from remanence.training.requests import check_terms, retain_of
from remanence.training.trainer import Trainer, make_schedule

if TYPE_CHECKING:
    from datasets import Dataset

ALGORITHMS = ("rlabel", "npo", "npo_kl")
CHOICES = ("effect", "random", "all")
STATE = ("theta", "memory", "window", "requests", "records", "marks")
SEEDS, WINDOW, READ = 20, 32, 128  # draws that start the tiers; IMPs that they look back on; tokens of a text that attribution reads


@dataclass
class FIT:
    """Filter each request, pick its loss by importance, and train only the layers that matter for it.

    Args:
        layers: blocks to train, K; below 1 a share of the model's.
        choose: effect (the K whose absence changes the loss most) | random | all.
        tau: cosine with something deleted from which a chunk is suspicious, in (0, 1]; .inf filters nothing.
        eps: change of the mean NLL, in nats per token, above which a suspicious chunk is kept.
        guard: keep a suspicious chunk, too, whose NLL has not risen by more than eps since theta_0; false is the paper's rule.
        chunk: characters of a text's chunk.
        tiers: quantile, or two limits of the importance.
        algorithm: auto (by the tiers) | rlabel | npo | npo_kl.
        beta: of NPO.
        alpha: weight of the KL term.
        encoder: self | sentence | folder or hub id of an encoder.
        floor: share of the rate at which the trainer's schedule ends.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    layers: float = 0.25
    choose: str = "effect"
    tau: float = 0.9
    eps: float = 0.2
    guard: bool = True
    chunk: int = 128
    tiers: str | tuple[float, float] = "quantile"
    algorithm: str = "auto"
    beta: float = 0.1
    alpha: float = 1.0
    encoder: str = "self"
    floor: float = 0.1
    theta: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    memory: Tensor = field(default_factory=lambda: torch.zeros(0, 0), init=False, repr=False, compare=False)
    window: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    requests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)  # name -> hash of all its rows
    records: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)  # hash of a row -> trained on, or covered
    marks: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # of the weights after the last request
    _frozen: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def need(name: str, good: bool, what: str) -> None:
            if not good:
                raise Mistake(f"fit.{name}", f"must be {what}, got {getattr(self, name)!r}", "correct the value")

        check_terms("fit", 1.0, self.alpha)
        need("layers", 0 < self.layers < 1 or (self.layers >= 1 and float(self.layers).is_integer()), "a share below 1, or 1, 2, ...")
        need("tau", 0 < self.tau <= 1 or self.tau == math.inf, "in (0, 1], or .inf to filter nothing")
        need("eps", 0 <= self.eps < math.inf, "0 or more, and finite")
        need("chunk", self.chunk >= 1, "1 or more")
        need("beta", 0 < self.beta < math.inf, "above 0, and finite")
        need("floor", 0 <= self.floor <= 1, "in [0, 1]")
        limits = isinstance(self.tiers, tuple | list) and len(self.tiers) == 2 and 0 <= self.tiers[0] <= self.tiers[1]
        need("tiers", self.tiers == "quantile" or limits, "quantile, or two limits of which the second is not below the first")
        for name, known in (("choose", CHOICES), ("algorithm", ("auto", *ALGORITHMS))):
            if getattr(self, name) not in known:
                raise Mistake(f"fit.{name}", f"unknown value {getattr(self, name)!r}", nearest(str(getattr(self, name)), known))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Serve one request of the stream: filter, importance, layers, update; a request of which nothing is left changes nothing.

        Raises:
            Mistake: a model that cannot be trained so, no retain rows where NPO+KL may be chosen, a retain row that was to be deleted before, or a
                name that comes back with other rows.
        """
        check_model(model, request, trainer)
        model.to(trainer.accelerator.device)
        if fingerprint(model) != self.marks:  # the first request, or one after which something else has changed the model
            self._begin(model)
        theta_0, hashes = self._theta_0(model).to(trainer.accelerator.device), self._hashes(request)
        fresh = [number for number, key in enumerate(hashes) if self.tau == math.inf or not self.records.get(key, False)]
        chunks = cut_rows(request.forget.select(fresh), request.kind, self.chunk)
        encode = Encoder(theta_0, trainer.processor) if self.encoder == "self" else load_encoder(self.encoder)
        vectors = encode(chunks.texts) if fresh else torch.zeros(0, 0)
        kept = self._filter(model, theta_0, chunks, vectors, trainer)
        report: dict[str, Any] = {"request": request.name, "rows": len(hashes), "seen": len(hashes) - len(fresh)}
        report |= {"kept": int(kept.sum()), "dropped": int((~kept).sum())}
        if kept.any():
            rows = chunks.keep(kept)
            found, limits = self._importance(model, rows, request, trainer)
            algorithm = self.algorithm if self.algorithm != "auto" else ALGORITHMS[sum(found >= limit for limit in limits)]
            chosen, effects = self._layers(model, rows, request.kind, trainer)
            model = self._update(model, theta_0, rows, request, trainer, algorithm, chosen)
            self.memory = torch.cat([self.memory.view(-1, vectors.shape[1]), vectors[kept]])
            self.window = [*self.window, found][-WINDOW:]
            report |= {"importance": found, "limits": list(limits), "algorithm": algorithm, "layers": chosen, "effects": effects}
        trained = set(chunks.owner[kept.numpy()].tolist())  # rows of which a chunk was kept
        self.records = self.records | {hashes[number]: place in trained for place, number in enumerate(fresh)}
        self.requests = self.requests | {request.name: digest(sorted(hashes))}
        self.marks = fingerprint(model)
        trainer.note("fit", report)
        return model

    def _begin(self, model: nn.Module) -> None:
        """Take the model as theta_0, and forget what was deleted."""
        self._frozen = frozen_copy(model)
        own = dict(self._frozen.named_parameters())
        self.theta = {name: own[name].detach() for names in block_weights(model).values() for name in names}
        self.memory, self.window, self.requests, self.records = torch.zeros(0, 0), [], {}, {}

    def _theta_0(self, model: nn.Module) -> nn.Module:
        """Return the model before the first request; after a restart it is made of the saved weights (all others never change)."""
        if self._frozen is None:
            self._frozen = frozen_copy(model)
            self._frozen.load_state_dict(self.theta, strict=False)
        return self._frozen

    def _hashes(self, request: Request) -> list[str]:
        """Return the hash of every row to delete; refuse a request that contradicts an earlier one, or lacks retain rows."""
        place, hashes = f"request '{request.name}'", [digest(key) for key in keys_of(request.forget, request.kind)]
        if self.requests.get(request.name, digest(sorted(hashes))) != digest(sorted(hashes)):
            raise Mistake(place, "was served before with other rows", "give every request a name of its own")
        if self.algorithm in ("auto", "npo_kl"):
            retain_of(request, "FIT", "add retain rows to the request, or set algorithm: npo (or rlabel)")
        kept = keys_of(request.retain, request.kind) if request.retain is not None else []
        back = next((number for number, key in enumerate(kept) if digest(key) in self.records), None)
        if back is not None:
            raise Mistake(place, f"row {back} of its retain set was to be deleted by an earlier request", "remove it from the retain set")
        return hashes

    def _filter(
        self, model: nn.Module, theta_0: nn.Module, chunks: Chunks, vectors: Float[Tensor, "C D"], trainer: Trainer
    ) -> Bool[Tensor, " C"]:
        """Return which chunks to keep: unlike all that was deleted, or of effect on the loss, or (guard) as well known as ever."""

        def sums(model: nn.Module, rows: Dataset | None) -> Tensor:
            return torch.zeros(1, 2).double() if rows is None else row_sums(trainer, model, rows, chunks.kind, nll_and_tokens)

        kept = ~suspicious(vectors, self.memory, self.tau)
        doubt = (~kept).nonzero()[:, 0].numpy()  # (S,)
        if len(doubt):
            owner = torch.from_numpy(chunks.owner[doubt])
            kept[doubt] = removal_effect(sums(model, chunks.rows), sums(model, chunks.rest(doubt)), owner) > self.eps
        doubt = (~kept).nonzero()[:, 0].numpy()
        if self.guard and len(doubt):
            now, before = (sums(each, chunks.alone(doubt)) for each in (model, theta_0))
            kept[doubt] = (now - before)[:, 0] / now[:, 1].clamp(min=1) <= self.eps
        return kept

    def _importance(self, model: nn.Module, rows: Dataset, request: Request, trainer: Trainer) -> tuple[float, tuple[float, float]]:
        """Return IMP of the rows and the limits of the tiers; the first request fills the window with draws of as many retain rows."""
        found = importance(row_sums(trainer, model, rows, request.kind, gradient_and_tokens)[None]).item()
        if not isinstance(self.tiers, str):
            return found, self.tiers
        known = request.retain if request.retain is not None else request.holdout
        if not self.window and known is not None:
            chance = trainer.generator("tiers")
            pool = known.select(torch.randperm(len(known), generator=chance)[: SEEDS * len(rows)].sort().values.numpy())
            sums = row_sums(trainer, model, pool, request.kind, gradient_and_tokens)
            self.window = importance(sums[torch.randint(len(pool), (SEEDS, len(rows)), generator=chance)]).tolist()
        low, high = torch.tensor(self.window or [found], dtype=torch.float64).quantile(torch.tensor([1 / 3, 2 / 3]).double()).tolist()
        return found, (low, high)

    def _layers(self, model: nn.Module, rows: Dataset, kind: str, trainer: Trainer) -> tuple[list[int], list[float]]:
        """Return the blocks to train, and what leaving each of the model's blocks out changes (empty where it is not asked)."""
        held = block_weights(model)
        count = len(held) if self.choose == "all" else int(self.layers) if self.layers >= 1 else max(1, round(self.layers * len(held)))
        if not 1 <= count <= len(held):
            raise Mistake("fit.layers", f"the model has {len(held)} layers, {count} are asked for", "ask for fewer, or for a share below 1")
        if self.choose != "effect":
            order = torch.randperm(len(held), generator=trainer.generator("layers"))
            return sorted(list(held)[place] for place in order[:count].tolist()), []
        if kind == "text":
            head = torch.tensor([trainer.encode(rows, kind)[0]["input_ids"][:READ]])
            batches = Batches({"input_ids": head, "labels": head}, 1, shuffle=False)
        else:
            batches = trainer.batches(rows, kind, shuffle=False)
        effects = layer_effects(trainer, model, batches)
        ranked = effects[list(held)].argsort(descending=True, stable=True)[:count]
        return sorted(list(held)[place] for place in ranked.tolist()), effects.tolist()

    def _update(
        self, model: nn.Module, theta_0: nn.Module, rows: Dataset, request: Request, trainer: Trainer, algorithm: str, chosen: Sequence[int]
    ) -> nn.Module:
        """Train the chosen blocks on the rows, with a new optimizer."""
        held = block_weights(model)
        forget, names = trainer.batches(rows, request.kind, stream="forget"), [name for layer in chosen for name in held[layer]]
        steps = trainer.steps_for(forget)
        how: dict[str, Any] = {"steps": steps, "schedule": make_schedule(trainer.settings, steps, self.floor), "parameters": names}
        if algorithm == "rlabel":
            return trainer.fit(model, RandomLabels(forget, vocabulary(model), seed=derive(trainer.seed, "rlabel")), nll, **how)
        forget = forget.with_column("reference_nll", trainer.over_rows(theta_0, forget, summed_nll))
        retain = trainer.batches(retain_of(request, "FIT"), request.kind, stream="retain") if algorithm == "npo_kl" else None

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            going = batch["forget"]
            value = npo_loss(summed_nll(model, going), going["reference_nll"], self.beta).sum() / going.rows
            return value if retain is None else value + self.alpha * mean_kl(model, theta_0, batch["retain"])

        return trainer.fit(model, trainer.pairs(forget, retain), loss, **how)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next request needs."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name in STATE:
            setattr(self, name, state[name])
        self._frozen = None


def check_model(model: nn.Module, request: Request, trainer: Trainer) -> None:
    """Refuse what FIT cannot train: other than a language model, quantised or sharded weights."""
    name = type(unwrapped(model)).__name__
    if not is_language_model(model) or request.kind not in ("text", "qa", "chat"):
        raise Mistake(f"request '{request.name}'", f"FIT reads language, not kind '{request.kind}' of {name}", "choose another forgetter")
    if any(not weight.is_floating_point() for weight in model.parameters()):
        raise Mistake(name, "its weights are quantised, and FIT changes weights", "load it in bfloat16, and quantise it afterwards")
    if is_sharded(model) or str(trainer.accelerator.distributed_type).endswith("FSDP"):
        raise Mistake("fit", "cannot attribute the layers of a sharded model", "run it in one process, or replicated")


def digest(key: Any) -> str:
    """Return a hash that stands for a row, or for a list of them."""
    return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()


def suspicious(vectors: Float[Tensor, "C D"], memory: Float[Tensor, "M D"], tau: float) -> Bool[Tensor, " C"]:
    """Say which unit vectors have a cosine of tau or more with one in memory; none does where nothing was deleted yet."""
    return (vectors @ memory.T).amax(1) >= tau if len(memory) and len(vectors) else torch.zeros(len(vectors), dtype=torch.bool)


def removal_effect(whole: Float[Tensor, "R 2"], rest: Float[Tensor, "S 2"], owner: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Return |NLL(x) - NLL(x without c)|, mean over tokens, for S chunks: `whole` (summed NLL, tokens) of rows, `rest` of chunk c's row without it.

    Infinite where nothing is left of x (ours): a text alone is never dropped for its looks.
    """
    total = whole.sum(0)
    left = total - whole[owner] + rest
    effect = (total[0] / total[1].clamp(min=1) - left[:, 0] / left[:, 1].clamp(min=1)).abs()
    return torch.where(left[:, 1] > 0, effect, math.inf)
