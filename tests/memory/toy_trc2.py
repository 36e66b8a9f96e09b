"""A TRC2 small enough for tests, whose side loops say something from the start."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from remanence.memory.slots import SlotMemory
from remanence.memory.trc2 import TRC2Config, TRC2ForCausalLM
from remanence.models.forward import fresh_weights
from remanence.training.trainer import Settings, Trainer
from toy import toy_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts": 4,
    "rank": 8,
    "trn_groups": 2,
    "slots": 16,
    "read_k": 4,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
}


def made(seed: int = 0, *, alive: bool = True, **changes: Any) -> TRC2ForCausalLM:
    """Return a model; alive: its side loops say something, its slots are filled and every second position is an event."""
    with fresh_weights(seed):
        model = TRC2ForCausalLM(TRC2Config(**SHAPE | changes))
        if alive:
            with torch.no_grad():
                for layer in model.layers:
                    if layer.self_attn.modulate is not None:
                        layer.self_attn.modulate.weight.normal_()
                for thalamus in model.thalami:
                    thalamus.gates.weight.normal_()
                hippocampus = model.hippocampus
                if hippocampus is not None:
                    hippocampus.fast.weight.normal_()
                    hippocampus.out.weight.normal_()
                    memory = hippocampus.memory
                    memory.write(F.normalize(torch.randn(12, 32), dim=-1), torch.randn(12, 32), torch.rand(12))
    return model.eval()


def tokens(seed: int = 1, rows: int = 3, length: int = 19) -> Tensor:
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def trained_step(model: TRC2ForCausalLM, ids: Tensor) -> None:
    """Take one step by hand, up to the writes."""
    model.train()
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()


LONG: dict[str, Any] = {"slot_span": 32, "slots": 64, "merge_cosine": 2.0}  # no span is cut, and nothing merges


def filled(model: TRC2ForCausalLM, ids: Tensor, **more: Tensor) -> TRC2ForCausalLM:
    """Write the slots of one step of training, from empty ones."""
    model.memory.clear()
    model.train()
    loss = model(ids, labels=ids, **more).loss
    assert loss is not None
    loss.backward()
    model.zero_grad()
    model.after_step()
    assert model.memory.filled.any()
    return model.eval()


def moved(model: TRC2ForCausalLM, by: float = 0.1) -> TRC2ForCausalLM:
    """Move every weight, as training would."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=draw)
    return model


def span_of(memory: SlotMemory, slot: int) -> list[int]:
    return memory.span_ids[slot, : int(memory.span_length[slot])].tolist()


def entry(model: TRC2ForCausalLM, text: list[int]) -> tuple[Tensor, Tensor]:
    """Return key and value of a text's last token by a plain forward pass, the stream being caught behind the injection column."""
    caught: list[Tensor] = []
    hook = model.layers[model.config.inject].register_forward_hook(lambda _, __, out: caught.append(out[0]))
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
    hook.remove()
    assert model.hippocampus is not None
    h = caught[0][0, -1]
    return F.normalize(model.hippocampus.to_key.weight @ h, dim=-1).detach(), (model.hippocampus.to_value.weight @ h).detach()


def lines(kind: str, rows: int = 12) -> Dataset:
    return Dataset.from_dict({"text": [f"{kind} number {number} and what follows it" for number in range(rows)]})


def trainer(owner: Any = None, steps: int = 3, **more: Any) -> Trainer:
    return Trainer(Settings(steps=steps, batch_size=4, length=24), processor=toy_tokenizer(99), owner=owner, progress=False, **more)
