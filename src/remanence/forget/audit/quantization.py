"""Quantization attack: round the weights, and see whether what was forgotten comes back; small changes may be rounded away (Zhang et al. 2024, 2410.16454).

Rounding is symmetric, to the nearest: w -> s round(w / s), s = max |w| / (2^(bits-1) - 1) over a group of weights of one output, along the
inputs. All linear and convolutional matrices are rounded, but not embeddings and the head, as usual; an adapter is merged first. The
arithmetic is that of a kernel that widens weights again, so it needs no such kernel. Where torchao is installed its int8 weights are tried
too, where bitsandbytes is its nf4 weights. Cost: one copy of the model and one forward pass over the forget rows per number of bits and
model.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from remanence.forget.audit.case import Case
from remanence.models.adapters import merge_lora
from remanence.models.forward import unwrapped

Rounder = Callable[[nn.Module], nn.Module]


def attack_with_quantization(case: Case) -> None:
    """Add the probability of the forget rows under each way of rounding."""
    for name, rounder in rounders(case).items():

        def measure(who: str, part: str, rounder: Rounder = rounder) -> Float[np.ndarray, " N"]:
            return np.exp(-case.nll(rounder(plain_copy(case.models[who])), case.rows(part)))

        try:
            case.compare(f"quantization/{name}", "robustness", measure, original=case.probability)
        except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
            if name.startswith("int"):
                raise
            case.skipped[f"quantization/{name}"] = f"the library fails here ({(str(error).splitlines() or [type(error).__name__])[0]})"
        case.tick(f"quantization {name}")


def rounders(case: Case) -> dict[str, Rounder]:
    """Return the ways of rounding that are there, by name."""
    found: dict[str, Rounder] = {}
    for bits in case.settings.bits:
        found[f"int{bits}"] = lambda model, bits=bits: round_model(model, bits, case.settings.group)  # type: ignore[misc]
    for name, library, rounder in (("torchao-int8", "torchao", by_torchao), ("bitsandbytes-nf4", "bitsandbytes", by_bitsandbytes)):
        if importlib.util.find_spec(library) is None:
            case.skipped[f"quantization/{name}"] = f"{library} is not installed"
        else:
            found[name] = rounder
    return found


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with its adapter merged."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(model)
    mergeable = isinstance(twin, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in twin.modules())
    return merge_lora(twin) if mergeable else twin


@torch.no_grad()
def round_model(model: nn.Module, bits: int, group: int) -> nn.Module:
    """Round the matrices of a model in place and return it."""
    for _, module in matrices(model):
        own: Tensor = module.weight  # type: ignore[assignment]
        weight = own.T if isinstance(module, Conv1D) else own  # Conv1D holds (in, out)
        rounded = round_weights(weight.flatten(1), bits, group).view(weight.shape)
        own.copy_(rounded.T if isinstance(module, Conv1D) else rounded)
    return model


def matrices(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the linear and convolutional modules, the head of a language model left out."""
    core = unwrapped(model)
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    kinds = (nn.Linear, nn.Conv2d, nn.Conv1d, Conv1D)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]


def round_weights(weight: Float[Tensor, "O I"], bits: int, group: int) -> Float[Tensor, "O I"]:
    """Return the weights rounded to 2^bits - 1 levels per group of `group` inputs (0: all of them); a last group may be shorter."""
    inputs, top = weight.shape[1], 2 ** (bits - 1) - 1
    size = group or inputs
    wide = nn.functional.pad(weight.float() if weight.dtype != torch.float64 else weight, (0, -inputs % size))
    blocks = wide.view(len(weight), -1, size)  # (O, groups, size)
    scale = blocks.abs().amax(-1, keepdim=True) / top
    rounded = torch.where(scale > 0, (blocks / scale).round() * scale, 0)
    return rounded.view(len(weight), -1)[:, :inputs].to(weight.dtype)


def by_torchao(model: nn.Module) -> nn.Module:
    """Round by torchao's int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {name for name, module in matrices(model) if isinstance(module, nn.Linear)}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in chosen)
    return model


def by_bitsandbytes(model: nn.Module) -> nn.Module:
    """Round by bitsandbytes' 4-bit normal floats."""
    import bitsandbytes

    with torch.no_grad():
        for _, module in matrices(model):
            if isinstance(module, nn.Linear):
                coded, state = bitsandbytes.functional.quantize_4bit(module.weight.data, quant_type="nf4")
                module.weight.copy_(bitsandbytes.functional.dequantize_4bit(coded, state).to(module.weight.dtype))
    return model
