"""The few torch networks that more than one pair uses."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Dense layers of the given widths, inputs first, with an activation between them."""
    layers = [[nn.Linear(a, b), activation()] for a, b in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])
