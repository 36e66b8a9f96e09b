"""Read the activations of named modules while a model runs, the whole of it or as far as is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import logits_of


@contextlib.contextmanager
def tap(model: nn.Module, names: Sequence[str], *, side: str = "output", detach: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what goes into or comes out of modules: `{name: [tensor of each call]}`; the hooks are gone after the block.

    Args:
        model: any module.
        names: as in `model.named_modules()`.
        side: input | output. Of several tensors the first counts (the hidden states of a block, of attention, of an MLP).
        detach: cut the graph; without it gradients flow to what produced the tensor.

    Raises:
        Mistake: an unknown module or side.
    """
    if side not in ("input", "output"):
        raise Mistake("tap", f"unknown side '{side}'", "sides are input and output")
    modules = dict(model.named_modules())
    stranger = next((name for name in names if name not in modules), None)
    if stranger is not None:
        raise Mistake("tap", f"{type(model).__name__} has no module '{stranger}'", nearest(stranger, modules))
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, tensor: Tensor) -> None:
        seen[name].append(tensor.detach() if detach else tensor)

    with contextlib.ExitStack() as hooks:
        for name in names:
            if side == "input":

                def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    keep(name, _first_tensor((*args, *kwargs.values()), name))

                handle = modules[name].register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
                    keep(
                        name,
                        _first_tensor(out if isinstance(out, tuple) else tuple(out.values()) if isinstance(out, dict) else (out,), name),
                    )

                handle = modules[name].register_forward_hook(after)
            hooks.callback(handle.remove)
        yield seen


class _Reached(Exception):
    """Ends a forward pass where what was asked for is there."""


def output_of(model: nn.Module, batch: Mapping[str, Any], name: str, *, before: str | None = None) -> Tensor:
    """Return what a module gives on a batch, with its graph.

    Args:
        model: any module.
        batch: as for `logits_of`.
        name: of the module.
        before: module that runs after it; the pass ends there, so that nothing above is computed. `None` runs the whole model.

    Raises:
        Mistake: an unknown module.
    """
    modules = dict(model.named_modules())
    if before is not None and before not in modules:
        raise Mistake("tap", f"{type(model).__name__} has no module '{before}'", nearest(before, modules))

    def stop(*_: object) -> None:
        raise _Reached

    with contextlib.ExitStack() as hooks:
        seen = hooks.enter_context(tap(model, [name], detach=False))
        if before is not None:
            hooks.callback(modules[before].register_forward_pre_hook(stop).remove)
        with contextlib.suppress(_Reached):
            logits_of(model, batch)
    return seen[name][-1]


def _first_tensor(values: tuple[Any, ...], name: str) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise Mistake("tap", f"no tensor passes '{name}'", "tap a module inside it")
