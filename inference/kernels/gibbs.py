r"""Gibbs sampling of finite sites, parallel over rows and chains, with Hamiltonian moves of the continuous sites.

.. math::

    z_{nu} \sim p(z_{nu} \mid z_{n, -u}, x_n, \theta) \text{ for every unit } u, \qquad
    \theta \sim p(\theta \mid z, x)

Elements of a plate must be conditionally independent given all other sites, and are drawn at once: ``setup`` moves one
random element per chain, from several states, and refuses a model where this changes the terms of other elements. The
units of an event (for instance those of a layer of a belief net) may depend on each other, and are drawn one after
another.

References: Geman and Geman 1984; Neal 1992, "Connectionist learning of belief networks"; Tanner and Wong 1987 (data
augmentation).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference.compiler import policy
from inference.core.bound import bind
from inference.core.checks import check_count
from inference.core.contracts import BatchedKernel, Pair
from inference.core.handlers import first_valid
from inference.draws import engine
from inference.draws.scoring import draw_sites
from inference.kernels.chees import ChEES

CHECKS = 3
"""Random states of a site, beside those that the chains start at, from which one element is moved in every chain."""


Turns = Generator[Tensor, Tensor, None]
"""Generator over the units of a site: yields log weights of the states (..., K), and is sent the state drawn."""


@dataclass(frozen=True)
class Units:
    r"""The units of a finite site.

    Attributes:
        states: Values that a unit can take, (K, \*shape of a unit).
        batch: Number of plate dimensions of the site's value.
        count: Units per element of the plates.
        keep: Names of the plates.
    """

    states: Tensor
    batch: int
    count: int
    keep: tuple[str, ...]

    def split(self, value: Tensor) -> Tensor:
        r"""Reshape a value (chains, \*plates, \*event) to (chains, \*plates, units, \*shape of a unit)."""
        return value.reshape(*value.shape[: self.batch + 1], self.count, *self.states.shape[1:])


class Gibbs(BatchedKernel):
    r"""Gibbs sampling of all finite latent sites, with ChEES-HMC for the continuous sites.

    A transition is one sweep over the finite sites and one Hamiltonian trajectory given their values. Finite sites are
    drawn, not summed out, so models with too many joint states to enumerate can be sampled.

    Args:
        model: A Pyro model.
        num_chains: Number of chains.
        conditional: The conditional distributions: a function from the name of a site and the values of all sites
            (chains, \*shape), observed ones without the dimension of chains, to a generator. It yields log weights
            (chains, \*plates, K) of the states of one unit after another, and is sent the states drawn,
            (chains, \*plates). Default: each state is scored by the model (``sample`` passes the pair's method
            ``conditional`` if it has one).
        jit_compile: Whether to compile the Hamiltonian moves into one program.
        settings: Further arguments of ``ChEES``, for the continuous sites.

    Raises:
        ValueError: The model has no finite latent site, a batch dimension of a finite site is not a plate, or its
            elements along a plate are not conditionally independent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        ...     pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> mcmc = pyro.infer.MCMC(
        ...     Gibbs(model, num_chains=500), num_samples=20, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run(torch.tensor(1.0))
        >>> draws = mcmc.get_samples()["z"]
        >>> print(tuple(draws.shape), f"{(draws.sum(-1) == 1).float().mean():.2f}")  # exact: 1 / (1 + exp(-2))
        (20, 500, 2) 0.88
    """

    block = 1
    draws_finite = resumes = True

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_chains: int = 64,
        conditional: Callable[[str, Mapping[str, Tensor]], Turns] | None = None,
        jit_compile: bool = True,
        **settings: Any,
    ) -> None:
        check_count("num_chains", num_chains)
        self.model, self.num_chains, self.conditional = model, num_chains, conditional
        self.jit_compile, self._settings = jit_compile, settings
        self._rest: ChEES | None = None
        super().__init__()

    def adopt(self, pair: Pair) -> None:
        """Take the exact conditionals of a pair that has them, unless others were given."""
        if self.conditional is None:
            self.conditional = pair.conditional

    @property
    def transforms(self) -> dict[str, Any]:  # type: ignore[override]
        """Transforms from constrained to unconstrained values of the continuous sites."""
        return {} if self._rest is None else self._rest.transforms

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Inspect the model, start finite sites at prior draws, and set up ChEES for the continuous sites."""
        self._bound = bind(partial(self.model, *args, **kwargs))
        latent = self._bound.select("latent")
        finite = [n for n, s in latent.items() if s.units]
        if not finite:
            got = ", ".join(latent) or "none"
            raise ValueError(f"model: Gibbs expected a finite latent site, got {got}; use ChEES or NUTS")
        with torch.no_grad():
            trace = first_valid(poutine.trace(self._bound.model).get_trace)
            self._units = {n: self._read(n, trace.nodes[n]["fn"]) for n in finite}
            self._observed = self._bound.observations
            start = draw_sites(self._bound.generator(), {}, self.num_chains)
            values = {n: start[n] for n in finite} | {n: v for n, v in self.initial_params.items() if n in finite}
        self._start_rest(values, set(latent) - set(finite), warmup_steps)
        self._values = values
        self._check()
        self._warmup, self._taken = warmup_steps, 0
        self._queue: deque[dict[str, Tensor]] = deque()
        self._initial = {**values, **({} if self._rest is None else self._rest.initial_params)}

    def _start_rest(self, values: dict[str, Tensor], continuous: set[str], warmup: int) -> None:
        self._rest, self.execution = None, "eager"
        if not continuous:
            return
        settings = {"num_chains": self.num_chains, "jit_compile": self.jit_compile, **self._settings}
        self._rest = ChEES(self._bound.model, given=values, block=1, **settings)
        start = {n: v for n, v in self.initial_params.items() if n in continuous}
        if start:
            self._rest.initial_params = start
        self._rest.setup(warmup)
        self.execution, self.operations = self._rest.execution, self._rest.operations
        self.nodes = self._rest.nodes

    @property
    def warming(self) -> bool:
        """Whether the next transition belongs to the warmup."""
        return self._taken < self._warmup

    @property
    def state(self) -> dict[str, Any]:
        """State of the chains and of the adaptation; assign it to resume from there, in the warmup too."""
        rest = None if self._rest is None else self._rest.state
        return {"values": dict(self._values), "taken": self._taken, "rest": rest}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._values, self._taken = dict(state["values"]), state["taken"]
        if self._rest is not None:
            self._rest.state = state["rest"]
            self.gradients = self._rest.gradients

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether the moves of the continuous sites were compiled before."""
        return self._rest is not None and self._rest.compiled

    @property
    def kept(self) -> bool:  # type: ignore[override]
        """Whether the program of these moves is kept for later processes."""
        return self._rest is not None and self._rest.kept

    @property
    def spent(self) -> float:  # type: ignore[override]
        """Operations that this process has computed without the program of these moves."""
        return 0.0 if self._rest is None else self._rest.spent

    def spend(self, gradients: int) -> None:
        """Count gradients of these moves that were computed without their program."""
        if self._rest is not None:
            self._rest.spend(gradients)

    def fuse(self, calls: float = policy.PIECE_CALLS) -> None:
        """Compile the moves of the continuous sites, before so many gradients."""
        if self._rest is not None:
            self._rest.fuse(calls)
            self.execution = self._rest.execution

    def advance(self) -> tuple[dict[str, Tensor], Any]:
        r"""Run one transition: a sweep and a trajectory.

        Returns:
            Values of the finite sites, (chains, \*shape), and the block of ``ChEES`` (without continuous sites, the log
            joint density (chains,)).
        """
        with torch.no_grad():
            continuous = self._constrained()
            for name in self._units:
                self._values[name] = self._redraw(name, {**self._observed, **continuous, **self._values})
            if self._rest is None:
                block: Any = self._joint(self._values, ())
            else:
                self._rest.given = self._values
                block = self._rest.advance()
                self.gradients = self._rest.gradients
        self._taken += 1
        return dict(self._values), block

    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Join blocks into values by site, (draws, chains, \*shape), and sample statistics, (draws, chains)."""
        values = {n: torch.stack([b[0][n] for b in blocks]) for n in self._units}
        moves = [b[1] for b in blocks]
        if self._rest is None:
            density = torch.stack(moves)
            return values, {"lp": density, "diverging": torch.zeros_like(density, dtype=torch.bool)}
        rest, stats = self._rest.collect(moves)
        return {**values, **rest}, stats

    def check(self) -> None:
        """Compare the traced program of the continuous sites with the model where the chains are."""
        if self._rest is not None:
            self._rest.check()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Run one transition of all chains; return values by site, (chains, \*shape)."""
        for name in self._units:
            self._values[name] = params[name].to(self._values[name])
        values, block = self.advance()
        return values if self._rest is None else {**values, **self._rest.handed(block.position[-1])}

    def end_warmup(self) -> None:
        """Stop adapting the moves of the continuous sites."""
        if self._rest is not None:
            self._rest.end_warmup()

    def logging(self) -> OrderedDict[str, str]:
        """Step size and acceptance of the moves of the continuous sites, for a progress bar."""
        return OrderedDict() if self._rest is None else self._rest.logging()

    def diagnostics(self) -> dict[str, Any]:
        """Indices of the divergent draws, by chain."""
        return {"divergences": {}} if self._rest is None else self._rest.diagnostics()

    def _constrained(self) -> dict[str, Tensor]:
        return {} if self._rest is None else self._rest.constrained()

    def _redraw(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """A finite site drawn unit by unit, given all else."""
        units = self._units[name]
        turns = (self.conditional or self.score)(name, values)
        drawn: list[Tensor] = []
        weights = next(turns)
        for _ in range(units.count):
            # A start of probability zero gives a unit no possible state: any will do, and the sweep goes on.
            weights = torch.where((weights > -torch.inf).any(-1, keepdim=True), weights, 0.0)
            chosen = torch.distributions.Categorical(logits=weights, validate_args=False).sample()
            drawn.append(units.states[chosen])
            try:
                weights = turns.send(drawn[-1])
            except StopIteration:
                break
        return torch.stack(drawn, units.batch + 1).reshape(values[name].shape)

    def score(self, name: str, values: Mapping[str, Tensor]) -> Turns:
        """Conditional of a site's units, from the model's density at every state of one unit after another."""
        units = self._units[name]
        latent = {n: values[n] for n in self._bound.select("latent")}
        current = units.split(latent[name]).movedim(units.batch + 1, 0).clone()
        many = len(units.states)
        for unit in range(units.count):
            proposals = current.expand(many, *current.shape).clone()
            shape = (many, *(1,) * (units.batch + 1), *units.states.shape[1:])
            proposals[:, unit] = units.states.reshape(shape)
            repeated = {n: v.repeat(many, *(1,) * (v.dim() - 1)) for n, v in latent.items()}
            repeated[name] = proposals.movedim(1, units.batch + 2).reshape(repeated[name].shape)
            weights = self._joint(repeated, units.keep).unflatten(0, (many, -1)).movedim(0, -1)
            current[unit] = yield weights

    def _joint(self, values: Mapping[str, Tensor], keep: tuple[str, ...]) -> Tensor:
        r"""Log joint density of each draw, per element of the plates in ``keep``: (draws, \*plates)."""

        def read(trace: Any) -> dict[str, Tensor]:
            return {"": engine.contract(trace, engine.sample_names(trace), list(keep))}

        return engine.run(self._bound, self._bound.model, values, None, read)[""]

    def _read(self, name: str, distribution: Any) -> Units:
        site = self._bound.sites[name]
        bare = [k for k, p in enumerate(site.plates) if p is None and site.shape[k] > 1]
        if bare:
            raise ValueError(f"{name}: expected a plate for each batch dimension, got none for dimension {bare[0]}")
        while hasattr(distribution, "base_dist"):
            distribution = distribution.base_dist
        states = distribution.enumerate_support(expand=False).reshape(-1, *distribution.event_shape)
        return Units(states, site.batch, site.units, tuple(p for p in site.plates if p))

    def _check(self) -> None:
        """Raise unless the elements of each plate are conditionally independent given all other sites.

        In every chain one element is moved to other states. The terms of the log density that belong to another element
        of the plates must stay as they are.
        """
        with torch.no_grad():
            values = {**self._constrained(), **self._values}
            for name, units in self._units.items():
                for start in (values[name], *(self._random_states(name, values) for _ in range(CHECKS))):
                    self._check_elements(name, units, {**values, name: start})

    def _random_states(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        units = self._units[name]
        picks = torch.randint(len(units.states), units.split(values[name]).shape[: units.batch + 2])
        return units.states[picks.to(units.states.device)].reshape(values[name].shape)

    def _check_elements(self, name: str, units: Units, values: Mapping[str, Tensor]) -> None:
        shape = values[name].shape[: units.batch + 1]
        if not units.keep or shape[1:].numel() < 2:
            return
        moves = torch.zeros(len(values[name]), shape[1:].numel(), dtype=torch.bool, device=values[name].device)
        moves[torch.arange(len(moves)), torch.randint(moves.shape[1], (len(moves),))] = True
        moves = moves.reshape(shape)
        other = self._random_states(name, values)
        mask = moves.reshape(*shape, *(1,) * (other.dim() - moves.dim()))
        before = self._joint(values, units.keep)
        after = self._joint({**values, name: torch.where(mask, other, values[name])}, units.keep)
        # A batch dimension without a plate has one element, and is not kept.
        moves = moves.reshape(before.shape)
        tolerance = 1e-5 if before.dtype == torch.float32 else 1e-10
        same = torch.isclose(after, before, rtol=tolerance, atol=tolerance) | ~(before.isfinite() | after.isfinite())
        if bool((moves | same).all()):
            return
        worst = (after - before).abs().masked_fill(moves | same, 0.0).nan_to_num(torch.inf).max()
        raise ValueError(
            f"{name}: expected conditionally independent elements of {', '.join(units.keep)}, got elements whose log "
            f"density changes with the state of another element (by up to {float(worst):.3g}); draw them as one event, "
            "with to_event, whose units are drawn one after another"
        )
