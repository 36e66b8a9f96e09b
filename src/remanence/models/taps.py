"""Read the activations of named modules while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from remanence.errors import Mistake, nearest


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


def _first_tensor(values: tuple[Any, ...], name: str) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise Mistake("tap", f"no tensor passes '{name}'", "tap a module inside it")
