"""The few torch networks that more than one pair uses."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Dense layers of the given widths, inputs first, with an activation between them."""
    layers = [[nn.Linear(a, b), activation()] for a, b in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def check_network(name: str, network: nn.Module, inputs: int, outputs: int) -> None:
    """Raise unless a network takes rows of one width to rows of another; a copy of it is tried on a row of zeros."""
    like = next(network.parameters(), torch.empty(0))
    row = torch.zeros(1, inputs, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            found = deepcopy(network).eval()(row)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: expected inputs of width {inputs}, got an error: {reason}") from None
    if not isinstance(found, Tensor) or found.shape != (1, outputs):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name}: expected outputs of width {outputs}, got {got}")
