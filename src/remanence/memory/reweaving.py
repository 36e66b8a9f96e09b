"""Contextual memory reweaving: let a decoder with a short window attend to hidden states of salient tokens that left it, put through its own layers.

The paper (Dillon et al. 2025, arXiv 2502.02046) captures intermediate states at several layers, keeps salient ones, reconstructs them layer by layer and weaves
them back into inference, without an external store. It holds no equation, so all below is our realisation, honest to each of its sentences and exact in two
limits: with nothing held it is the model with a window, with everything held it is the model with its whole context.

    score:        a_t = -log p(x_t | x_<t), or attention received, or a mix of z-scores, fixed once, when t leaves the window; the best m are held
    reconstruct:  r_i^l = h_i^l + g_l |h_i^l| U_l V_l RMSNorm([h_i^l ; r_i^(l-1)]),   U_l = 0 at the start, |.| the root mean square
    reweave:      K, V = W_K, W_V of layer l on norm_l(r_i^l), rotated at position p_i; one softmax over [held ; window ; chunk]
                  with the bias log gamma_(l,h) + tau_(l,h) s_i on what is held (s_i: z-score of the salience)

| paper | here | shape | default |
|---|---|---|---|
| w | `window` | tokens visible in front of the running chunk | |
| m | `budget` | entries held per row, the same tokens in all layers | |
| c | `chunk` | tokens between two updates | w / 4 |
| captured layers | `layers` | all, third (every third, shared upwards), or numbers | all |
| salience | `score` | surprisal, attention, random, uniform, recency, mix, or weights of the first two and recency | surprisal |
| reconstruction | `reconstruct` | identity, lowrank, mean (of `group` neighbours), autoenc (a code of d/4) | identity |
| sinks | `sinks` | first tokens, always held | 4 |

    model = reweave(AutoModelForCausalLM.from_pretrained(...), window=1024, budget=256)      # nothing to train
    model.read(tokenizer(long_text, return_tensors="pt").input_ids)                            # into model.memory
    model.generate(tokenizer(question, return_tensors="pt").input_ids, max_new_tokens=50)      # goes on from it
    model.memory.inspect(tokenizer=tokenizer); model.memory.save("book.safetensors"); model.memory.clear()

Differs from the paper: see above. From our sheet: adapters are measured in the size of the state that they change (without |h| a rate of 1e-3 drowned the states of the
first layers, and the loss rose from 2.9 to 4.1 where it now falls to 1.5); the best m are found by one sort per chunk, not a heap; what is stored has the model's precision; z-scores
are by running moments of all that left so far. A mask may hide tokens anywhere: chunks and positions count the tokens that are there.

Cost per token and layer: w + c + m keys instead of T. Held: with identity and original positions 2 m d_kv per layer (keys and values as they are), otherwise
m d per captured layer, from which keys and values are made again once per chunk. "attention" and "mix" need the weights, so they run without fused kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from remanence.errors import Mistake
from remanence.memory.rewoven import Rewoven
from remanence.memory.rewoven_config import RewovenConfig
from remanence.training.batches import Numbered
from remanence.training.trainer import Settings, Trainer


def reweave(
    model: nn.Module,
    window: int,
    budget: int,
    layers: str | Sequence[int] = "all",
    score: str | Mapping[str, float] = "surprisal",
    reconstruct: str = "identity",
    positions: str = "original",
    train: bool = False,
    *,
    chunk: int | None = None,
    sinks: int = 4,
    group: int = 4,
    rank: int = 16,
    seed: int = 0,
) -> Rewoven:
    """Wrap a causal language model so that it reads any length by chunks, with a window and a memory of hidden states.

    Args:
        model: any Hugging Face decoder of a known family; its weights stay as they are.
        window: tokens that stay visible.
        budget: entries held of what left the window; 0 turns the memory off, sinks too.
        layers: where states are captured.
        score: what makes a token worth holding.
        reconstruct: how states become states again.
        positions: original, or rebased (rotary models): packed right in front of the window, so that no distance exceeds budget + window + chunk.
        train: let the reconstructor's parameters be trained; the model's own never are.
        chunk: tokens between two updates.
        sinks: first tokens that are always held.
        group: neighbours in one entry, for reconstruct="mean".
        rank: of the adapters, for reconstruct="lowrank".
        seed: of the initial weights and of score="random".

    Raises:
        Mistake: a setting that cannot work, or a model that cannot be reached into.
    """
    config = RewovenConfig(
        window=window,
        budget=budget,
        layers=layers if isinstance(layers, str) else list(layers),
        score=score if isinstance(score, str) else dict(score),
        reconstruct=reconstruct,
        positions=positions,
        trained=train,
        chunk=chunk,
        sinks=sinks,
        group=group,
        rank=rank,
        seed=seed,
    )
    return Rewoven(config, model)


def train_reweaver(
    model: Rewoven,
    texts: list[str] | tuple[str, ...] | Numbered,
    steps: int,
    *,
    processor: Any = None,
    settings: Settings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Rewoven:
    """Train the reconstructor alone on next tokens of texts longer than the window, by `Trainer.fit`.

    Args:
        model: of `reweave(..., train=True)`.
        texts: strings, or batches by number (`input_ids`, `labels`).
        steps: of the optimizer.
        processor: tokenizer of the strings.
        settings: AdamW 1e-3 and rows of 8 windows unless given.
        seed: of the order.
        progress: show a bar.

    Raises:
        Mistake: the model was not made to be trained, or strings come without a tokenizer.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name.startswith("reconstructor.")]
    if not names:
        raise Mistake("train_reweaver", "the model was made with train=False", "give reweave(..., train=True)")
    length = min(8 * model.settings.window, model.limit or 8 * model.settings.window)
    settings = settings or Settings(steps=steps, batch_size=4, lr=1e-3, length=length)
    trainer = Trainer(settings, processor=processor, seed=seed, name="reweaver", progress=progress)
    if isinstance(texts, list | tuple):
        from datasets import Dataset

        texts = trainer.batches(Dataset.from_dict({"text": list(texts)}), "text")
    trainer.fit(model, texts, steps=steps, parameters=names)  # type: ignore[arg-type]
    return model
