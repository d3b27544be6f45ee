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
