r"""One torch optimizer over all parameters, where Pyro holds one a parameter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from inference.core.checks import check_positive


def check_rates(optimizer: PyroOptim, params: Iterable[Tensor] = ()) -> None:
    """Raise a ValueError where an optimizer would climb the loss, or leave every parameter where it is.

    Pyro's own optimizers take any rate, and torch's a rate of zero. A function of parameters gives zero for those that
    are to stay, but not for all.

    Args:
        optimizer: The optimizer.
        params: Parameters that it is to move, for which it may have a function.
    """
    given = optimizer.pt_optim_args
    every = [optimizer._get_optim_args(p) for p in params] if callable(given) else [given]
    rates = [float(arguments["lr"]) for arguments in every if arguments.get("lr") is not None]
    wrong = [r for r in rates if not 0 <= r < math.inf] or [r for r in rates if not any(rates)]
    if wrong:
        raise ValueError(f"optimizer: expected a positive lr, got {wrong[0]:g}")


class Joint(PyroOptim):
    r"""A ``PyroOptim`` that moves all parameters by one torch optimizer.

    Args:
        optimizer: Class of a torch optimizer: ``torch.optim.Adam``, ``AdamW``, ``SGD``, ...
        optim_args: Its arguments, or a function from a parameter's dotted name to them: parameters with equal
            arguments form one group. ``fused=True`` is added where the optimizer has it and nothing else was asked.
        schedule: From the torch optimizer to a torch learning-rate schedule, moved on after each step.
        clip_norm: Largest norm of all gradients together; they are scaled down to it.
        clip_value: Largest magnitude of each entry of a gradient.

    Raises:
        ValueError: A clip is not positive, or an argument is out of the optimizer's range.
        TypeError: The optimizer has no argument of that name.

    Example:
        >>> from functools import partial
        >>> rates = lambda name: {"lr": 0.1 if "scales" in name else 0.01}
        >>> halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1000, gamma=0.5)
        >>> optimizer = Joint(torch.optim.AdamW, rates, schedule=halving, clip_norm=10.0)
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        optim_args: dict[str, Any] | Callable[[str], dict[str, Any]] | None = None,
        *,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if value is not None:
                check_positive(name, value)
        if not callable(optimizer) or (isinstance(optimizer, type) and not issubclass(optimizer, Optimizer)):
            raise TypeError(f"optimizer: expected a class of torch.optim, got {optimizer!r}")
        super().__init__(optimizer, {} if optim_args is None else optim_args)
        self.schedule, self.clip_norm, self.clip_value = schedule, clip_norm, clip_value
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self._known: dict[Tensor, str] = {}
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._store: Any = None
        self._valid: list[dict[str, Any]] = []
        self._waiting: dict[str, Any] | None = None
        if not callable(optim_args):
            self._arguments("")

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take one step for the parameters; those that have no gradient rest."""
        given = list(dict.fromkeys(params))
        fresh = [p for p in given if p not in self._known]
        if fresh:
            self._add(fresh)
        for p in self._known.keys() - set(given):
            # Pyro leaves zeros behind, by which the momentum of a parameter that a step does not use would move it.
            p.grad = None
        assert self.optimizer is not None
        # By name: a norm has other last digits in another order.
        moving = [p for p, _ in sorted(self._known.items(), key=lambda known: known[1]) if p.grad is not None]
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(moving, self.clip_norm)
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(moving, self.clip_value)
        self.optimizer.step(*args, **kwargs)
        if self.scheduler is not None:
            self.scheduler.step()

    def get_state(self) -> dict[str, Any]:
        """State and settings of the optimizer by parameter name, and the state of the schedule."""
        if self.optimizer is None:
            return dict(self._waiting or {})
        waiting = self._waiting or {"state": {}, "settings": {}}
        state = {name: self.optimizer.state.get(p, {}) for p, name in self._known.items()}
        settings = {
            self._known[p]: {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        return {
            "state": {**waiting["state"], **state},
            "settings": {**waiting["settings"], **settings},
            "schedule": self.scheduler.state_dict() if self.scheduler else None,
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of :meth:`get_state`, now or when the parameters are first seen."""
        self._waiting = {
            "state": dict(state_dict["state"]),
            "settings": dict(state_dict.get("settings", {})),
            "schedule": state_dict["schedule"],
        }
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self._take_up()

    def _add(self, fresh: list[Tensor]) -> None:
        store = pyro.get_param_store()._params
        if store is self._store:
            fresh = [p for p in fresh if not self._replaces(p)]
        # Another fit has a store of its own, and its parameters are new ones whatever their names.
        self._store = store
        # SVI hands parameters over as a set: by name, their order and so each result is the same every time.
        for name, p in sorted(((self._name(p), p) for p in fresh), key=lambda named: named[0]):
            self._known[p] = name
            arguments = self._arguments(name)
            group = next((g for given, g in self._groups if given == arguments), None)
            if group is not None:
                # Of the same group, and so of the same schedule, whenever it appears.
                group["params"].append(p)
                continue
            group = {**arguments, "params": [p]}
            if self.optimizer is None:
                self._groups.append((arguments, group))
            else:
                self.optimizer.add_param_group(group)
                self._groups.append((arguments, self.optimizer.param_groups[-1]))
        if self.optimizer is None:
            self.optimizer = self.pt_optim_constructor([g for _, g in self._groups])  # type: ignore[operator, call-arg]
            self._groups = [(a, g) for (a, _), g in zip(self._groups, self.optimizer.param_groups, strict=True)]
            self.scheduler = self.schedule(self.optimizer) if self.schedule else None
        self._take_up()

    def _replaces(self, param: Tensor) -> bool:
        """Put a parameter in the place of an earlier one of its name: Pyro stores a new moving baseline every step."""
        name = self._name(param)
        old = next((p for p, n in self._known.items() if n == name), None)
        if old is None or self.optimizer is None:
            return False
        for group in self.optimizer.param_groups:
            group["params"] = [param if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state and old.shape == param.shape:
            self.optimizer.state[param] = state
        del self._known[old]
        self._known[param] = name
        return True

    def _arguments(self, name: str) -> dict[str, Any]:
        given = self.pt_optim_args
        arguments = dict(given(normalize_param_name(name)) if callable(given) else given)
        accepted = inspect.signature(self.pt_optim_constructor).parameters  # type: ignore[arg-type]
        if "fused" in accepted and not arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}:
            arguments["fused"] = True
        if arguments not in self._valid:
            self._check(arguments)
            self._valid.append(arguments)
        return arguments

    def _get_optim_args(self, param: Any) -> dict[str, Any]:
        return self._arguments(self._name(param))

    def _check(self, arguments: dict[str, Any]) -> None:
        """Construct the optimizer as its user would: a group of parameters may have any names and numbers."""
        try:
            self.pt_optim_constructor([torch.nn.Parameter(torch.zeros(1))], **arguments)  # type: ignore[operator]
        except (TypeError, ValueError) as error:
            shown = {k: v for k, v in arguments.items() if k != "fused"}
            kind = getattr(self.pt_optim_constructor, "__name__", "the optimizer")
            raise type(error)(f"optim_args: expected arguments of {kind}, got {shown}: {error}") from None

    def _beside(self, param: Tensor, key: str, value: Any) -> Any:
        """A value of the state where torch keeps it: beside its parameter, but for the count of most optimizers."""
        if not isinstance(value, Tensor):
            return value
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        group: dict[str, Any] = next((g for g in groups if any(p is param for p in g["params"])), {})
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        return value.clone() if stays else value.to(param.device, copy=True)

    @staticmethod
    def _name(param: Tensor) -> str:
        return str(pyro.get_param_store().param_name(param))

    def _take_up(self) -> None:
        if self._waiting is None or self.optimizer is None:
            return
        for p, name in self._known.items():
            for key, value in self._waiting["state"].pop(name, {}).items():
                self.optimizer.state[p][key] = self._beside(p, key, value)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                # What an optimizer or a schedule changes in a group: rates, and for some betas.
                group.update(self._waiting["settings"].get(self._known[p], {}))
        # They are those of a group, which has moved on when a further parameter joins it.
        self._waiting["settings"] = {}
        if self.scheduler is not None and self._waiting["schedule"] is not None:
            self.scheduler.load_state_dict(self._waiting["schedule"])
            self._waiting["schedule"] = None
