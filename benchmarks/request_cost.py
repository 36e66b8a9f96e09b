"""What one deletion request costs as the model grows: a pass of gradients and one edit (IAU, SSD) against unlearning that trains (NPO, gradient difference).

Llamas of four layers and three widths serve the same request: 20 of 200 facts about generated people. The trained ones take five epochs over the forget rows, as is
common for them. Each row of the table is a method beside IAU; `growth` is its time over that on the narrowest model.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

from benchmarks.influence import people
from benchmarks.loop import desk_llama
from benchmarks.timing import Figure, figure, paired
from remanence.forget.gradient_difference import GradientDifference
from remanence.forget.iau import IAU
from remanence.forget.npo import NPO
from remanence.forget.ssd import SSD
from remanence.stream import Request
from remanence.training.trainer import Settings, Trainer

PEERS: dict[str, Any] = {"ssd": SSD, "npo": NPO, "gradient-difference": GradientDifference}


def run(*, tiny: bool = False) -> list[Figure]:
    """Time the methods at three widths, and print the table."""
    facts, tokenizer = people(4 if tiny else 40)
    gone = max(3, len(facts) // 10)
    request = Request("a tenth", facts.select(range(gone)), facts.select(range(gone, len(facts))))
    found: list[Figure] = []
    narrow: dict[str, float] = {}
    for width in (16, 24, 32) if tiny else (64, 128, 256):
        model = desk_llama(1 if tiny else 4, width, len(tokenizer))
        weights = sum(weight.numel() for weight in model.parameters())

        def serve(make: Any, model: Any = model) -> None:
            trainer = Trainer(Settings(epochs=5, batch_size=16, length=64), processor=tokenizer, progress=False)
            make().forget(copy.deepcopy(model), request, trainer)

        for name, make in PEERS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the model has learned nothing: what is selected or lost does not matter here
                ours, peer = paired(partial(serve, partial(IAU, guard=0)), partial(serve, make), 1 if tiny else 5)
            one = figure(f"a request, Llama of width {width}, {name} / IAU", ours, peer, "speedup", None, {"weights": weights})
            one.more["growth"] = one.peer / narrow.setdefault(name, one.peer)
            one.more["growth_of_IAU"] = one.ours / narrow.setdefault("iau", one.ours)
            found.append(one)
    print(table(found))
    return found


def table(figures: list[Figure]) -> str:
    """Return seconds and ratios as text, a line per width and method."""
    lines = [f"{'weights':>10}  {'request':<55}  {'IAU, s':>8}  {'other, s':>8}  {'ratio':>6}  {'growth':>6}"]
    lines += [
        f"{one.more['weights']:>10,}  {one.name:<55}  {one.ours:>8.3f}  {one.peer:>8.3f}  {one.ratio:>6.2f}  {one.more['growth']:>6.2f}"
        for one in figures
    ]
    return "\n".join(lines)
