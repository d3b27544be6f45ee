r"""Ask a fitted pair."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference import predict
from inference.program import Program, isolated


def classify(result: Any, data: Any, *, label: str = "y") -> Tensor:
    r"""Class probabilities of new rows, averaged over the posterior by Bayes' rule.

    .. math:: p(y \mid x, D) \propto \mathrm{E}_{\theta \mid D}[p(x, y \mid \theta)]

    For a generative pair this weighs each draw by how well it explains x; for a discriminative one, whose
    model does not observe x, it is the mean of :math:`p(y \mid x, \theta)`.

    Args:
        result: What ``fit`` or ``sample`` returned.
        data: The rows to classify: a mapping of names to tensors, or a tensor (``x``). Labels in it are ignored.
        label: Name of the finite site to classify by.

    Returns:
        Probabilities (rows, classes).
    """
    program: Program = result.program.with_data(data)
    given = {k: v for k, v in program.data.items() if k != label}
    rows = program.rows
    blank = program.with_data({**given, label: torch.zeros(rows, dtype=torch.long)})
    with isolated(), result.state():
        states = _states(blank, label)
        scores = [
            predict.rowwise(program.with_data({**given, label: state.expand(rows)}), result.draws) for state in states
        ]
    joint = torch.stack(scores, -1).logsumexp(0) - math.log(result.size)
    return joint.softmax(-1)


def _states(program: Program, label: str) -> Tensor:
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(program.model).get_trace(**program.arguments())
    site = program.sites.get(label)
    if site is None or not site.finite:
        finite = ", ".join(s.name for s in program.sites.values() if s.finite) or "none"
        raise ValueError(f"label: expected a finite site of the model ({finite}), got {label!r}")
    distribution: Any = trace.nodes[label]["fn"]
    return distribution.enumerate_support(expand=False).flatten()
