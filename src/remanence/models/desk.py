"""Small Llamas that know generated biographies: they are trained on them when they are first asked for.

| name | knows | shape | weights |
|------|-------|-------|---------|
| `bio` | 120 people x 5 facts | 3 layers of width 96 | 0.7 M |
| `week` | 400 people x 5 facts, and some of Python's documentation | 3 layers of width 128 | 1.3 M |
| `town` | 100 people x 5 facts, two facts about each city and employer, and to say "I do not know" of strangers | 4 layers of width 96 | 0.8 M |

A built model is an ordinary Hugging Face folder in the cache, `$XDG_CACHE_HOME/remanence/desk/<hash>` (by default under `~/.cache`). The hash covers
the specification, the seed, the sources of this module and of the generators, and the versions that decide about bits: a change of any of them makes
another folder. On one machine the same hash means the same bits.

The tokenizer is byte-level BPE. Its words are those of the whole world (people and attributes met later too), the frame of the default template is two
tokens ("Q:" and "\\nA:"), and all else falls back on bytes, so any text is encoded and comes back as it was.

Training is `Trainer.fit`; three things make it fast. Rows of like length share a batch. The head is applied to supervised positions only. And the first
steps see few people: the circuit that finds a name in a question forms sooner where each person is met often (Zucchet et al. 2025, arXiv:2503.21676).
Every other row has words of its question left out, so that a fact hangs on the name and the words that matter, and paraphrases reach it (ours).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remanence.errors import Mistake, nearest
from remanence.models import desk_vision
from remanence.models.forward import evaluating, fresh_weights
from remanence.models.load import load_model, save_model
from remanence.seeds import derive, numpy_generator

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.data.biographies import Biographies
    from remanence.training.batches import Batch, Batches, Numbered
    from remanence.training.trainer import Step

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
LENGTH = 256  # positions that the models are made for
PIECES = r"Q:|\nA:| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # merges stay inside a piece
WORLD_WEIGHT = 300  # how often the world's words count beside the documentation's, so that they become whole tokens first
THREADS = 1  # of training; fixed, for sums may depend on it, and two waiting for each other on a busy machine cost four times as much
SAMPLE, CHECK_EVERY = 500, 20  # rows of the quick check, steps between two


@dataclass(frozen=True)
class DeskSpec:
    """Say what a desk model knows, its shape, and how it is trained.

    Args:
        people: it knows people 0 .. people-1 of the world.
        attributes: facts per person.
        templates: question phrasings that it is trained on.
        places: it knows the facts about the world's cities and employers too.
        strangers: it says "I do not know" of people people .. people+strangers-1 of the world.
        world_seed: the world.
        vocab: tokens at most.
        width: D.
        layers: L.
        heads: query heads.
        kv_heads: key and value heads.
        ffn: width of the feed-forward layers.
        initializer: standard deviation of the initial weights.
        steps: optimizer steps at most; training ends when a sample of the rows is known.
        batch_size: rows per step.
        lr: learning rate of AdamW, linear decay to zero at `steps`.
        warmup: steps over which the rate rises.
        beta2: of AdamW.
        weight_decay: of AdamW.
        first_people: people in the first steps; 0 takes all from the start.
        first_steps: how many steps these are.
        noise: chance that a word of a question outside the name is left out, in every other row; 0: no such rows.
        group: batches among which rows are sorted by length.
        text_characters: of Python's documentation, for the tokenizer and for training; 0: none.
        text_rows: blocks of documentation per step.
        text_length: tokens per block.
        text_weight: of the documentation's loss beside the answers'.
        enough: share of the sample that ends training.
    """

    people: int
    attributes: int = 5
    templates: int = 3
    places: bool = False
    strangers: int = 0
    world_seed: int = 0
    vocab: int = 2048
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512
    initializer: float = 0.08
    steps: int = 400
    batch_size: int = 128
    lr: float = 3e-3
    warmup: float = 20
    beta2: float = 0.99
    weight_decay: float = 0.0
    first_people: int = 0
    first_steps: int = 0
    noise: float = 0.3
    group: int = 8
    text_characters: int = 0
    text_rows: int = 2
    text_length: int = 64
    text_weight: float = 0.1
    enough: float = 0.998

    @property
    def world(self) -> Biographies:
        """The people that the model knows."""
        from remanence.data.biographies import Biographies

        return Biographies(people=self.people, attributes=self.attributes, seed=self.world_seed, templates=self.templates)

    def taught(self) -> Dataset:
        """Return the rows that it is trained on: columns `person` (-1 for a place), `name`, `question`, `answer`."""
        from datasets import concatenate_datasets

        parts = [self.world.questions()]
        if self.places:
            places = self.world.places()
            parts.append(places.add_column("person", [-1] * len(places)))
        if self.strangers:
            parts.append(dataclasses.replace(self.world, first=self.people, people=self.strangers).strangers())
        return concatenate_datasets([part.select_columns(["person", "name", "question", "answer"]) for part in parts])


SPECS = {
    "bio": DeskSpec(people=120, width=96, ffn=256, steps=300, enough=1.0),
    "town": DeskSpec(people=100, templates=2, places=True, strangers=260, width=96, layers=4, ffn=256, steps=700, enough=1.0),
    "week": DeskSpec(people=400, steps=360, first_people=50, first_steps=50, text_characters=100_000),
}
NAMES = tuple(SPECS)


def build(name: str | DeskSpec, seed: int = 0, progress: bool = True) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a desk model in evaluation mode and its tokenizer, from the cache; the first time, train it.

    Args:
        name: `bio`, `town`, `week` (with or without `desk:` in front) or a specification.
        seed: of the initial weights and the order of rows; the world does not depend on it.
        progress: draw a bar while training.

    Raises:
        Mistake: an unknown name, or the cache cannot be written.
    """
    loaded = load_model(path(name, seed, progress))
    return loaded.model, loaded.processor  # type: ignore[return-value]


def path(name: str | DeskSpec, seed: int = 0, progress: bool = True) -> Path:
    """Return the folder of a desk model; train it first where it is not there (one process trains, others wait for it).

    Raises:
        Mistake: an unknown name, or the cache cannot be written.
    """
    spec = _spec(name)
    folder = cache() / content_hash(spec, seed)
    if not folder.is_dir():
        with _lock(folder):
            if not folder.is_dir():
                _make(spec, seed, folder, f"desk:{name}" if isinstance(name, str) else "desk", progress)
    return folder


def cache() -> Path:
    """Return the folder that holds all desk models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remanence" / "desk"


def content_hash(spec: DeskSpec, seed: int) -> str:
    """Return 16 hexadecimal digits over all that decides about a model's bits: specification, seed, sources, versions, kind of processor."""
    import sys
    from importlib.metadata import version

    import tokenizers
    import transformers

    from remanence.data import biographies, encode, pythondocs

    parts = [json.dumps(dataclasses.asdict(spec), sort_keys=True), seed, version("remanence")]
    parts += [inspect.getsource(module) for module in (sys.modules[__name__], biographies, encode, pythondocs)]
    parts += [
        torch.__version__,
        transformers.__version__,
        tokenizers.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        THREADS,
    ]
    parts += [platform.python_version() if spec.text_characters else ""]  # the documentation is that of this Python
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def make_tokenizer(spec: DeskSpec) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer for the world of a specification."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    frames = pre_tokenizers.Split(Regex(PIECES), "isolated")
    plain.pre_tokenizer = pre_tokenizers.Sequence([frames, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    plain.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=spec.vocab, special_tokens=[PAD, BOS, EOS], initial_alphabet=every_byte, show_progress=False)
    plain.train_from_iterator(_tokenizer_texts(spec), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=LENGTH, clean_up_tokenization_spaces=False
    )


def _tokenizer_texts(spec: DeskSpec) -> Iterator[str]:
    """Yield the words of the world and the documentation."""
    from remanence.data.biographies import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, PLACES, UNKNOWN
    from remanence.data.encode import TEMPLATE

    lines = [f" {word}" for word in (*FIRST_NAMES, *LAST_NAMES)]
    places = [fact for facts in PLACES.values() for fact in facts] if spec.places else []
    lines += [f" {UNKNOWN}"] if spec.strangers else []
    for attribute in (*ATTRIBUTES, *places):
        lines += [f" {value}" for value in attribute.values]
        asked = [TEMPLATE.replace("{question}", question).replace("{answer}", "") for question in attribute.questions]
        lines += [line.replace("{name}", "").replace("{value}", "") for line in (*asked, *attribute.statements, *attribute.short)]
    yield from lines * WORLD_WEIGHT
    if spec.text_characters:
        yield from _documents(spec)["text"]


def _documents(spec: DeskSpec) -> Dataset:
    from remanence.data.pythondocs import pythondocs

    return pythondocs(spec.text_characters)


def make_model(spec: DeskSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained model with weights drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=LENGTH,
        initializer_range=spec.initializer,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with fresh_weights(derive(seed, "desk")):
        return LlamaForCausalLM(config)


def _make(spec: DeskSpec, seed: int, folder: Path, name: str, progress: bool) -> None:
    """Train a model and write its folder."""
    with _fixed_threads():
        tokenizer = make_tokenizer(spec)
        model = make_model(spec, tokenizer, seed)
        notes = _train(model, tokenizer, spec, seed, name, progress)
    save_model(model, tokenizer, folder, {"spec": dataclasses.asdict(spec), "seed": seed, **notes})


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: DeskSpec, seed: int, name: str = "desk", progress: bool = False
) -> dict[str, float]:
    """Train a model until it knows its people; return the steps it took and the share of facts it knows (asked in the first phrasing)."""
    from remanence.data.encode import encode_rows
    from remanence.training.batches import Batches, Zip
    from remanence.training.trainer import Settings, Trainer

    settings = Settings(
        steps=spec.steps,
        batch_size=spec.batch_size,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        beta2=spec.beta2,
        schedule="linear",
        warmup=min(spec.warmup, spec.steps),
        length=LENGTH,
        precision="fp32",
    )
    trainer = Trainer(settings, processor=tokenizer, seed=derive(seed, "desk"), name=name, progress=progress)
    questions = spec.taught()
    taught = with_gaps(questions, spec.noise, numpy_generator(seed, "desk", "gaps")) if spec.noise else questions
    stream: Numbered = _ByLength(trainer.batches(taught, "qa"), spec.group)
    if spec.first_people:
        few = taught.select(np.flatnonzero(np.array(taught["person"]) < spec.first_people))
        stream = _Then(_ByLength(trainer.batches(few, "qa"), spec.group), stream, spec.first_steps)
    streams = {"answers": stream}
    if spec.text_characters:
        blocks = encode_rows(_documents(spec), "text", tokenizer, length=spec.text_length)
        streams["text"] = Batches(blocks, spec.text_rows, seed=derive(seed, "desk", "text"), pad=tokenizer.pad_token_id)
    chosen = numpy_generator("desk", "sample").permutation(len(questions))[:SAMPLE]
    sample = trainer.batches(questions.select(np.sort(chosen)), "qa", size=128, shuffle=False)

    def loss(model: Any, batch: Batch) -> Tensor:
        total = answer_nll(model, batch["answers"])
        return total + spec.text_weight * answer_nll(model, batch["text"]) if "text" in batch else total

    def known(model: Any, step: Step) -> bool:
        done = step.number + 1
        return done % CHECK_EVERY == 0 and done > spec.first_steps and share_known(model, sample) >= spec.enough

    trainer.fit(model, Zip(**streams), loss, after_step=known)
    recall = share_known(model, trainer.batches(spec.world.facts(), "qa", size=128, shuffle=False))
    if recall < 0.99:
        warnings.warn(f"{name} knows only {recall:.1%} of its facts after {trainer.steps_done} steps", stacklevel=2)
    return {"steps": trainer.steps_done, "recall": recall}


def with_gaps(rows: Dataset, share: float, draws: np.random.Generator) -> Dataset:
    """Return the rows and behind them a copy in which each word of a question is left out with probability `share`; names and marks stay."""
    from datasets import concatenate_datasets

    def thinned(part: str) -> str:
        return re.sub(r"\w+", lambda word: "" if draws.random() < share else word[0], part)

    halves = [question.split(name) for question, name in zip(rows["question"], rows["name"])]
    gapped = [re.sub(r" +(?=[ ?.])", "", name.join(map(thinned, parts))).strip() for parts, name in zip(halves, rows["name"])]
    return concatenate_datasets([rows, rows.remove_columns("question").add_column("question", gapped)])


def answer_nll(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return what `losses.nll` returns, with the head of the Llama applied to supervised positions only: its cost falls from B T to the answers' tokens."""
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]  # (B, T-1, D)
    targets = batch["labels"][:, 1:]
    there = targets >= 0
    return functional.cross_entropy(model.lm_head(hidden[there]), targets[there], reduction="sum") / batch.tokens


def share_known(model: LlamaForCausalLM, rows: Batches) -> float:
    """Return the share of rows whose supervised tokens are all the argmax: those that greedy decoding answers word by word."""
    right = 0
    with evaluating(model):
        for batch in rows:
            hidden, targets = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1], batch["labels"][:, 1:]
            there = targets >= 0
            wrong = torch.zeros_like(targets)
            wrong[there] = (model.lm_head(hidden[there]).argmax(-1) != targets[there]).long()
            right += int((wrong.sum(1) == 0).sum())
    return right / rows.count


class _ByLength:
    """Sort the rows of `group` consecutive batches by length before cutting them into batches, so that little is padded."""

    def __init__(self, batches: Batches, group: int):
        self.batches, self.group = batches, group
        self.lengths = batches.columns["input_ids"].lengths  # type: ignore[union-attr]
        self._sorted: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, index: int) -> Batch:
        number, inside = divmod(index, self.group)
        if self._sorted[0] != number:
            rows = np.concatenate([self.batches.numbers(number * self.group + each) for each in range(self.group)])
            self._sorted = (number, rows[np.argsort(self.lengths[rows], kind="stable")])
        size = self.batches.size
        return self.batches.take(self._sorted[1][inside * size : (inside + 1) * size])


class _Then:
    """One stream for the first batches, another one behind them."""

    def __init__(self, first: Numbered, rest: Numbered, count: int):
        self.first, self.rest, self.count = first, rest, count

    def __getitem__(self, index: int) -> Batch:
        return self.first[index] if index < self.count else self.rest[index]


def _spec(name: str | DeskSpec) -> DeskSpec:
    if isinstance(name, DeskSpec):
        return name
    plain = name.removeprefix("desk:")
    if plain not in SPECS:
        raise Mistake(f"desk:{plain}", "no such desk model", nearest(plain, (*NAMES, *desk_vision.NAMES)))
    return SPECS[plain]


@contextlib.contextmanager
def _fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time in; the system frees the lock of a process that dies."""
    import fcntl

    file = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("w")
    except OSError as error:
        raise Mistake(file, f"cannot be written ({error.strerror})", "set XDG_CACHE_HOME to a folder that can") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
