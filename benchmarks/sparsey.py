"""Sparsey: all macs of a level at a time against the loop over macs, cells and inputs, and an item to learn at 100 and at 5,000 stored ones.

The loop does the same work in Python numbers and gives the same codes, bit for bit. What an item costs must not depend on how many are stored.
"""

from __future__ import annotations

import torch

from benchmarks.timing import Figure, figure, paired
from remanence.memory.sparsey import CSAConfig
from remanence.memory.sparsey_level import Field, Macs
from remanence.memory.sparsey_net import Sparsey
from remanence.memory.sparsey_reference import LoopMac
from remanence.seeds import generator


def patterns(count: int, features: int, active: int) -> torch.Tensor:
    """Return rows with the same number of features on."""
    order = torch.rand(count, features, generator=generator("patterns", features)).argsort(1)[:, :active]
    return torch.zeros(count, features, dtype=torch.bool).scatter_(1, order, True)


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare."""
    macs, modules, cells, rounds = (2, 3, 4, 1) if tiny else (9, 12, 12, 5)
    items = patterns(2 if tiny else 10, 100, 12)
    padded = torch.nn.functional.pad(items.double(), (0, 1))
    signals = [dict.fromkeys(item.nonzero()[:, 0].tolist(), 1.0) for item in items]
    uniforms = torch.rand(len(items), macs, modules, generator=generator("uniforms"), dtype=torch.float64)
    drawn = uniforms.tolist()

    def vectorised() -> None:
        level = Macs({"U": Field(torch.arange(100).expand(macs, -1), 100, modules, cells)}, modules, cells)
        for x, uniform in zip(padded, uniforms, strict=True):
            level.learn({"U": x[None]}, uniform, first=True)

    def loop() -> None:
        level = [LoopMac({"U": 100}, modules, cells, csa=CSAConfig()) for _ in range(macs)]
        for seen, uniform in zip(signals, drawn, strict=True):
            for mac, own in zip(level, uniform, strict=True):
                mac.learn({"U": seen}, own, first=True)

    figures = [
        figure(
            f"learn {len(items)} frames, {macs} macs of {modules} x {cells}, loop / vectorised",
            *paired(vectorised, loop, rounds),
            "speedup",
        )
    ]
    few, many, size = (10, 50, 5) if tiny else (100, 5000, 200)
    shown = patterns(many + size, 400, 20)
    memories = {count: Sparsey.mac(400, 24, 64, freeze=1.0).partial_fit(shown[:count]) for count in (few, many)}

    def learn(count: int) -> None:
        memories[count].partial_fit(shown[many:])

    seconds = paired(lambda: learn(many), lambda: learn(few), rounds)
    each = {
        f"milliseconds_at_{count}": 1000 * sorted(one for one, _ in times)[rounds // 2] / size
        for count, times in zip((many, few), seconds, strict=True)
    }
    figures.append(figure(f"learn an item with {many} stored / with {few}", *seconds, "overhead", 1.1, each))
    whole = memories[many]
    rows = shown[:size]
    figures.append(
        figure(
            f"recognise {size} items, one by one / at once",
            *paired(lambda: whole.encode(rows), lambda: [whole.encode(row[None]) for row in rows], rounds),
            "speedup",
        )
    )
    return figures
