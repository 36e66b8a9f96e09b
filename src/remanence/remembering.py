"""Reading with a language model that has a memory: what the commands `remember`, `ask` and `watch` do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from remanence.errors import Mistake
from remanence.memory.asking import opening
from remanence.memory.latent_buffer import KIND
from remanence.memory.lm_state import LMState
from remanence.memory.reweaving import reweave
from remanence.memory.rewoven import Rewoven
from remanence.memory.rewoven_config import config_of
from remanence.memory.state import MemoryState
from remanence.models.load import Loaded, load_model
from remanence.report.watch import Watched, watched

PIECE = 1 << 16  # characters that are tokenised at a time


def load_reader(spec: str, state: Any = None, weave: Mapping[str, Any] | None = None, *, seed: int = 0) -> Loaded:
    """Load a language model with a memory and its tokenizer, or one without and give it back what leaves a window.

    Args:
        spec: of the model.
        state: what it will go on from, which says how a model without a memory was woven.
        weave: settings of `reweave` for such a model; `None`: as the state says.
        seed: for weights that are drawn.

    Raises:
        Mistake: the model has no memory, or one of its own where it was to be woven, or no tokenizer.
    """
    loaded = load_model(spec, seed=seed, device=torch.accelerator.current_accelerator() or "cpu")
    if loaded.processor is None:
        raise Mistake(spec, "has no tokenizer beside it", "copy the tokenizer's files into its folder")
    own = hasattr(loaded.model, "remember")
    if own and weave is not None:
        raise Mistake("--window", f"is for models without a memory of their own, and {spec} has one", "leave it out")
    if own:
        if state is not None and isinstance(loaded.model, Rewoven) != isinstance(state, MemoryState):
            raise Mistake("state", f"was made by another kind of model than {spec}", "name the model that remembered it")
        return loaded
    if weave is None and getattr(state, "kind", None) == KIND:
        text = _model(loaded).config.get_text_config()
        own_shape = {"model": _model(loaded).config.model_type, "layers": text.num_hidden_layers, "width": text.hidden_size}
        if {name: state.config.get(name) for name in own_shape} != own_shape:
            raise Mistake("state", f"was made by another model than {spec}", "name the model that remembered it")
        weave = config_of(state.config)
    if weave is None:
        remedy = "let it remember with --window, and ask with that state; or train a model with a memory (recipes/quick/titans.yaml)"
        raise Mistake(spec, "has no memory that learns while it reads", remedy)
    loaded.model = reweave(loaded.model, **weave)
    return loaded


def load_state(path: Path | None) -> LMState | MemoryState | None:
    """Read what a model with a memory, or a woven one, holds; `None` for no path.

    Raises:
        Mistake: the file is missing, damaged, or no state of a model.
    """
    if path is None:
        return None
    with contextlib.suppress(Mistake):
        held = MemoryState.load(path)
        if held.kind == KIND:
            return held
    return LMState.load(path)


def weaving(window: int | None, budget: int | None, score: str | None, positions: str | None) -> dict[str, Any] | None:
    """Return the settings of `reweave` that the command line gave; `None` if it gave none.

    Raises:
        Mistake: some, but no window.
    """
    given = {name: value for name, value in (("budget", budget), ("score", score), ("positions", positions)) if value is not None}
    if window is None:
        if given:
            raise Mistake(f"--{next(iter(given))}", "needs a window", "give --window, the tokens that stay visible")
        return None
    return {"window": window, "budget": window // 4} | given


def _model(loaded: Loaded) -> Any:
    return loaded.model


def _beside(state: Any, loaded: Loaded) -> Any:
    """Return a state on the model's device."""
    return None if state is None else state.to(_model(loaded).device)


def read_text(source: str) -> str:
    """Return the text of a file, or of the standard input for `-`.

    Raises:
        Mistake: there is no such file, it is not UTF-8, or it is empty.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Mistake(source, "does not exist", "name a text file, or - for the standard input") from error
    except IsADirectoryError as error:
        raise Mistake(source, "is a folder", "name a text file") from error
    except UnicodeDecodeError as error:
        raise Mistake(source, f"is not UTF-8 (byte {error.start})", "convert it") from error
    if not text:
        raise Mistake(source, "is empty", "give a text to read")
    return text


def remember(loaded: Loaded, text: str, state: Any = None, *, progress: bool = True) -> Any:
    """Return the state behind a text, read in pieces cut at line ends, so that the working memory does not grow with it."""
    from remanence.training.progress import bar

    shown = bar("reads", len(text)) if progress and sys.stderr.isatty() else None
    done = 0
    try:
        for piece in pieces(text):
            state = _model(loaded).remember(piece, loaded.processor, _beside(state, loaded))
            done += len(piece)
            if shown is not None:
                shown.show(done, f"{state.seen:,} tokens, state {state.bytes / 2**20:.1f} MiB")
    finally:
        if shown is not None:
            shown.stop()
    return state


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Yield the text in pieces of about `size` characters, cut behind line ends or spaces where there are some."""
    first = 0
    while first < len(text):
        last = min(first + size, len(text))
        if last < len(text):
            cut = max(text.rfind("\n", first, last), -1)
            cut = cut if cut > first else text.rfind(" ", first, last)
            last = cut + 1 if cut > first else last
        yield text[first:last]
        first = last


def ask(loaded: Loaded, prompt: str, state: Any = None, *, tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
    """Return the continuation of a prompt, greedily or sampled; the state is left as it is."""
    if tokens < 1:
        raise Mistake("--tokens", f"must be 1 or more, got {tokens}", "correct the value")
    if not 0 <= temperature < float("inf"):
        raise Mistake("--temperature", f"must be 0 or more, and finite, got {temperature}", "0 takes the most likely token")
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # generate draws from the device's global generator, which is put back
        return str(_model(loaded).ask(prompt, _beside(state, loaded), loaded.processor, max_new_tokens=tokens, **how))


def watch(loaded: Loaded, text: str, state: Any = None, *, title: str = "", limit: int = 4096) -> Watched:
    """Return what each memory did at each token of a text.

    Raises:
        Mistake: the text has more tokens than `limit`: nobody could look at it.
    """
    encoded = loaded.processor(text, add_special_tokens=False, verbose=False)["input_ids"]
    if state is None and isinstance(loaded.model, Rewoven):
        encoded = opening(loaded.processor) + encoded
    if len(encoded) > limit:
        raise Mistake(
            "text",
            f"has {len(encoded)} tokens, at most {limit} are watched at a time",
            "remember the first part, watch the rest with --state",
        )
    found = _model(loaded).watch(encoded, _beside(state, loaded))
    return watched([loaded.processor.decode([token]) for token in encoded], found, title)
