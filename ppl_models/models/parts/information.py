"""Mutual information of finite variables."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_models.models.parts.labels import one_hot


def mutual_information(joint: Tensor) -> Tensor:
    r"""Mutual information of two finite variables, in nats.

    .. math:: I = \sum_{ab} p_{ab} \log \frac{p_{ab}}{p_{a \cdot} \, p_{\cdot b}}

    Args:
        joint: Probabilities of both, or counts (..., A, B).

    Returns:
        One number for each table (...).

    Example:
        >>> mutual_information(torch.eye(2)).exp(), mutual_information(torch.ones(2, 3))
        (tensor(2.), tensor(0.))
    """
    joint = joint / joint.sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    ratio = joint / independent.clamp_min(torch.finfo(joint.dtype).tiny)
    return torch.special.xlogy(joint, ratio).sum((-2, -1))


def pairwise_information(x: Tensor, states: int) -> Tensor:
    r"""Mutual information of each pair of columns, in nats, from their relative frequencies.

    The estimate is biased upwards: for independent columns it is about :math:`(K - 1)^2 / (2 N)` on average.

    Args:
        x: Rows (N, V) of states 0 to K - 1.
        states: K.

    Returns:
        A symmetric matrix (V, V) with the entropies on its diagonal.
    """
    member = one_hot(x, states, torch.float64)
    return mutual_information(torch.einsum("nia,njb->ijab", member, member))
