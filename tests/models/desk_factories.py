"""Factories that the tests of loading name as `module:function`."""

import torch
from torch import nn


class TiedNet(nn.Module):
    """A plain module with a tied matrix, a buffer and a tensor that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.flat = nn.Parameter(torch.randn(4, 6).T)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) @ self.flat


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer


def with_processor():
    return TiedNet(), "processor"


def number():
    return 3
