r"""Effect handlers and contexts: isolated parameters and random state, sites that are drawn or observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.util import get_rng_state, set_rng_state

from inference.core.checks import check_count


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run in a parameter store of one's own and leave the store and the random state as they were.

    Args:
        seed: An integer of at least 0, also one of NumPy; None: the random state goes on.
    """
    if seed is not None:
        check_count("seed", seed, 0)
    state = get_rng_state()
    try:
        with pyro.get_param_store().scope():
            if seed is not None:
                pyro.set_rng_seed(int(seed))
            yield
    finally:
        set_rng_state(state)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Run without moving the random state."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class Uncondition(UnconditionMessenger):
    """Pyro's uncondition, which would draw deterministic sites too, and in the wrong shape."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


class StopGradient(Messenger):
    """Draws without a gradient to what they were drawn from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["value"] = msg["value"].detach()
