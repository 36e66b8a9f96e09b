"""Run a model on a batch, whatever wraps it: Hugging Face, PEFT, `torch.compile`, data parallel or plain."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Labels stay out: with them a Hugging Face model computes a loss that nobody asked for.
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "pixel_values")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model below `torch.compile`, data-parallel and PEFT wrappers (its adapters stay in place)."""
    from peft import PeftModel
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


def is_language_model(model: nn.Module) -> bool:
    """Say whether the model reads `input_ids` (a Hugging Face model whose main input they are)."""
    core = unwrapped(model)
    return isinstance(core, PreTrainedModel) and core.main_input_name == "input_ids"


def vocabulary(model: nn.Module) -> int:
    """Return V, the number of logits that a language model gives per token."""
    core = unwrapped(model)
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"{type(core).__name__} is not a language model")
    head = core.get_output_embeddings()
    return head.weight.shape[0] if head is not None else core.config.get_text_config().vocab_size


def positions(model: nn.Module) -> int:
    """Return how many tokens a language model can read at a time, 2^31 where its configuration names no bound."""
    core = unwrapped(model)
    config = core.config.get_text_config() if isinstance(core, PreTrainedModel) else None
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def keeps_logits(model: nn.Module) -> bool:
    """Say whether the model can be asked for the logits of some time steps alone (`logits_to_keep`)."""
    return _takes(type(unwrapped(model)).forward, "logits_to_keep")


@functools.cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of a batch: (B, T, V) for a language model, (B, K) for a classifier.

    A Hugging Face model gets the inputs of the batch by name and never its labels; a plain module gets `pixel_values` (or, without
    them, `input_ids`) as its only argument and returns a tensor or something with `.logits`.
    """
    if isinstance(model, PreTrainedModel) or isinstance(
        unwrapped(model), PreTrainedModel
    ):  # the plain case first: unwrapping costs imports
        return model(**{name: batch[name] for name in INPUTS if name in batch}).logits
    out = model(batch["pixel_values"] if "pixel_values" in batch else batch["input_ids"])
    return out if isinstance(out, Tensor) else out.logits


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Look at a model without leaving a trace: evaluation mode, no gradients.

    Afterwards each submodule's mode and the global generators are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield model
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def fresh_weights(seed: int) -> Iterator[None]:
    """Draw the initial weights of modules built on the CPU inside the block from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs too
        yield


class ByName(nn.Module):
    """Call any model by the names of a batch's columns; returns the logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **columns: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return logits_of(self.model, columns)
