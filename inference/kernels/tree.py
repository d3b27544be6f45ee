r"""Blocks of transitions of the no-U-turn sampler, of all chains at once.

Each round of the loop is one leapfrog step of every chain. A chain whose tree is complete records its draw and begins
its next transition in the next round, so that chains with short trees do not wait for those with long ones before the
end of the block.

Momenta are kept in whitened coordinates: :math:`r = F^\top p` with :math:`F F^\top = \Sigma`, the covariance of the
metric. There the kinetic energy is :math:`\tfrac12 |r|^2`, and momenta are drawn from the standard normal. A trajectory
with momenta :math:`r_-, r_+` at its ends and their sum :math:`\rho` over all leaves has turned back where
:math:`r_- \cdot \rho' \le 0` or :math:`r_+ \cdot \rho' \le 0` with :math:`\rho' = \rho - \tfrac12 (r_- + r_+)`.

A tree is built leaf by leaf, with the momenta of one leaf per level kept for the criterion on its subtrees (Phan,
Pradhan and Jankowiak 2019, https://arxiv.org/abs/1912.11554). Draws are multinomial within a subtree and biased towards
the newer half between subtrees (Betancourt 2017, https://arxiv.org/abs/1701.02434). One uniform number decides on all
leaves of a subtree: given that it decided for or against a leaf, it is uniform on what is left of its range.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.core.private import while_loop
from inference.kernels.trajectory import MAX_ENERGY_ERROR, Chains, Density, Metric

SHRINKAGE, OFFSET, DECAY = 0.05, 10.0, 0.75
"""Constants of dual averaging, as in Stan: strength of the pull to the anchor, steps that count little at the start,
and decay of the weight of a new step size in the mean."""


OPERATIONS = 150
"""Operations of a round besides those of the density."""


class TreeTuning(NamedTuple):
    """Step sizes and the state of dual averaging, (chains,) each.

    Attributes:
        taken: Transitions so far.
        anchor: Log step size towards which dual averaging shrinks.
        error: Running mean of target less actual acceptance.
        log_step: Logarithm of the step size.
        log_step_mean: Running mean of ``log_step``, used after the warmup.
    """

    taken: Tensor
    anchor: Tensor
    error: Tensor
    log_step: Tensor
    log_step_mean: Tensor


class TreeNoise(NamedTuple):
    """Random numbers of a block of T transitions.

    Attributes:
        momentum: Standard normal, (T, D, chains).
        leaf: Uniform, which leaf of a subtree is drawn, (T, depths, chains).
        subtree: Uniform, whether a subtree replaces the draw of the rest, (T, depths, chains).
        direction: Uniform, whether a tree grows to the left, (T, depths, chains).
    """

    momentum: Tensor
    leaf: Tensor
    subtree: Tensor
    direction: Tensor


class TreeMoves(NamedTuple):
    """Draws of a block: positions (T, D, chains), and statistics (T, chains)."""

    position: Tensor
    energy: Tensor
    acceptance: Tensor
    diverging: Tensor
    leapfrogs: Tensor
    step_size: Tensor
    depth: Tensor


class _Numbers(NamedTuple):
    """What a chain carries from round to round, (chains,) each."""

    done: Tensor  # transitions of the block that are complete
    depth: Tensor  # doublings of the tree so far
    leaf: Tensor  # leaves of the new subtree so far
    direction: Tensor  # 1: the tree grows to the right; -1: to the left
    uniform: Tensor  # decides on the leaf that the new subtree draws
    start: Tensor  # energy and kinetic energy at the start of the transition
    energy: Tensor  # energy of the tree's draw
    energy_new: Tensor  # energy of the new subtree's draw
    weight: Tensor  # log weight of the tree
    weight_new: Tensor  # log weight of the new subtree
    acceptance: Tensor  # sum of acceptance probabilities
    leaves: Tensor  # leapfrog steps of the transition
    taken: Tensor
    anchor: Tensor
    error: Tensor
    log_step: Tensor
    log_step_mean: Tensor


class _Vectors(NamedTuple):
    """Positions q, momenta r and gradients h that a chain carries, (D, chains) each, the latter two whitened."""

    q: Tensor  # the end that moves
    r: Tensor
    h: Tensor
    left_q: Tensor
    left_r: Tensor
    left_h: Tensor
    right_q: Tensor
    right_r: Tensor
    right_h: Tensor
    drawn_q: Tensor  # the draw of the tree
    drawn_h: Tensor
    new_q: Tensor  # the draw of the new subtree
    new_h: Tensor
    total: Tensor  # sum of the momenta of the tree
    total_new: Tensor  # sum of the momenta of the new subtree


def run_trees(
    density: Density, chains: Chains, tuning: Tensor, metric: Metric, rules: Tensor, noise: TreeNoise
) -> tuple[Chains, Tensor, TreeMoves]:
    """Run a block of transitions, each chain with a step size of its own.

    Args:
        density: Maps positions (D, chains) to energies (chains,) and their gradients (D, chains).
        chains: State of the chains.
        tuning: The fields of ``TreeTuning``, (5, chains).
        metric: The metric.
        rules: Target acceptance, and whether to adapt (1 or 0).
        noise: Random numbers of the block; its depths are the largest depth of a tree.

    Returns:
        The new state of the chains, the new tuning, and the draws.
    """
    momentum, depths = noise.momentum, noise.leaf.shape[1]
    count, dim, width = momentum.shape
    factor = _product(metric.covariance, metric.root)
    # Clones: a compiled loop accepts no names of one tensor, which the transpose of one element would be.
    back = factor.clone() if factor.dim() == 1 else factor.mT.clone(memory_format=torch.contiguous_format)
    slots, levels = _checkpoints(depths, momentum.device)
    # Clones: a compiled loop accepts no views of an input.
    uniforms = [v.flatten(0, 1).clone() for v in noise[1:]]

    def begin(numbers: _Numbers, vectors: _Vectors, ended: Tensor, fresh: Tensor) -> tuple[_Numbers, _Vectors]:
        """Begin the next transition of chains that have ended one, and the next subtree of those that need one."""
        t = numbers.done.clamp(max=count - 1).long()
        r = momentum.gather(0, t.expand(1, dim, width))[0]
        start = numbers.energy + 0.5 * r.square().sum(0)
        depth = torch.where(ended, 0.0, numbers.depth)
        place = (t * depths + depth.clamp(max=depths - 1).long())[None]
        uniform, _, side = (v.gather(0, place)[0] for v in uniforms)
        direction = torch.where(fresh, torch.where(side < 0.5, -1.0, 1.0), numbers.direction)
        numbers = numbers._replace(
            depth=depth,
            leaf=torch.where(fresh, 0.0, numbers.leaf),
            direction=direction,
            uniform=torch.where(fresh, uniform, numbers.uniform),
            start=torch.where(ended, start, numbers.start),
            weight=torch.where(ended, 0.0, numbers.weight),
            acceptance=torch.where(ended, 0.0, numbers.acceptance),
            leaves=torch.where(ended, 0.0, numbers.leaves),
        )
        end = vectors.drawn_q, r, vectors.drawn_h
        left = [torch.where(ended, new, old) for new, old in zip(end, vectors[3:6], strict=True)]
        right = [torch.where(ended, new, old) for new, old in zip(end, vectors[6:9], strict=True)]
        moving = [
            torch.where(fresh, torch.where(direction > 0, b, a), now)
            for a, b, now in zip(left, right, vectors[:3], strict=True)
        ]
        total = torch.where(ended, r, vectors.total)
        return numbers, _vectors(*moving, *left, *right, *vectors[9:13], total, vectors.total_new)

    def leap(packed: Tensor, stacked: Tensor, kept: Tensor, positions: Tensor, records: Tensor) -> tuple[Tensor, ...]:
        numbers, vectors = _numbers(*packed.unbind()), _vectors(*stacked.unbind())
        active = numbers.done < count
        step = numbers.direction * numbers.log_step.exp()
        half = vectors.r - 0.5 * step * vectors.h
        q = vectors.q + step * _times(half, factor)
        energy, gradient = density(q)
        h = _times(gradient, back)
        r = half - 0.5 * step * h
        error = energy + 0.5 * r.square().sum(0) - numbers.start
        error = torch.where(error.isfinite() & h.isfinite().all(0), error, math.inf)
        diverging = error > MAX_ENERGY_ERROR

        # The leaf is drawn by its share of the weight of the subtree so far.
        first = numbers.leaf == 0
        weight_new = torch.where(first, -error, torch.logaddexp(numbers.weight_new, -error))
        share = (-error - weight_new).exp().nan_to_num(0.0)
        taken = first | (numbers.uniform < share)
        left_over = torch.where(taken, numbers.uniform / share, (numbers.uniform - share) / (1 - share))
        uniform = torch.where(first, numbers.uniform, left_over.nan_to_num(0.0).clamp(0, 1))
        new_q, new_h = torch.where(taken, q, vectors.new_q), torch.where(taken, h, vectors.new_h)
        energy_new = torch.where(taken, energy, numbers.energy_new)
        total_new = torch.where(first, r, vectors.total_new + r)

        # U-turns within the subtree: against the leaves that begin the subtrees that this leaf completes. With the sum
        # total of the momenta before a leaf and at it, less half its own, the sum between two leaves is a difference.
        sofar = total_new - 0.5 * r
        begun_r, begun_sofar = kept[:, :-1].unbind()
        at_first = (begun_r * sofar).sum(1) <= (begun_r * begun_sofar).sum(1)
        at_last = (r * sofar).sum(0) <= (begun_sofar * r).sum(1)
        leaf = numbers.leaf.clamp(max=len(slots) - 1).long()
        turned = ((at_first | at_last) & levels[leaf].mT).any(0)
        # Odd leaves go to a place that nobody reads.
        where = torch.where(leaf % 2 == 0, slots[leaf], depths).expand(2, 1, dim, width)
        kept = kept.scatter(1, where, torch.stack((r, sofar))[:, None])

        # A complete subtree joins the tree.
        stopped = diverging | turned
        joined = active & ~stopped & (numbers.leaf + 1 >= numbers.depth.exp2())
        t = numbers.done.clamp(max=count - 1).long()
        place = (t * depths + numbers.depth.clamp(max=depths - 1).long())[None]
        chosen = joined & (uniforms[1].gather(0, place)[0].log() < weight_new - numbers.weight)
        drawn_q, drawn_h = torch.where(chosen, new_q, vectors.drawn_q), torch.where(chosen, new_h, vectors.drawn_h)
        right = numbers.direction > 0
        ends = [
            torch.where(joined & side, new, old)
            for side, three in ((~right, vectors[3:6]), (right, vectors[6:9]))
            for new, old in zip((q, r, h), three, strict=True)
        ]
        total = torch.where(joined, vectors.total + total_new, vectors.total)
        depth = numbers.depth + joined
        ended = active & (stopped | (joined & (_turning(ends[1], ends[4], total) | (depth >= depths))))

        # A chain that has ended a transition records it, and adapts its step size.
        numbers = numbers._replace(
            depth=depth,
            leaf=numbers.leaf + 1,
            uniform=uniform,
            energy=torch.where(chosen, energy_new, numbers.energy),
            energy_new=energy_new,
            weight=torch.where(joined, torch.logaddexp(numbers.weight, weight_new), numbers.weight),
            weight_new=weight_new,
            acceptance=numbers.acceptance + (-error).clamp(max=0).exp(),
            leaves=numbers.leaves + 1,
        )
        acceptance = numbers.acceptance / numbers.leaves
        row = torch.where(ended, numbers.done, float(count)).long()
        record = (numbers.energy, acceptance, diverging.to(q), numbers.leaves, numbers.log_step.exp(), depth)
        records = records.scatter(1, row.expand(6, 1, width), torch.stack(record)[:, None])
        positions = positions.scatter(0, row.expand(1, dim, width), drawn_q[None])
        learnt = _learn(TreeTuning(*numbers[12:]), rules[0], acceptance)
        learns = ended & (rules[1] > 0)
        tuned = [torch.where(learns, new, old) for new, old in zip(learnt, numbers[12:], strict=True)]
        numbers = _numbers(numbers.done + ended, *numbers[1:12], *tuned)
        vectors = _vectors(q, r, h, *ends, drawn_q, drawn_h, new_q, new_h, total, total_new)
        numbers, vectors = begin(numbers, vectors, ended, ended | joined)
        return torch.stack(numbers), torch.stack(vectors), kept, positions, records

    blank, q, h = torch.zeros_like(chains.energy), chains.position, _times(chains.gradient, back)
    numbers = _numbers(*[blank] * 6, chains.energy, *[blank] * 5, *tuning.unbind())
    vectors = _vectors(*[q, torch.zeros_like(q), h] * 3, q, h, q, h, *[torch.zeros_like(q)] * 2)
    every = torch.ones_like(blank, dtype=torch.bool)
    numbers, vectors = begin(numbers, vectors, every, every)
    carried = (
        torch.stack(numbers),
        torch.stack(vectors),
        # With a place more than there are levels, or transitions, for what is not kept.
        q.new_zeros(2, depths + 1, dim, width),
        q.new_zeros(count + 1, dim, width),
        q.new_zeros(6, count + 1, width),
    )
    packed, stacked, _, positions, records = _repeat(count, leap, carried)
    numbers, vectors = _numbers(*packed.unbind()), _vectors(*stacked.unbind())
    energy, acceptance, diverging, leapfrogs, step, depth = records[:, :count].clone().unbind()
    gradient = _times(vectors.drawn_h, metric.root)
    moves = TreeMoves(positions[:count].clone(), energy, acceptance, diverging > 0, leapfrogs, step, depth)
    # Clones: a compiled loop may return no views of what it carries.
    return Chains(vectors.drawn_q.clone(), numbers.energy.clone(), gradient), torch.stack(numbers[12:]), moves


def fresh_tree_tuning(log_step: Tensor) -> Tensor:
    """Initial ``TreeTuning``, (5, chains), for log step sizes (chains,)."""
    blank = torch.zeros_like(log_step)
    return torch.stack(TreeTuning(blank, log_step + math.log(10.0), blank, log_step, log_step))


def _numbers(*parts: Tensor) -> _Numbers:
    return _Numbers(*parts)


def _vectors(*parts: Tensor) -> _Vectors:
    return _Vectors(*parts)


def _learn(tuning: TreeTuning, target: Tensor, acceptance: Tensor) -> TreeTuning:
    """Dual averaging of the log step size on the mean acceptance of a tree, as in Stan."""
    taken = tuning.taken + 1
    error = tuning.error + (target - acceptance - tuning.error) / (taken + OFFSET)
    log_step = tuning.anchor - taken.sqrt() / SHRINKAGE * error
    mean = tuning.log_step_mean + taken**-DECAY * (log_step - tuning.log_step_mean)
    return TreeTuning(taken, tuning.anchor, error, log_step, mean)


def _turning(one: Tensor, other: Tensor, total: Tensor) -> Tensor:
    """Whether a trajectory with these momenta at its ends, (..., D, chains), and their total turns back on itself."""
    between = total - 0.5 * (one + other)
    return ((one * between).sum(-2) <= 0) | ((other * between).sum(-2) <= 0)


def _checkpoints(depths: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where leaves of a subtree keep their momenta, and which of these begin a subtree that a leaf completes.

    Leaf n, if even, is kept at as many places from the start as n / 2 has ones. If it is odd and ends with k ones, it
    completes k subtrees; their first leaves are at the last k places.

    Returns:
        Places (leaves,), and masks (leaves, depths).
    """
    leaves = torch.arange(2 ** max(depths - 1, 0), device=device)
    bits = leaves[:, None] >> torch.arange(depths + 1, device=device) & 1
    slots = bits[:, 1:].sum(-1)
    ones = bits.cumprod(-1).sum(-1)
    k = torch.arange(depths, device=device)
    return slots, (k <= slots[:, None]) & (k > (slots - ones)[:, None])


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return x * matrix[:, None] if matrix.dim() == 1 else matrix @ x


def _product(one: Tensor, other: Tensor) -> Tensor:
    return one * other if one.dim() == 1 else one @ other


def _repeat(count: int, body: Any, carried: tuple[Tensor, ...]) -> Any:
    """Run the body until all chains have made so many transitions, which is the first row of what is carried first."""
    if torch.compiler.is_compiling():
        return while_loop(lambda packed, *_: (packed[0] < count).any(), body, carried)
    while bool((carried[0][0] < count).any()):
        carried = body(*carried)
    return carried
