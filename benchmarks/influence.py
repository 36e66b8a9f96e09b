"""One deletion request by IAU and by SSD against their textbook loops (one backward pass per example) and against re-training.

Both sides end with the same weights, which is checked first. `file` compares IAU with the gradient of all rows kept in a file with IAU that passes over
the retain rows. The request is about a twentieth of scikit-learn's digits (a CNN of 24k weights), or of facts about generated people (a Llama of a million).
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fisher import by_loop
from benchmarks.loop import desk_llama
from benchmarks.timing import Figure, figure, paired
from remanence.data.biographies import Biographies
from remanence.data.digits import digits
from remanence.forget.iau import IAU
from remanence.forget.retrain import Retrain
from remanence.forget.ssd import SSD, dampening
from remanence.models.desk import SPECS, make_tokenizer
from remanence.models.desk_vision import build
from remanence.stream import Request, Task
from remanence.training.gradients import save_total_gradient
from remanence.training.trainer import Settings, Trainer

ALPHA = 2.0  # of SSD, on both sides: the automatic threshold needs all ratios at once, which no loop has


def whole(trainer: Trainer, rows: Dataset, kind: str) -> dict[str, Tensor]:
    """Return a set as one batch."""
    return dict(trainer.batches(rows, kind, size=len(rows), shuffle=False)[0])


def ascent_by_loop(model: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], lr: float) -> nn.Module:
    """Take IAU's Adam step with gradients of single examples, one after another."""
    model.eval()
    total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for batch, sign in ((retain, 1.0), (forget, -1.0)):
        labels = batch["labels"]
        count = len(labels) if labels.dim() == 1 else int((labels[:, 1:] != -100).sum())
        for number in range(len(labels)):
            model.zero_grad()
            row = {name: value[number : number + 1] for name, value in batch.items() if name != "labels"}
            out, target = model(**row).logits, labels[number : number + 1]
            if target.dim() == 2:
                out, target = out[:, :-1].flatten(0, 1), target[:, 1:].flatten()
            F.cross_entropy(out, target, reduction="sum", ignore_index=-100).backward()
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    total[name] += sign / count * weight.grad
    for name, weight in model.named_parameters():
        weight.grad = total[name]
    torch.optim.Adam(model.parameters(), lr=lr).step()
    model.zero_grad()
    return model


def dampening_by_loop(model: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> nn.Module:
    """Dampen by the squared gradients of single examples, one after another."""
    special, kept = by_loop(model, forget), by_loop(model, retain)
    gone, stay = len(forget["labels"]), len(retain["labels"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            general = (gone * special[name] + stay * kept[name]) / (gone + stay)
            weight *= dampening(special[name], general, ALPHA, 1.0)[1]
    return model


def gap(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between weights, a share of the largest weight."""
    largest = max(weight.abs().max().item() for weight in one.parameters())
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True)) / largest


def compare(name: str, model: nn.Module, request: Request, settings: Settings, processor: Any, rounds: int) -> list[Figure]:
    """Time every pair on one model and request."""
    from datasets import concatenate_datasets

    rows = concatenate_datasets([request.retain, request.forget])  # type: ignore[list-item]
    task = Task("all", rows, kind=request.kind)

    def event() -> Trainer:
        return Trainer(settings, processor=processor, history=[task], progress=False)

    start = event()
    start.fit(model, start.batches(rows, request.kind))
    forget, retain = (whole(start, part, request.kind) for part in (request.forget, request.retain))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "total.safetensors")
        save_total_gradient(path, model, rows, request.kind, event())

        def fresh(work: Callable[..., nn.Module], *more: Any) -> Callable[[], nn.Module]:
            return lambda: work(copy.deepcopy(model), *more)

        def served(method: Any) -> Callable[[], nn.Module]:
            return lambda: method.forget(copy.deepcopy(model), request, event())

        iau, ssd, kept = served(IAU(guard=0)), served(SSD(alpha=ALPHA)), served(IAU(guard=0, total_gradient=path))
        pairs = {
            "IAU, one backward pass per example / ours": (iau, fresh(ascent_by_loop, forget, retain, 1e-3)),
            "SSD, one backward pass per example / ours": (ssd, fresh(dampening_by_loop, forget, retain)),
            "IAU, pass over the retain rows / file": (kept, iau),
            "IAU, re-training / ours": (iau, served(Retrain())),
            "SSD, re-training / ours": (ssd, served(Retrain())),
        }
        found = []
        for title, (ours, peer) in pairs.items():
            more: dict[str, Any] = {"rows": len(rows)}
            if "re-training" not in title:
                more["largest_gap_of_weights"] = gap(ours(), peer())
            found.append(figure(f"{title}, {name}", *paired(ours, peer, rounds), "speedup", None, more))
        return found


@functools.cache
def people(count: int) -> tuple[Dataset, Any]:
    """Return the facts of people, and a tokenizer that knows their words."""
    return Biographies(people=count).facts(), make_tokenizer(SPECS["town"])


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare on a convolutional net and on a Llama."""
    rounds, epochs = (1, 1) if tiny else (5, 20)
    images = digits("train").shuffle(seed=0).flatten_indices()
    images = images.select(range(60 if tiny else len(images)))
    gone = max(3, len(images) // 20)
    request = Request("a twentieth", images.select(range(gone)), images.select(range(gone, len(images))), kind="classes")
    found = compare("CNN 24k", build("cnn-digits", seed=0), request, Settings(epochs=epochs, batch_size=32), None, rounds)
    facts, tokenizer = people(4 if tiny else 40)
    gone = max(3, len(facts) // 20)
    request = Request("a twentieth", facts.select(range(gone)), facts.select(range(gone, len(facts))))
    llama = desk_llama(1, 32, len(tokenizer)) if tiny else desk_llama(vocab=len(tokenizer))
    return found + compare("Llama 1M", llama, request, Settings(epochs=epochs, batch_size=32, length=64), tokenizer, 1 if tiny else 3)
