"""Low-rank adapters on any family: added by role, merged, or switched off to have the model below as a free reference.

LoRA: W x + (alpha / rank) B A x, with A uniform in +-1/sqrt(in) and B zero (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import fresh_weights, is_language_model
from remanence.models.roles import ATTENTION, MLP, ROLES, weights_by_role
from remanence.seeds import generator

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, targets: Sequence[str] | None = None, seed: int = 0) -> PeftModel:
    """Put a low-rank adapter on the model's matrices and freeze the rest; the function that it computes does not change yet.

    Args:
        model: any model whose weights have roles, or a classifier with linear layers or convolutions.
        rank: of B A.
        alpha: strength; the update counts alpha / rank.
        targets: roles ("query", "value", ...), where "query", "key" and "value" reach a fused matrix too, or names of modules.
            `None` takes all matrices of attention and MLP, in a classifier all but the head.
        seed: of A. The global generator is left as it was.

    Raises:
        Mistake: no such target, a rank below 1, or an adapter is there already.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise Mistake(type(model).__name__, "has an adapter already", "merge it first (merge_lora)")
    if rank < 1:
        raise Mistake("rank", f"{rank} is below 1", "choose 1 or more")
    modules = _modules_for(model, targets)
    transposed = any(weight.axis == 1 for weight in weights_by_role(model, strict=False) if weight.module in modules)
    kind = "CAUSAL_LM" if is_language_model(model) else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=modules,
        bias="none",
        task_type=kind,
        fan_in_fan_out=transposed,
    )
    devices = sorted({weight.device.index or 0 for weight in model.parameters() if weight.is_cuda})
    with torch.random.fork_rng(devices=devices), fresh_weights(seed):
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_A." in name:  # drawn here, so that the adapter is the same on every device
                bound = weight[0].numel() ** -0.5
                fresh = torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator(seed, "lora", name))
                weight.copy_(fresh)
    return adapted


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the adapter into the matrices and return the plain model (the same object that was adapted), all its weights trainable.

    Raises:
        Mistake: there is no adapter, or its weights are not finite.
    """
    adapted = _adapted(model)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise Mistake(
            type(model).__name__, f"the adapter cannot be merged ({error})", "go back to a checkpoint with finite weights"
        ) from error
    return merged.requires_grad_(True)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Switch the adapter off inside the block: the model is what it was before `add_lora`, at no cost in memory.

    Raises:
        Mistake: there is no adapter.
    """
    adapted = _adapted(model)
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]  # PEFT makes every adapter trainable on the way back
    try:
        with adapted.disable_adapter():
            yield model
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _adapted(model: nn.Module) -> PeftModel:
    from peft import PeftModel

    for module in model.modules():  # the wrapper may stand inside torch.compile's or data parallel's
        if isinstance(module, PeftModel):
            return module
    raise Mistake(type(model).__name__, "has no adapter", "add one with add_lora, or `adapter: lora` in the recipe")


def _modules_for(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Return the full names of the modules to adapt."""
    names = dict(model.named_modules())
    if targets is not None and not all(target in ROLES for target in targets):
        missing = next((target for target in targets if not any(_ends(name, target) for name in names)), None)
        if missing is not None:
            raise Mistake(
                "targets", f"'{missing}' is neither a role nor a module of the model", nearest(missing, {*ROLES, *_leaves(names)})
            )
        chosen = [name for name in names if any(_ends(name, target) for target in targets)]
    else:
        default = (*ATTENTION, *MLP) if is_language_model(model) else ("other",)
        wanted = set(targets or default)
        if wanted & {"query", "key", "value"}:
            wanted.add("qkv")
        if wanted & {"gate", "up"}:
            wanted.add("gate_up")
        weights = weights_by_role(model)
        chosen = list(dict.fromkeys(weight.module for weight in weights if weight.role in wanted and weight.kind == "weight"))
    chosen = [name for name in chosen if name and _adaptable(names[name])]
    if not chosen:
        raise Mistake("targets", f"{type(model).__name__} has no matrix for {list(targets or default)}", "name other roles or modules")
    return chosen


def _adaptable(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Conv2d | Conv1D)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _leaves(names: dict[str, nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name, module in names.items() if _adaptable(module)}
