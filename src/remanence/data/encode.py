"""From rows to what a model reads: one `datasets.Dataset` of tensors per (rows, kind, processor), kept in Arrow.

| kind | columns out | supervised |
|------|-------------|------------|
| text | input_ids, labels: documents joined by the end token, cut into blocks of `length` | every token |
| qa | input_ids, labels: the template filled in, the end token | the answer and the end token |
| chat | input_ids, labels: the tokenizer's chat template | the assistant's turns |
| classes, images | pixel_values float32, labels int64 | the label |
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import Mistake
from remanence.seeds import derive
from remanence.stream import check_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

IGNORED = -100
FORMAT = 1  # raise it when the same rows shall give other inputs: encoded sets in the cache start anew
TEMPLATE = "Q: {question}\nA: {answer}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing a bar per map."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def encode_rows(rows: Dataset, kind: str, processor: Any, *, length: int = 256, template: str = TEMPLATE) -> Dataset:
    """Turn rows into model inputs.

    Args:
        rows: the data, with the columns of its kind.
        kind: text | qa | chat | classes | images.
        processor: tokenizer (text, qa, chat), image processor or `None` (classes, images).
        length: longest row in tokens; longer questions with answers are refused, text is cut into blocks of this length.
        template: of kind qa, with `{question}` and `{answer}` at its end.

    Raises:
        Mistake: wrong columns, no tokenizer, a template without its places, a row longer than `length`.
    """
    check_rows("data", rows, kind)
    with _quiet():
        if kind in ("classes", "images"):
            return _encode_images(rows, kind, processor)
        if processor is None or not callable(getattr(processor, "encode", None)):
            raise Mistake(
                "data", f"kind '{kind}' needs a tokenizer and the model has none", "add the tokenizer's files to the model's folder"
            )
        options: dict[str, Any] = {"tokenizer": processor, "length": length}
        more: dict[str, Any] = {"remove_columns": rows.column_names}
        # named by content, not by pickling the tokenizer on every call, which takes longer than encoding a small set
        more["new_fingerprint"] = f"{derive(rows._fingerprint, kind, length, template, _identity(processor), FORMAT):016x}"
        if kind == "text":
            return rows.map(_blocks, batched=True, fn_kwargs=options, **more)
        if kind == "qa":
            return rows.map(_answers, batched=True, with_indices=True, fn_kwargs=options | {"prompt": _prompt(template)}, **more)
        return rows.map(_turns, fn_kwargs=options, **more)


@functools.lru_cache(maxsize=8)
def _identity(tokenizer: Any) -> str:
    """Return what decides about a tokenizer's output."""
    core = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(repr((core, tokenizer.special_tokens_map, tokenizer.chat_template)).encode()).hexdigest()


def _prompt(template: str) -> str:
    if "{question}" not in template or not template.endswith("{answer}"):
        raise Mistake("template", f"{template!r} must hold {{question}} and end with {{answer}}", f"the default is {TEMPLATE!r}")
    return template[: -len("{answer}")]


def _blocks(batch: dict[str, list], tokenizer: Any, length: int) -> dict[str, list]:
    """Join documents with the end token and cut the line into blocks of `length`; a remainder of one token has no target and is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
    line = np.fromiter((token for row in ids for token in (*row, *end)), np.int64)
    cut = [line[first : first + length].tolist() for first in range(0, len(line), length)]
    cut = [block for block in cut if len(block) > 1]
    return {"input_ids": cut, "labels": cut}


def _answers(batch: dict[str, list], numbers: list[int], tokenizer: Any, length: int, prompt: str) -> dict[str, list]:
    """Fill in the template; supervise the tokens that end behind the prompt (a token across the border belongs to the answer)."""
    prompts = [prompt.replace("{question}", question) for question in batch["question"]]
    texts = [front + answer for front, answer in zip(prompts, batch["answer"])]
    borders = [len(front.rstrip()) for front in prompts]  # a space before the answer may be part of its first token
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: dict[str, list] = {"input_ids": [], "labels": []}
    if tokenizer.is_fast:
        coded = tokenizer(texts, add_special_tokens=True, return_offsets_mapping=True, verbose=False)
        starts = [
            next((n for n, (_, stop) in enumerate(spans) if stop > border), len(spans))
            for spans, border in zip(coded["offset_mapping"], borders)
        ]
    else:
        coded = tokenizer(texts, add_special_tokens=True, verbose=False)
        starts = [len(row) for row in tokenizer([text[:border] for text, border in zip(texts, borders)], verbose=False)["input_ids"]]
    for number, answer, ids, start in zip(numbers, batch["answer"], coded["input_ids"], starts):
        ids = ids if ids[-1:] == end else ids + end
        if len(ids) > length:
            raise Mistake(f"row {number}", f"has {len(ids)} tokens, the longest allowed is {length}", "raise `length` or shorten the row")
        if not answer.strip() or start >= len(ids):
            raise Mistake(f"row {number}", "the answer is empty", "give every question an answer")
        found["input_ids"].append(ids)
        found["labels"].append([IGNORED] * start + ids[start:])
    return found


def _turns(row: dict[str, Any], tokenizer: Any, length: int) -> dict[str, list]:
    """Apply the chat template turn by turn; supervise what each assistant turn added."""
    if tokenizer.chat_template is None:
        raise Mistake("data", "kind 'chat' needs a tokenizer with a chat template", "set `chat_template` or use kind 'qa'")
    messages = row["messages"]
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=True, return_dict=False)
        if whole[: len(ids)] != ids:
            raise Mistake("data", "the chat template rewrites earlier turns", "use a template that only appends")
        new = whole[len(ids) :]
        labels += new if message["role"] == "assistant" else [IGNORED] * len(new)
        ids = whole
    return {"input_ids": ids[:length], "labels": labels[:length]}


def feature_columns(rows: Dataset) -> dict[str, Tensor] | None:
    """Return `pixel_values` (N, ...) float32 and `labels` (N,) int64 of rows of kind classes, straight out of Arrow.

    The same numbers as `encode_rows` in a hundredth of the time, which counts where a stream arrives in handfuls of rows. `None` where the features are not
    of one shape, or are missing somewhere.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import torch

    chosen = None if rows._indices is None else rows._indices.column(0).to_numpy()
    values, shape = rows.data.column("features").combine_chunks(), []
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        ends = pc.min_max(pc.list_value_length(values))
        if values.null_count or ends["min"].as_py() != ends["max"].as_py():
            return None
        shape.append(ends["min"].as_py())
        values = values.flatten()
    labels = rows.data.column("label")
    if values.null_count or labels.null_count or not len(labels):
        return None
    features, classes = values.to_numpy(zero_copy_only=False).reshape(-1, *shape), labels.to_numpy()
    if chosen is not None:
        features, classes = features[chosen], classes[chosen]
    # copies: Arrow's memory is read-only
    return {"pixel_values": torch.from_numpy(features.astype(np.float32)), "labels": torch.from_numpy(classes.astype(np.int64))}


def _encode_images(rows: Dataset, kind: str, processor: Any) -> Dataset:
    """Return features as stored tensors; images as a view that decodes and processes the rows of a batch when it is taken."""
    import datasets

    if kind == "images":
        kept = rows.select_columns(["image", "label"])
        return kept.with_transform(functools.partial(_pixels, processor=processor))

    def convert(batch: dict[str, list]) -> dict[str, Any]:
        return {"pixel_values": np.asarray(batch["features"], np.float32), "labels": np.asarray(batch["label"], np.int64)}

    example = convert(rows[:1])["pixel_values"][0]
    inner = datasets.Value("float32")
    shape: Any = datasets.Sequence(inner) if example.ndim == 1 else getattr(datasets, f"Array{example.ndim}D")(example.shape, "float32")
    features = datasets.Features({"pixel_values": shape, "labels": datasets.Value("int64")})
    named = f"{derive(rows._fingerprint, kind, FORMAT):016x}"  # by content, as in `encode_rows`
    return rows.map(convert, batched=True, batch_size=256, remove_columns=rows.column_names, features=features, new_fingerprint=named)


def _pixels(batch: dict[str, list], processor: Any) -> dict[str, Any]:
    """Turn decoded images into pixel values: by the model's processor, or scaled to [0, 1] with channels first."""
    if processor is not None:
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="np")["pixel_values"]
    else:
        sizes = {(image.size, image.mode) for image in batch["image"]}
        if len(sizes) > 1:
            raise Mistake(
                "data", f"the images differ in size or mode ({sorted(map(str, sizes))[:2]})", "use a model with an image processor"
            )
        pixels = np.stack([np.asarray(image, np.float32) / 255 for image in batch["image"]])
        pixels = pixels if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return {"pixel_values": np.asarray(pixels, np.float32), "labels": np.asarray(batch["label"], np.int64)}
