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
from inference.kernels.stepsize import StepSize, average
from inference.kernels.trajectory import MAX_ENERGY_ERROR, Chains, Density, Metric, times

OPERATIONS = 150
"""Operations of a round besides those of the density."""


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
    """Draws of a block: positions (T, D, chains), and statistics (T, chains).

    ``energy`` is the potential energy of the draw, ``total`` potential and kinetic energy at the start of its
    trajectory.
    """

    position: Tensor
    energy: Tensor
    acceptance: Tensor
    diverging: Tensor
    leapfrogs: Tensor
    step_size: Tensor
    depth: Tensor
    total: Tensor


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

    moving: Tensor  # q, r and h of the end that moves
    left: Tensor  # q, r and h of the left end of the tree
    right: Tensor
    drawn: Tensor  # q and h of the draw of the tree
    new: Tensor  # q and h of the draw of the new subtree
    totals: Tensor  # sums of the momenta of the tree, and of the new subtree


SIZES = (3, 3, 3, 2, 2, 2)
"""Vectors in the parts of ``_Vectors``. A loop carries them as one tensor."""


class _Block(NamedTuple):
    """What every round reads: noise, the metric's factor and its transpose, and the places of :func:`_checkpoints`."""

    momentum: Tensor
    leaf: Tensor  # uniforms, (T * depths, chains)
    subtree: Tensor
    direction: Tensor
    factor: Tensor
    back: Tensor
    slots: Tensor
    levels: Tensor

    def transition(self, numbers: _Numbers) -> Tensor:
        """Number of the transition of each chain; a chain that is done stays at its last."""
        return numbers.done.clamp(max=len(self.momentum) - 1).long()

    def place(self, numbers: _Numbers) -> Tensor:
        """Row of the uniforms for the transition and depth of each chain, (1, chains)."""
        depths = len(self.leaf) // len(self.momentum)
        return (self.transition(numbers) * depths + numbers.depth.clamp(max=depths - 1).long())[None]


def run_trees(
    density: Density, chains: Chains, tuning: Tensor, metric: Metric, rules: Tensor, noise: TreeNoise
) -> tuple[Chains, Tensor, TreeMoves]:
    """Run a block of transitions, each chain with a step size of its own.

    Args:
        density: Maps positions (D, chains) to energies (chains,) and their gradients (D, chains).
        chains: State of the chains.
        tuning: The fields of ``StepSize``, (5, chains).
        metric: The metric.
        rules: Target acceptance, and whether to adapt (1 or 0).
        noise: Random numbers of the block; its depths are the largest depth of a tree.

    Returns:
        The new state of the chains, the new tuning, and the draws.
    """
    count, dim, width = noise.momentum.shape
    depths = noise.leaf.shape[1]
    factor = _product(metric.covariance, metric.root)
    # Clones: a compiled loop accepts no views of an input, and no second name of a tensor, which the transpose of one
    # element would be.
    back = factor.clone() if factor.dim() == 1 else factor.mT.clone(memory_format=torch.contiguous_format)
    leaf, subtree, direction = (v.flatten(0, 1).clone() for v in noise[1:])
    block = _Block(noise.momentum, leaf, subtree, direction, factor, back, *_checkpoints(depths, factor.device))

    def leap(packed: Tensor, stacked: Tensor, kept: Tensor, positions: Tensor, records: Tensor) -> tuple[Tensor, ...]:
        numbers, vectors = _Numbers(*packed.unbind()), _Vectors(*stacked.split(SIZES))
        active = numbers.done < count
        moving, energy, error = _step(density, block, numbers, vectors)
        numbers, vectors = _draw_leaf(numbers, vectors._replace(moving=moving), energy, error)
        turned, kept = _turns_within(block, numbers, vectors, kept)
        diverging = error > MAX_ENERGY_ERROR
        joined = active & ~(diverging | turned) & (numbers.leaf + 1 >= numbers.depth.exp2())
        numbers, vectors = _join(block, numbers, vectors, joined)
        ended = turned | diverging | (joined & ((numbers.depth >= depths) | _turned(vectors)))
        ended = active & ended

        # A chain that has ended a transition records it and adapts its step size; another writes where nobody reads.
        acceptance = numbers.acceptance / numbers.leaves
        row = torch.where(ended, numbers.done, float(count)).long()
        record = (
            numbers.energy,
            acceptance,
            diverging.to(energy),
            numbers.leaves,
            numbers.log_step.exp(),
            numbers.depth,
            numbers.start,
        )
        records = records.scatter(1, row.expand(len(record), 1, width), torch.stack(record)[:, None])
        positions = positions.scatter(0, row.expand(1, dim, width), vectors.drawn[:1])
        learnt = average(StepSize(*numbers[12:]), rules[0] - acceptance)
        learns = ended & (rules[1] > 0)
        tuned = [torch.where(learns, new, old) for new, old in zip(learnt, numbers[12:], strict=True)]
        numbers = _Numbers(numbers.done + ended, numbers.depth, numbers.leaf + 1, *numbers[3:12], *tuned)
        numbers, vectors = _begin(block, numbers, vectors, ended, ended | joined)
        return torch.stack((*numbers,)), torch.cat((*vectors,)), kept, positions, records

    blank, q, h = torch.zeros_like(chains.energy), chains.position, times(chains.gradient, back)
    numbers = _Numbers(*(*[blank] * 6, chains.energy, *[blank] * 5, *tuning.unbind()))
    end, drawn = torch.stack((q, torch.zeros_like(q), h)), torch.stack((q, h))
    vectors = _Vectors(end, end, end, drawn, drawn, torch.zeros_like(drawn))
    every = torch.ones_like(blank, dtype=torch.bool)
    numbers, vectors = _begin(block, numbers, vectors, every, every)
    carried = (
        torch.stack((*numbers,)),
        torch.cat((*vectors,)),
        # With a place more than there are levels, or transitions, for what is not kept.
        q.new_zeros(2, depths + 1, dim, width),
        q.new_zeros(count + 1, dim, width),
        q.new_zeros(len(TreeMoves._fields) - 1, count + 1, width),
    )
    packed, stacked, _, positions, records = _repeat(count, leap, carried)
    numbers, drawn = _Numbers(*packed.unbind()), stacked.split(SIZES)[3]
    energy, acceptance, diverging, *rest = records[:, :count].clone().unbind()
    moves = TreeMoves(positions[:count].clone(), energy, acceptance, diverging > 0, *rest)
    # Clones: a compiled loop may return no views of what it carries.
    after = Chains(drawn[0].clone(), numbers.energy.clone(), times(drawn[1], metric.root))
    return after, torch.stack(numbers[12:]), moves


def _step(density: Density, block: _Block, numbers: _Numbers, vectors: _Vectors) -> tuple[Tensor, Tensor, Tensor]:
    """A leapfrog step of the moving end: that end, its energy, and the energy error."""
    step = numbers.direction * numbers.log_step.exp()
    q, r, h = vectors.moving.unbind()
    half = r - 0.5 * step * h
    q = q + step * times(half, block.factor)
    energy, gradient = density(q)
    h = times(gradient, block.back)
    r = half - 0.5 * step * h
    error = energy + 0.5 * r.square().sum(0) - numbers.start
    error = torch.where(error.isfinite() & h.isfinite().all(0), error, math.inf)
    return torch.stack((q, r, h)), energy, error


def _draw_leaf(numbers: _Numbers, vectors: _Vectors, energy: Tensor, error: Tensor) -> tuple[_Numbers, _Vectors]:
    """Add the moving end as a leaf to the new subtree, which draws it by its share of the weight so far."""
    first = numbers.leaf == 0
    weight = torch.where(first, -error, torch.logaddexp(numbers.weight_new, -error))
    share = (-error - weight).exp().nan_to_num(0.0)
    taken = first | (numbers.uniform < share)
    left_over = torch.where(taken, numbers.uniform / share, (numbers.uniform - share) / (1 - share))
    numbers = numbers._replace(
        uniform=torch.where(first, numbers.uniform, left_over.nan_to_num(0.0).clamp(0, 1)),
        energy_new=torch.where(taken, energy, numbers.energy_new),
        weight_new=weight,
        acceptance=numbers.acceptance + (-error).clamp(max=0).exp(),
        leaves=numbers.leaves + 1,
    )
    r, (total, total_new) = vectors.moving[1], vectors.totals
    vectors = vectors._replace(
        new=torch.where(taken, vectors.moving[::2], vectors.new),
        totals=torch.stack((total, torch.where(first, r, total_new + r))),
    )
    return numbers, vectors


def _turns_within(block: _Block, numbers: _Numbers, vectors: _Vectors, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a subtree that the leaf completes has turned back, and what is kept of leaves with this one.

    Kept are momenta, and their sums up to a leaf less half its own: the sum between two is a difference of these.
    """
    r = vectors.moving[1]
    sofar = vectors.totals[1] - 0.5 * r
    begun_r, begun_sofar = kept[:, :-1].unbind()
    at_first = (begun_r * sofar).sum(1) <= (begun_r * begun_sofar).sum(1)
    at_last = (r * sofar).sum(0) <= (begun_sofar * r).sum(1)
    leaf = numbers.leaf.clamp(max=len(block.slots) - 1).long()
    turned = ((at_first | at_last) & block.levels[leaf].mT).any(0)
    # Odd leaves go to a place that nobody reads.
    where = torch.where(leaf % 2 == 0, block.slots[leaf], len(begun_r)).expand(2, 1, *r.shape)
    return turned, kept.scatter(1, where, torch.stack((r, sofar))[:, None])


def _join(block: _Block, numbers: _Numbers, vectors: _Vectors, joined: Tensor) -> tuple[_Numbers, _Vectors]:
    """Join complete subtrees with the trees of their chains, whose draws they replace by the ratio of their weights."""
    uniform = block.subtree.gather(0, block.place(numbers))[0]
    chosen = joined & (uniform.log() < numbers.weight_new - numbers.weight)
    right = numbers.direction > 0
    numbers = numbers._replace(
        depth=numbers.depth + joined,
        energy=torch.where(chosen, numbers.energy_new, numbers.energy),
        weight=torch.where(joined, torch.logaddexp(numbers.weight, numbers.weight_new), numbers.weight),
    )
    total, total_new = vectors.totals
    vectors = vectors._replace(
        left=torch.where(joined & ~right, vectors.moving, vectors.left),
        right=torch.where(joined & right, vectors.moving, vectors.right),
        drawn=torch.where(chosen, vectors.new, vectors.drawn),
        totals=torch.stack((torch.where(joined, total + total_new, total), total_new)),
    )
    return numbers, vectors


def _begin(
    block: _Block, numbers: _Numbers, vectors: _Vectors, ended: Tensor, fresh: Tensor
) -> tuple[_Numbers, _Vectors]:
    """Begin the next transition of chains that have ended one, and the next subtree of those that need one."""
    t = block.transition(numbers)
    r = block.momentum.gather(0, t.expand(1, *vectors.moving.shape[1:]))[0]
    start = numbers.energy + 0.5 * r.square().sum(0)
    numbers = numbers._replace(depth=torch.where(ended, 0.0, numbers.depth))
    place = block.place(numbers)
    uniform, side = (v.gather(0, place)[0] for v in (block.leaf, block.direction))
    direction = torch.where(fresh, torch.where(side < 0.5, -1.0, 1.0), numbers.direction)
    numbers = numbers._replace(
        leaf=torch.where(fresh, 0.0, numbers.leaf),
        direction=direction,
        uniform=torch.where(fresh, uniform, numbers.uniform),
        start=torch.where(ended, start, numbers.start),
        weight=torch.where(ended, 0.0, numbers.weight),
        acceptance=torch.where(ended, 0.0, numbers.acceptance),
        leaves=torch.where(ended, 0.0, numbers.leaves),
    )
    q, h = vectors.drawn
    end, (total, total_new) = torch.stack((q, r, h)), vectors.totals
    left, right = (torch.where(ended, end, now) for now in (vectors.left, vectors.right))
    moving = torch.where(fresh, torch.where(direction > 0, right, left), vectors.moving)
    totals = torch.stack((torch.where(ended, r, total), total_new))
    return numbers, vectors._replace(moving=moving, left=left, right=right, totals=totals)


def _turned(vectors: _Vectors) -> Tensor:
    """Whether trees have turned back on themselves."""
    left, right = vectors.left[1], vectors.right[1]
    between = vectors.totals[0] - 0.5 * (left + right)
    return ((left * between).sum(0) <= 0) | ((right * between).sum(0) <= 0)


def fresh_steps(log_step: Tensor) -> Tensor:
    """Initial ``StepSize`` for log step sizes (chains,), as one tensor (5, chains)."""
    blank = torch.zeros_like(log_step)
    return torch.stack(StepSize(blank, log_step + math.log(10.0), blank, log_step, log_step))


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


def _product(one: Tensor, other: Tensor) -> Tensor:
    return one * other if one.dim() == 1 else one @ other


def _repeat(count: int, body: Any, carried: tuple[Tensor, ...]) -> Any:
    """Run the body until all chains have made so many transitions, which is the first row of what is carried first."""
    if torch.compiler.is_compiling():
        return while_loop(lambda packed, *_: (packed[0] < count).any(), body, carried)
    while bool((carried[0][0] < count).any()):
        carried = body(*carried)
    return carried
