r"""Two players with a loss each on one pair of model and guide: whose the parameters are, and who moves when.

A game is an objective: ``loss_and_grads`` leaves with each parameter the gradient of its player's loss. The guide's
parameters are those that its verdict reaches when all that it reads is held; all others are the model's, wherever they
stand.
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

from inference.core.bound import BoundPair, parameters_of, unconstrained
from inference.core.checks import check_not_negative
from inference.core.contracts import Objective
from inference.core.handlers import preserved_rng


@dataclass(frozen=True)
class Players:
    """Names of the guide's parameters, and whether the model's reach the guide's verdict on real rows."""

    guide: frozenset[str]
    encodes: bool


class Game(Objective):
    """What objectives of two players share.

    Args:
        bound: An ELBO, or a factory of one, that the model descends as well; None: there is no likelihood.
        weight: Weight of the game in the model's loss beside the bound.
        turns: Steps of the guide, and of the model, in turn; None: both move at every step.
    """

    def __init__(
        self,
        bound: ELBO | Callable[[], ELBO] | None = None,
        weight: float = 1.0,
        turns: tuple[int, int] | None = None,
    ) -> None:
        check_not_negative(weight=weight)
        if turns is not None and (len(turns) != 2 or any(not isinstance(t, int) or t < 1 for t in turns)):
            raise ValueError(f"turns: expected steps of the guide and of the model, each at least 1, got {turns!r}")
        super().__init__()
        self.bound = bound() if callable(bound) and not isinstance(bound, ELBO) else bound
        self.has_posterior = self.bound is not None
        self.weight, self.turns, self.turn = weight, turns, 0
        self.cycle = ("turn",) if turns else ()
        self.latest = torch.zeros(0)
        self._players: dict[tuple[Any, Any], Players] = {}

    def check(self, bound: BoundPair) -> None:
        """Raise a ValueError when a bound is to be descended and the model observes nothing."""
        if self.bound is not None:
            super().check(bound)

    @abstractmethod
    def guide_score(self, model: Any, guide: Any, named: Any, *, still: bool) -> Tensor:
        """What depends on the guide's parameters, and on those alone where all that it reads is held (``still``)."""

    @abstractmethod
    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the guide and of the model; that of one who rests may be anything."""

    def more_grads(self, model: Any, guide: Any, named: Any) -> Any:
        """A further loss of the model beside the bound, its gradients added to those that are there."""
        return 0.0

    @property
    def moving(self) -> tuple[bool, bool]:
        """Whether the guide, and the model, move at the next step."""
        return (True, True) if self.turns is None else (self.turn < self.turns[0], self.turn >= self.turns[0])

    def settings(self, guide: Mapping[str, Any], model: Mapping[str, Any]) -> Callable[[str], dict[str, Any]]:
        """Arguments of an optimizer by player, as ``optim.Joint`` takes them: a function of a parameter's name.

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
        """Losses of the guide and of the model, their gradients left aside."""
        with torch.enable_grad():
            named = by_name(model, args, kwargs)
            found = self.losses(model, guide, named, (True, True), self.players(model, guide, named))
        bound = 0.0 if self.bound is None else self.bound.loss(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
        return torch_item(found[0]), torch_item(found[1]) + bound

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Losses of the guide and of the model; the gradients of those who move are added to their parameters'.

        Of a player that rests the loss is that of its last step.
        """
        named, moving = by_name(model, args, kwargs), self.moving
        players = self.players(model, guide, named)
        with poutine.trace(param_only=True) as capture:
            losses = self.losses(model, guide, named, moving, players)
        params = unconstrained(capture.trace)
        bound = 0.0
        for each, loss, own in zip(moving, losses, (True, False), strict=True):
            chosen = [p for n, p in params.items() if (n in players.guide) == own]
            if not each:
                for p in chosen:
                    p.grad = None
                continue
            found = torch.autograd.grad(loss, chosen, retain_graph=True, allow_unused=True)
            for p, g in zip(chosen, found, strict=True):
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
        """Whose the parameters are: found once for a model and a guide."""
        if (model, guide) not in self._players:
            with preserved_rng(), torch.enable_grad(), poutine.trace(param_only=True) as capture:
                held, free = (self.guide_score(model, guide, named, still=still) for still in (True, False))
            params = unconstrained(capture.trace)
            reached = _reached(held, params)
            if not reached:
                raise ValueError("guide: expected parameters that its verdict depends on, got none")
            self._players[model, guide] = Players(reached, bool(_reached(free, params) - reached))
        return self._players[model, guide]


def _reached(value: Tensor, params: Mapping[str, Tensor]) -> frozenset[str]:
    if not value.requires_grad:
        return frozenset()
    found = torch.autograd.grad(value, list(params.values()), allow_unused=True, retain_graph=True)
    return frozenset(n for n, g in zip(params, found, strict=True) if g is not None)


def takes(function: Any, name: str) -> bool:
    """Whether a function has an argument of that name."""
    return name in parameters_of(function)


def by_name(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(parameters_of(function), args, strict=False)), **kwargs}
