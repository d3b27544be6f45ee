r"""Objectives with two players: guide and model each minimise a loss of their own.

``loss_and_grads`` gives every parameter the gradient of its player's loss. The guide's parameters are those that its
score depends on when everything it reads is detached; all other parameters are the model's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.params.param_store import normalize_param_name
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_not_negative, made_of
from inference.core.contracts import Objective
from inference.core.halves import parameters_of
from inference.core.handlers import preserved_rng
from inference.core.sites import unconstrained


@dataclass(frozen=True)
class Players:
    """Who owns which parameter.

    Attributes:
        guide: Names of the guide's parameters; all others are the model's.
        encodes: Whether the guide's score of real rows depends on parameters of the model (an encoder's).
    """

    guide: frozenset[str]
    encodes: bool


def _are_turns(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(t, int) and t > 0 for t in value)


class Game(Objective):
    """Base class of objectives with two players.

    Args:
        bound: An ELBO, or a factory of one, that the model minimises as well; None: the pair has no likelihood.
        weight: Weight of the game in the model's loss relative to the bound.
        turns: Consecutive steps of the guide and of the model. Default: both move at every step.

    Raises:
        ValueError: An argument is out of range, or the guide has no parameters.
    """

    def __init__(
        self,
        bound: ELBO | Callable[[], ELBO] | None = None,
        weight: float = 1.0,
        turns: tuple[int, int] | None = None,
    ) -> None:
        check_not_negative(weight=weight)
        if turns is not None and not _are_turns(turns):
            raise ValueError(f"turns: expected steps of the guide and of the model, each at least 1, got {turns!r}")
        super().__init__()
        self.bound = None if bound is None else made_of("bound", bound, ELBO, "an ELBO or a factory of one")
        self.has_posterior = self.bound is not None
        self.weight, self.turns, self.turn = weight, turns, 0
        self.cycle = ("turn",) if turns else ()
        self.latest = torch.zeros(0)
        self._players: dict[tuple[Any, Any], Players] = {}

    def check(self, bound: BoundPair) -> None:
        """Raise a ValueError when a bound is to be descended and the model observes nothing."""
        if self.bound is not None:
            super().check(bound)

    @property
    def all_rows(self) -> str:
        """Why the bound has to see all rows at every step; empty where minibatches will do."""
        return "" if self.bound is None else Objective.of(self.bound).all_rows

    @abstractmethod
    def guide_score(self, model: Any, guide: Any, named: Any, *, detach: bool) -> Tensor:
        """A scalar that depends on the guide's parameters; on those alone if all that the guide reads is detached."""

    @abstractmethod
    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the guide and of the model; the loss of a resting player is ignored."""

    def more_grads(self, model: Any, guide: Any, named: Any) -> Any:
        """Another loss of the model in addition to the bound; its gradients are added to those of the parameters."""
        return 0.0

    @property
    def moving(self) -> tuple[bool, bool]:
        """Whether the guide and the model move at the next step."""
        return (True, True) if self.turns is None else (self.turn < self.turns[0], self.turn >= self.turns[0])

    def settings(self, guide: Mapping[str, Any], model: Mapping[str, Any]) -> Callable[[str], dict[str, Any]]:
        """Optimizer settings by player, as a function of a parameter's name for ``optim.Joint``.

        Args:
            guide: Settings of the guide's parameters.
            model: Settings of the model's parameters.

        Example:
            >>> from inference.optim import Joint
            >>> from inference.objectives import Adversarial
            >>> objective = Adversarial("hinge")
            >>> optimizer = Joint(torch.optim.Adam, objective.settings(guide={"lr": 4e-4}, model={"lr": 1e-4}))
        """

        def of(name: str) -> dict[str, Any]:
            guides = {normalize_param_name(n) for players in self._players.values() for n in players.guide}
            return dict(guide if name in guides else model)

        return of

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """Losses of the guide and of the model, without gradients."""
        with torch.enable_grad():
            named = by_name(model, args, kwargs)
            losses = self.losses(model, guide, named, (True, True), self.players(model, guide, named))
        bound = 0.0 if self.bound is None else self.bound.loss(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
        return torch_item(losses[0]), torch_item(losses[1]) + bound

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Losses of the guide and of the model; gradients of the moving players are added to those of the parameters.

        A resting player reports the loss of its last step.
        """
        named, moving = by_name(model, args, kwargs), self.moving
        players = self.players(model, guide, named)
        with poutine.trace(param_only=True) as capture:
            losses = self.losses(model, guide, named, moving, players)
        params = unconstrained(capture.trace)
        bound = 0.0
        for moves, loss, is_guide in zip(moving, losses, (True, False), strict=True):
            chosen = [p for n, p in params.items() if (n in players.guide) == is_guide]
            if not moves:
                for p in chosen:
                    p.grad = None
                continue
            gradients = torch.autograd.grad(loss, chosen, retain_graph=True, allow_unused=True)
            for p, g in zip(chosen, gradients, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
        if self.bound is not None and moving[1]:
            bound = self.bound.loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
            bound = bound + self.more_grads(model, guide, named)
        if self.turns is not None:
            self.turn = (self.turn + 1) % sum(self.turns)
        if len(self.latest) == 0:
            self.latest = torch.zeros(2).to(losses[0])
        with torch.no_grad():
            now = [torch.as_tensor(x).to(self.latest) for x in (losses[0], losses[1] + bound)]
            self.latest.copy_(torch.stack([n if m else v for n, v, m in zip(now, self.latest, moving, strict=True)]))
        return torch_item(self.latest[0]), torch_item(self.latest[1])

    def players(self, model: Any, guide: Any, named: Any) -> Players:
        """Who owns which parameter, determined once per model and guide."""
        if (model, guide) not in self._players:
            with preserved_rng(), torch.enable_grad(), poutine.trace(param_only=True) as capture:
                detached, attached = (self.guide_score(model, guide, named, detach=detach) for detach in (True, False))
            params = unconstrained(capture.trace)
            reached = _reached(detached, params)
            if not reached:
                raise ValueError("guide: expected parameters that its score depends on, got none")
            self._players[model, guide] = Players(reached, bool(_reached(attached, params) - reached))
        return self._players[model, guide]


def _reached(value: Tensor, params: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that a value depends on."""
    if not value.requires_grad:
        return frozenset()
    gradients = torch.autograd.grad(value, list(params.values()), allow_unused=True, retain_graph=True)
    return frozenset(n for n, g in zip(params, gradients, strict=True) if g is not None)


def takes(function: Any, name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in parameters_of(function)


def by_name(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(parameters_of(function), args, strict=False)), **kwargs}
