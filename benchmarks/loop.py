"""`Trainer.fit` against the loop that one would write by hand: what do checkpoints, schedules, exact means and records cost when they are not used?

The hand-written loop has the same data in the same order, the same clipping, and AdamW as `torch.optim.AdamW(model.parameters(), lr)` makes it; it logs
nothing. The trainer's defaults are left on (losses are read and checked every ten steps). Both must end with the same weights. `fused` is the same loop
with `fused=True`, which the trainer always sets: the difference between the two is not the trainer's merit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import Figure, figure, paired
from remanence.models.forward import fresh_weights
from remanence.training.batches import Batches
from remanence.training.trainer import Settings, Trainer

RATE = 1e-3


def desk_llama(layers: int = 4, width: int = 128, vocab: int = 512) -> nn.Module:
    """Return a Llama of the desk's size (a million weights), untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with fresh_weights(0):
        return LlamaForCausalLM(config)


def perceptron(inputs: int = 64, hidden: int = 256, classes: int = 10) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    with fresh_weights(0):
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def minibatches(columns: dict[str, Tensor], size: int, steps: int, orders: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield `steps` batches as a hand-written loop does: whole tensors in memory, one permutation per epoch."""
    done = 0
    for order in orders:
        for first in range(0, len(order), size):
            if done == steps:
                return
            yield tuple(column[order[first : first + size]] for column in columns.values())
            done += 1


def train_llama(model: nn.Module, data: Iterator[tuple[Tensor, ...]], fused: bool | None) -> nn.Module:
    """Train a language model by hand."""
    model.train()
    descent = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)
    for (ids,) in data:
        descent.zero_grad()
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descent.step()
    return model


def train_perceptron(model: nn.Module, data: Iterator[tuple[Tensor, ...]], fused: bool | None) -> nn.Module:
    """Train a classifier by hand."""
    model.train()
    descent = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)
    for images, labels in data:
        descent.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descent.step()
    return model


def compare(
    name: str,
    model: nn.Module,
    batches: Batches,
    columns: dict[str, Tensor],
    by_hand: Callable[[nn.Module, Iterator[tuple[Tensor, ...]], bool | None], nn.Module],
    *,
    steps: int,
    rounds: int,
    goal: float,
) -> list[Figure]:
    """Time `steps` steps both ways, from the same weights, and check that they end with the same ones."""
    epochs = -(-steps * batches.size // batches.count)
    orders = [torch.from_numpy(batches._epoch(number)).clone() for number in range(epochs)]
    ends: dict[str, nn.Module] = {}

    def ours() -> None:
        ends["ours"] = Trainer(Settings(steps=steps, lr=RATE), progress=False).fit(copy.deepcopy(model), batches)

    def peer(fused: bool | None) -> None:
        ends["peer"] = by_hand(copy.deepcopy(model), minibatches(columns, batches.size, steps, orders), fused)

    figures = []
    for kind, fused, wanted in (("AdamW by default", None, goal), ("AdamW fused", True, None)):
        seconds = paired(ours, lambda fused=fused: peer(fused), rounds)
        gap = max((a - b).abs().max().item() for a, b in zip(ends["ours"].parameters(), ends["peer"].parameters(), strict=True))
        if not gap < 10 * RATE:
            raise RuntimeError(f"{name}: the two loops ended {gap:.2g} apart, so they did not do the same work")
        more = {"steps": steps, "largest_gap_of_weights": gap}
        figures.append(figure(f"Trainer.fit / loop by hand, {name}, {kind}", *seconds, "overhead", wanted, more))
    return figures


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare on a Llama of a million weights and on a small perceptron."""
    import datasets

    drawn = torch.Generator().manual_seed(0)
    rows, tokens, vocab = (64, 8, 64) if tiny else (3200, 32, 512)
    ids = torch.randint(vocab, (rows, tokens), generator=drawn)
    lists = ids.tolist()
    text = Batches(datasets.Dataset.from_dict({"input_ids": lists, "labels": lists}), 32, seed=1)
    model = desk_llama(1, 32, vocab) if tiny else desk_llama()
    points = {"pixel_values": torch.randn(32 * 50, 64, generator=drawn), "labels": torch.randint(10, (32 * 50,), generator=drawn)}
    llama_steps, perceptron_steps, rounds = (2, 4, 2) if tiny else (8, 300, 9)
    return [
        *compare("Llama 1M, 32 x 32 tokens", model, text, {"ids": ids}, train_llama, steps=llama_steps, rounds=rounds, goal=1.03),
        *compare(
            "perceptron 64-256-10, 32 rows",
            perceptron(),
            Batches(points, 32, seed=1),
            points,
            train_perceptron,
            steps=perceptron_steps,
            rounds=rounds,
            goal=1.10,
        ),
    ]
