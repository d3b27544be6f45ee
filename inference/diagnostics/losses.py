"""Whether a fit is over, by its losses.

A loss that still falls is reported from five standard errors, so that no fit is reported by chance. ``patience`` stops
a fit at a fall of less than one: it may stop early by chance.
"""

from __future__ import annotations

import numpy as np

SHARE, WINDOW = 4, 10
"""The last quarter of the losses is looked at, where each half of it has at least ten."""
CERTAIN, NATS = 5.0, 1.0
"""A fall counts from five standard errors, and from one nat."""


def fall(losses: np.ndarray) -> float:
    """How far the loss fell over the last quarter of the steps: between its halves, times two; 0 where it did not.

    Medians and the differences of successive losses, whose spread a trend does not widen, keep it clear of spikes.

    Args:
        losses: Loss of each step, (steps,) or (steps, losses), which are added.
    """
    total = losses.reshape(len(losses), -1).sum(1) if len(losses) else losses
    last = total[len(total) - 2 * (len(total) // (2 * SHARE)) :]
    if len(last) < 2 * WINDOW or not np.isfinite(last).all():
        return 0.0
    before, after = np.array_split(last, 2)
    difference = float(np.median(before) - np.median(after))
    # The median of |e1 - e2| is 0.954 standard deviations, and that of n errors spreads 1.25 sd / sqrt(n).
    deviation = float(np.median(np.abs(np.diff(last)))) / 0.954
    error = 1.25 * deviation * (2 / len(before)) ** 0.5
    return 2 * difference if difference > max(CERTAIN * error, NATS) else 0.0


def rise(losses: np.ndarray) -> tuple[float, float] | None:
    """Mean loss of the first and of the last tenth of the steps, where the last is higher; None where it is not.

    It is higher from three standard errors, or where it is not finite. Several losses, as those of a game, and fits of
    less than a hundred steps are not judged.
    """
    tenth = len(losses) // 10
    if losses.ndim > 1 or tenth < WINDOW:
        return None
    first, last = losses[:tenth], losses[-tenth:]
    risen, error = last.mean() - first.mean(), np.sqrt((first.var() + last.var()) / tenth)
    if np.isfinite(last).all() and not risen > 3 * error:
        return None
    return float(first.mean()), float(last.mean())


def diverged(losses: np.ndarray) -> tuple[str, ...]:
    """One sentence if the loss is higher where a fit ends than where it starts."""
    found = rise(losses)
    if found is None:
        return ()
    return (
        f"The loss rose, from {found[0]:,.4g} to {found[1]:,.4g}: the fit diverged, which says nothing of the guide; "
        "take a lower learning_rate.",
    )


def settled(losses: np.ndarray) -> bool:
    """Whether the mean of the second half of the losses (steps,) is not below that of the first by a standard error."""
    before, after = np.array_split(losses, 2)
    error = float(np.sqrt(before.var() / len(before) + after.var() / len(after)))
    return bool(before.mean() - after.mean() <= error)


def still_falling(losses: np.ndarray) -> tuple[str, ...]:
    """One sentence if the loss still falls where a fit ends."""
    fell = fall(losses)
    if not fell:
        return ()
    return (
        f"The loss still falls, by {fell:,.3g} over the last quarter of the steps: the fit is not over; take more "
        "steps, or a higher learning_rate.",
    )
