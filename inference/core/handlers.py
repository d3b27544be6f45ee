r"""Effect handlers and contexts: isolated parameters and random state, turns of threads, sites drawn or observed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor, nn

from inference.core.checks import check_count

P = ParamSpec("P")


T = TypeVar("T")


REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, IndexError)
"""What a program may raise on tensors that it was not written for: torch, Pyro and NumPy refuse in their own ways."""


class _Turn:
    """Whose turn it is in this process, and how many calls of exclusive functions are inside one another."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0


_turn = _Turn()


def exclusive(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function one call at a time in a process, and as a whole: it ends, or an interrupt reaches its caller.

    Pyro keeps parameters, handlers, random state and settings once per process, so that two threads in its programs
    give wrong numbers. All verbs of ``inference`` are exclusive, together: a thread waits until the verb of another is
    over. One verb may call another. A ``fit`` that is called by an exclusive function does not turn an interrupt
    (Ctrl-C) into a Result of the steps taken so far: KeyboardInterrupt goes up to whoever called the outermost one.

    It runs with gradients, and with tensors that may have them: under a caller's ``torch.no_grad`` or
    ``torch.inference_mode`` a fit would leave every parameter where it is.

    The turn is taken before anything else. Taken further in, as by ``isolated``, it could be waited for while
    a ``cached_property`` holds its own lock (Python 3.11), for which the thread whose turn it is waits.

    Example:
        >>> @exclusive
        ... def both(pair, data):
        ...     return fit(pair, data, seed=0), fit(pair, data, seed=1)
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        turn = _turn
        with turn.lock, torch.inference_mode(False), torch.enable_grad():
            turn.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                turn.depth -= 1

    return run


def called_by_exclusive() -> bool:
    """Whether the exclusive function that runs was called by another one."""
    return _turn.depth > 1


def _renew_turn() -> None:
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):
    # The thread whose turn it is may not exist in the child.
    os.register_at_fork(after_in_child=_renew_turn)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run in a parameter store of one's own and leave the store and the random state as they were.

    Args:
        seed: An integer of at least 0, also one of NumPy; None: the random state goes on.
    """
    if seed is not None:
        check_count("seed", seed, 0)
    state = random_state()
    try:
        with pyro.get_param_store().scope(), _frozen_kept():
            if seed is not None:
                pyro.set_rng_seed(int(seed))
            yield
    finally:
        set_random_state(state)
        if seed is not None and not torch.cuda.is_initialized():
            # A seed reaches cuda devices when they are initialised: the last one that was given.
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def _frozen_kept() -> Iterator[None]:
    """Leave parameters of modules frozen: Pyro sets ``requires_grad`` where those of a PyroModule enter its store."""
    store = pyro.get_param_store()
    enter = store.setdefault

    def setdefault(name: str, value: Any, *constraint: Any, **named: Any) -> Tensor:
        frozen = isinstance(value, nn.Parameter) and not value.requires_grad
        kept: Any = enter(name, value, *constraint, **named)
        if frozen and kept.requires_grad:
            kept.unconstrained().requires_grad_(False)
        return kept

    with patch.object(store, "setdefault", setdefault):
        yield


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run with modules in evaluation mode: without dropout, and without terms that a model has for its training."""
    training = [m for module in modules for m in module.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Run torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Run without moving the random state of any device."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def first_valid(run: Callable[[], T], tries: int = 20) -> T:
    """Return what a run that draws from a prior returns, run again where it draws what cannot be evaluated.

    A rare draw of a prior may leave the range of floating-point numbers (the path of an ODE), or give a matrix that
    cannot be factorised. It says nothing of the model.

    Raises:
        ValueError: Parameters or values are invalid in each of ``tries`` runs. Other errors are raised at once.
    """
    for _ in range(tries - 1):
        try:
            return run()
        except torch.linalg.LinAlgError:
            continue
        except ValueError as error:
            if "found invalid values" not in str(error):
                raise
    return run()


def random_state() -> dict[str, Any]:
    """State of the random generators of Python, of NumPy, and of torch on the CPU and on all cuda devices.

    Devices that are not initialised are left alone: asking for their state would initialise them.
    """
    state = pyro.util.get_rng_state()
    return {**state, "cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else state


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states of :func:`random_state` are equal: no random number was drawn between them."""
    flat = ([s["torch"], *s.get("cuda", ()), *s["numpy"], *s["random"]] for s in (one, other))
    first, second = map(list, flat)
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def set_random_state(state: dict[str, Any]) -> None:
    """Put the random generators into a state of :func:`random_state`.

    Devices that were initialised since then get the seed that they would have started from: that of the CPU.
    """
    pyro.util.set_rng_state(state)
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    elif torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(torch.initial_seed())


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


class OwnSites(Messenger):
    """Hides the model's observed sites from handlers around a ``GuideMessenger``, and keeps the priors of the others.

    Replaying takes all that is inferred of a site from its trace, and with it the prior that the guide left there.
    """

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = msg["is_observed"]
        self.prior = msg["infer"].get("prior")

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.prior is not None:
            msg["infer"] = {**msg["infer"], "prior": self.prior}


class DrawMissing(Messenger):
    """Gives missing entries a density where they are not missing.

    ``obs_mask=`` makes a latent site ``y_unobserved`` of all entries, whose density is masked where ``y`` is observed.
    Nothing depends on the entries there, and chains wander in them for ever. Under their prior they change no other
    posterior: it integrates to one.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].endswith("_unobserved") and not msg["is_observed"]:
            msg["mask"] = None
