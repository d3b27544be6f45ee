r"""Effect handlers and contexts: isolated parameters and random state, sites that are drawn or observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run in a parameter store of one's own and leave the store and the random state as they were."""
    state = get_rng_state()
    try:
        with pyro.get_param_store().scope():
            if seed is not None:
                pyro.set_rng_seed(seed)
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


class DrawMissing(Messenger):
    """Gives missing entries a density where they are not missing.

    ``obs_mask=`` makes a latent site ``y_unobserved`` of all entries, whose density is masked where ``y`` is observed.
    Nothing depends on the entries there, and chains wander in them for ever. Under their prior they change no other
    posterior: it integrates to one.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].endswith("_unobserved") and not msg["is_observed"]:
            msg["mask"] = None
