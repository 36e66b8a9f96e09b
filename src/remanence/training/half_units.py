"""What half fine-tuning (`learn/hft.py`) trains or freezes as one: matrices with what goes with them, how they divide a model, and how a half of them is drawn.

"HFT: Half Fine-Tuning for Large Language Models", Hui et al., ACL 2025, arXiv 2404.18466, section 3; the rules for odd counts are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from remanence.errors import Mistake
from remanence.models.forward import unwrapped
from remanence.models.roles import ATTENTION, MLP, Weight, weights_by_role

FOLLOWS = {"query_norm": "query", "key_norm": "key"}  # norms inside attention go with their matrix
HEAD = ("head", "final_norm")


@dataclass(frozen=True)
class Unit:
    """What is trained or frozen as one: a matrix or norm of a block, with what goes with it."""

    layer: int
    category: str
    names: tuple[str, ...]


def refuse(model: nn.Module) -> None:
    """Refuse models whose matrices do not stand for themselves: with an adapter, or quantised.

    Raises:
        Mistake: saying which.
    """
    from peft import PeftModel

    if any(isinstance(module, PeftModel) for module in model.modules()) or any(".lora_" in name for name, _ in model.named_parameters()):
        raise Mistake("hft", "the model has an adapter, whose base is frozen already", "merge the adapter, or train it without hft")
    strange = next((name for name, parameter in model.named_parameters() if not parameter.is_floating_point()), None)
    config = getattr(unwrapped(model), "config", None)
    if strange is not None or getattr(config, "quantization_config", None) is not None:
        raise Mistake("hft", "the model is quantised", "load it in a floating-point type")


def refuse_optimizer(model: nn.Module, trained: Iterable[str], optimizer: Any) -> None:
    """Refuse an optimizer that holds frozen weights: it could move them by decay or momentum.

    Raises:
        Mistake: naming one of them.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = set(trained)
    strange = next((name for name, parameter in model.named_parameters() if id(parameter) in held and name not in trained), None)
    if strange is not None:
        raise Mistake("hft", f"the optimizer holds the frozen '{strange}'", "make the optimizer after the round has begun")


def divided(model: nn.Module, embeddings: bool, head: bool | None) -> tuple[list[Unit], frozenset[str]]:
    """Return the units of all blocks, and the names of the trained weights outside of blocks.

    Raises:
        Mistake: weights without a known place, or tied embeddings to be frozen on one side only.
    """
    head = embeddings if head is None else head
    found: dict[tuple[int, str, str], list[str]] = {}
    outside, weights = set(), weights_by_role(model, strict=True)
    if head != embeddings and any(weight.tied for weight in weights):
        raise Mistake("hft.train_head", "differs from train_embeddings, but the model has one matrix for both", "set both alike")
    for weight in weights:
        if weight.layer is None:
            if head if weight.role in HEAD else embeddings:
                outside.add(weight.name)
            continue
        found.setdefault((weight.layer, *place(weight)), []).append(weight.name)
    if not found:
        raise Mistake("hft", f"{type(unwrapped(model)).__name__} has no blocks", "use a transformer of a known family")
    return [Unit(layer, category, tuple(names)) for (layer, category, _), names in found.items()], frozenset(outside)


def place(weight: Weight) -> tuple[str, str]:
    """Return a weight's category and its unit inside: attention and MLP by matrix, norms by norm."""
    role = FOLLOWS.get(weight.role, weight.role)
    category = "attention" if role in ATTENTION else "mlp" if role in MLP else "norm"
    return category, role


def drawn(units: list[Unit], ratio: float, level: str, draw: torch.Generator) -> frozenset[str]:
    """Draw the trained names; every unit has the probability `ratio`, whatever the level."""
    layers = sorted({unit.layer for unit in units})
    if level == "layer":
        chosen_layers = {layers[number] for number in sample(len(layers), rounded(ratio * len(layers), draw), draw)}
        chosen = [unit for unit in units if unit.layer in chosen_layers]
    elif level == "model":
        pools = [[unit for unit in units if (unit.category == "norm") == norm] for norm in (False, True)]
        chosen = [pool[number] for pool in pools for number in sample(len(pool), rounded(ratio * len(pool), draw), draw)]
    else:
        chosen = []
        for category in ("attention", "mlp", "norm"):
            blocks = [[unit for unit in units if unit.layer == layer and unit.category == category] for layer in layers]
            for block, count in zip(blocks, balanced([len(block) for block in blocks], ratio, draw)):
                chosen += [block[number] for number in sample(len(block), count, draw)]
    return frozenset(name for unit in chosen for name in unit.names)


def balanced(sizes: list[int], ratio: float, draw: torch.Generator) -> list[int]:
    """Return how many units each block trains: floor or ceil of ratio n, the blocks that round up drawn so that the total is ratio sum(n), rounded."""
    counts = [int(ratio * size + 1e-9) for size in sizes]
    uneven = [number for number, size in enumerate(sizes) if ratio * size - counts[number] > 1e-9]
    more = rounded(sum(ratio * sizes[number] - counts[number] for number in uneven), draw)
    for number in sample(len(uneven), more, draw):
        counts[uneven[number]] += 1
    return counts


def rounded(value: float, draw: torch.Generator) -> int:
    """Round up with the probability of the fraction: the expectation is the value."""
    whole = int(value + 1e-9)
    return whole + (torch.rand(1, dtype=torch.float64, generator=draw).item() < value - whole - 1e-9)


def sample(count: int, size: int, draw: torch.Generator) -> list[int]:
    """Draw `size` of `count` numbers without replacement."""
    return torch.randperm(count, generator=draw)[:size].tolist()


def shares(model: nn.Module, trained: Iterable[str]) -> dict[str, float]:
    """Return the trained share of the blocks' matrices, of the blocks' weights, and of all weights.

    They differ: grouped keys and values are smaller than queries, and in small models embeddings are a large part.
    """
    trained = set(trained)
    units = divided(model, True, True)[0]
    size = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = [unit for unit in units if unit.category != "norm"]
    inside = [name for unit in units for name in unit.names]
    return {
        "share of matrices": sum(unit.names[0] in trained for unit in matrices) / len(matrices),
        "share of block weights": sum(size[name] for name in inside if name in trained) / sum(size[name] for name in inside),
        "share of all weights": sum(size[name] for name in size if name in trained) / sum(size.values()),
    }
