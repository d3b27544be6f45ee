r"""Hamiltonian Monte Carlo of many chains in one tensor: what kernels of it share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from inference.compiler import policy
from inference.compiler.capture import Untraceable
from inference.compiler.fuse import agrees, has_compiler, is_compiled, keeps_programs, looped, quietly, spend, spent
from inference.compiler.package import Package
from inference.compiler.potential import BatchedPotential, Potential
from inference.compiler.recorded import recorded
from inference.compiler.supports import MovingSupports, follow_supports, images_as_supports
from inference.core.checks import check_chance, check_count, check_positive
from inference.core.contracts import BatchedKernel
from inference.core.handlers import first_valid, random_state, set_random_state
from inference.kernels.metric import MAX_DENSE_DIM
from inference.kernels.trajectory import Chains, Metric

PARTED = 1 / 8
"""Fraction of chains that may part from those of the traced program in the first transition of the fused one."""


GIVEN_POINTS = 8
"""Chains whose given values are tried, to see that no support depends on them."""


MAX_START_DRAWS = 100
"""Maximum number of times that random starts are drawn until their density is finite, as in Pyro."""


class Hamiltonian(BatchedKernel):
    r"""Hamiltonian Monte Carlo of many chains at once: their potential, their starts, and blocks of transitions.

    A subclass runs a block by a function of tensors alone (:meth:`transitions`), and adapts between blocks.

    Args:
        model: A Pyro model; finite sites are summed out.
        potential_fn: In place of a model, a function from the unconstrained values of one chain, by name, to minus the
            log density. ``initial_params`` (chains, \*shape) must then be set.
        num_chains: Number of chains.
        step_size: Initial step size.
        target_accept_prob: Target of the acceptance probability.
        full_mass: Whether the metric is dense. Default: dense up to 200 dimensions.
        jit_compile: Whether to compile blocks of transitions into one program; otherwise the traced graph runs.
        eager: Whether to run a model that cannot be traced eagerly, one chain after another, with a warning; if False,
            such a model raises ``Untraceable``.
        transforms: Transforms from constrained to unconstrained values by site. Default: Pyro's.
        max_plate_nesting: Number of dimensions used by plates. Default: found by running the model.
        given: Values of further sites of the model, (chains, \*shape), that stay fixed while the chains move. Assign
            the attribute ``given`` to replace them by others of the same shapes.
        block: Transitions per call of the program.

    Attributes:
        least_chains: Smallest number of chains.
        step_size: Default of the argument.
        target_accept_prob: Default of the argument.
        transitions: A block of transitions: from a density, chains, tuning, metric, rules and noise to chains, tuning
            and moves.
        moves: Named tuple of the draws of a block.
        overhead: Operations of a leapfrog step besides those of its gradient.
    """

    least_chains: int = 1
    step_size: float = 1.0
    target_accept_prob: float = 0.8
    overhead: int = 0
    resumes = True
    transitions: ClassVar[Callable[..., Any]]
    moves: ClassVar[type]
    _chains: Chains
    _tuning: Tensor
    _latest: Any

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        num_chains: int | None = None,
        step_size: float | None = None,
        target_accept_prob: float | None = None,
        full_mass: bool | None = None,
        jit_compile: bool = True,
        eager: bool = True,
        transforms: Mapping[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        given: Mapping[str, Tensor] | None = None,
        block: int | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("model: expected either a model or a potential_fn")
        self.num_chains = self.lengths[-1] if num_chains is None else num_chains
        self.block = type(self).block if block is None else block
        self._first_step = self.step_size if step_size is None else step_size
        self._target = self.target_accept_prob if target_accept_prob is None else target_accept_prob
        check_count("num_chains", self.num_chains, self.least_chains)
        check_count("block", self.block)
        check_positive("step_size", self._first_step)
        check_chance("target_accept_prob", self._target, ends=False)
        self.model, self.potential_fn, self.full_mass = model, potential_fn, full_mass
        self.jit_compile, self._eager = jit_compile, eager
        self.transforms: dict[str, Any] = dict(transforms or {})
        self._given_transforms, self._nesting = transforms, max_plate_nesting
        self._moving: MovingSupports | None = None
        self._given = {n: v.contiguous() for n, v in (given or {}).items()}
        super().__init__()

    @property
    def given(self) -> dict[str, Tensor]:
        r"""Values of the fixed sites, (chains, \*shape)."""
        return dict(self._given)

    @given.setter
    def given(self, values: Mapping[str, Tensor]) -> None:
        self._given = {n: values[n].contiguous() for n in self._given}
        self._density.held[: len(self._given)] = self._given.values()
        self._place(self._chains.position.mT)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Trace the model, draw starts of finite density, and plan the warmup."""
        example = self._one_chain(args, kwargs)
        position = self._traced_start(example, args, kwargs)
        self.execution = "traced" if self._density.traced else "eager"
        self.operations, self.nodes = self._density.operations + self.overhead, self._density.nodes
        self._run: Callable[..., Any] = self._plain()
        self._place(position)
        self._initial = self._density.unpack(position)
        dim, like = self._density.dim, self._density.like
        dense = dim <= MAX_DENSE_DIM if self.full_mass is None else self.full_mass
        self._metric = Metric(*(torch.eye(dim).to(like) if dense else like.new_ones(dim) for _ in Metric._fields))
        self._warmup, self._taken, self._handed, self._ended = warmup_steps, 0, 0, warmup_steps == 0
        self.gradients = 0
        self._window: list[Tensor] = []
        self._moved = torch.zeros(self.num_chains, dtype=torch.bool, device=like.device)
        self._last = self._initial
        self._diverging: dict[int, list[int]] = {}
        self._drawn = 0
        self._plan()
        if self.jit_compile:
            self.fuse()

    def fuse(self, calls: float = policy.PIECE_CALLS) -> None:
        """Compile the block of transitions, and compare its first one with that of the traced block.

        A program that this process has found to agree before is taken as it is.

        Args:
            calls: Gradients that lie ahead: pieces of a long graph are compiled where these are worth it.
        """
        if self.execution != "traced" or not has_compiler():
            return
        density, plain, state = self._density, self._plain(), random_state()
        chains = self._chains
        try:
            with quietly(), torch.no_grad():
                # A program that is wrong may write into what it is given.
                self._chains = Chains(*(v.clone() for v in chains))
                *rest, noise = self._inputs(learning=False)
                expected = None
                if not (self._whole and agrees(self._key())):
                    # Before it is compiled: pieces take the place of those in the traced block.
                    expected = plain(*rest, type(noise)(*(v[:1] for v in noise)))[2]
                if density.pieces is not None:
                    density.pieces.fuse(self._chains.position.mT, *density.held, calls=calls)
                elif density.like.device.type == "cpu":
                    result = partial(_result, self.moves)
                    self._run = looped(plain, self._key(), (*rest, noise), result, lasting=self._lasts)
                else:
                    # A loop inside the program would wait for the device at every leapfrog step.
                    density.forward = torch.compile(density.forward, dynamic=False)
                    self._run = self._plain()
                if expected is not None:
                    _refuse_other_moves(self._run(*rest, noise)[2], expected)
                if isinstance(self._run, Package):
                    self._run.agrees = True
            self.execution = "fused"
        except Exception as error:  # whatever a compiler may raise
            density.unfuse()
            self._run = plain
            reason = error if isinstance(error, Untraceable) else type(error).__name__
            warnings.warn(f"the chains run traced, but not fused: {reason}", stacklevel=3)
        finally:
            self._chains = chains
            set_random_state(state)

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether the program of a block was compiled before, here or in another process of this machine."""
        return self._whole and self._lasts and is_compiled(self._key())

    @property
    def kept(self) -> bool:  # type: ignore[override]
        """Whether the program of a block is kept for later processes."""
        return self._whole and self._lasts and keeps_programs()

    @property
    def spent(self) -> float:  # type: ignore[override]
        """Operations that this process has computed without the program of a block."""
        return spent(self._key()) if self._whole else 0.0

    def spend(self, gradients: int) -> None:
        """Count gradients that were computed without the program of a block."""
        if self._whole:
            spend(self._key(), gradients * self.operations)

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Next draw of all chains, (chains, \*shape) by site, from a block of transitions that is run ahead."""
        if params is not self._last:
            self._place(self._density.pack(params))
        if self._handed == self._warmup:
            self.end_warmup()
        if not self._queue:
            values = self.handed(self.advance().position)
            self._queue.extend({n: v[t] for n, v in values.items()} for t in range(self.block))
        self._handed += 1
        self._last = self._queue.popleft()
        return self._last

    def clear_cache(self) -> None:
        """Forget draws that were run ahead: the next one starts from the position that it is given, as in HMC."""
        self._last = dict(self._last)

    def advance(self) -> Any:
        """Run one block of transitions: of the warmup until it is over, of draws after that."""
        learning = self.warming
        self._chains, self._tuning, moves = self._block(learning)
        self._latest = moves._replace(position=moves.position.mT)
        self._taken += self.block
        self.gradients += int(moves.leapfrogs.sum(0).max())
        if not learning:
            for draw, chain in self._latest.diverging.nonzero().tolist():
                self._diverging.setdefault(chain, []).append(self._drawn + draw)
            self._drawn += self.block
            return self._latest
        self._window.append(self._latest.position)
        self._adapt()
        if self._taken >= self._warmup:
            self._hold()
        return self._latest

    @property
    def warming(self) -> bool:
        """Whether the next block belongs to the warmup."""
        return not self._ended

    @property
    def restarted(self) -> int:  # type: ignore[override]
        """Number of chains that the warmup moved elsewhere."""
        return int(self._moved.sum())

    @property
    def state(self) -> dict[str, Any]:
        """State of the chains and of the adaptation; assign it to resume from there, in the warmup too."""
        return {
            "chains": tuple(self._chains),
            "tuning": self._tuning,
            "metric": tuple(self._metric),
            "window": tuple(self._window),
            "moved": self._moved,
            "taken": self._taken,
            "ended": self._ended,
            "gradients": self.gradients,
        }

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._chains, self._metric = Chains(*state["chains"]), Metric(*state["metric"])
        self._tuning, self._window = state["tuning"], list(state["window"])
        self._moved, self.gradients = state["moved"], state["gradients"]
        self._taken, self._ended = state["taken"], state["ended"]
        self._queue.clear()

    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Join blocks into values by site, (draws, chains, \*shape), and sample statistics, (draws, chains)."""
        moves = type(self).moves(*(torch.cat(v) for v in zip(*blocks, strict=True)))
        return self.constrain(moves.position), self._statistics(moves)

    def check(self) -> None:
        """Compare the traced program with the model where the chains are."""
        self._density.check(self._chains.position.mT)

    def constrained(self) -> dict[str, Tensor]:
        r"""Current constrained values by site, (chains, \*shape)."""
        return self.constrain(self._chains.position.mT)

    def unpack(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Unconstrained values by site, (..., \*shape), of positions (..., D)."""
        return self._density.unpack(positions)

    def handed(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Values by site (..., \*shape) as ``sample`` returns them: unconstrained, but for supports that move."""
        values = self.unpack(positions)
        if self._moving is None:
            return values
        constrained = self.constrain(positions)
        return {n: constrained[n] if n in self._moving.names else v for n, v in values.items()}

    def constrain(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Values by site (..., \*shape) of positions (..., D)."""
        values = self.unpack(positions)
        if self._moving is not None:
            shape = positions.shape[:-1]
            flat = {n: v.reshape(-1, *v.shape[len(shape) :]) for n, v in values.items()}
            return {n: v.reshape(*shape, *v.shape[1:]) for n, v in self._moving.constrain(flat).items()}
        return {n: self.transforms[n].inv(v) if n in self.transforms else v for n, v in values.items()}

    def end_warmup(self) -> None:
        """Stop adapting: fix the metric, and step size and trajectory length at their running means."""
        if self._handed <= self._warmup:
            # The rest of the last block of the warmup holds no draws.
            self._queue.clear()
        if self.warming:
            self._hold()

    def diagnostics(self) -> dict[str, Any]:
        """Indices of the divergent draws after the warmup, by chain."""
        return {"divergences": {f"chain {c}": draws for c, draws in sorted(self._diverging.items())}}

    def _statistics(self, moves: Any) -> dict[str, Tensor]:
        """Statistics of transitions (draws, chains), by ArviZ's names."""
        draws, shape = len(moves.energy), moves.energy.shape
        return {
            "n_steps": moves.leapfrogs.reshape(draws, -1).expand(shape).long(),
            "step_size": moves.step_size.reshape(draws, -1).expand(shape),
            "lp": -moves.energy,
            "energy": moves.total,
            "acceptance_rate": moves.acceptance,
            "diverging": moves.diverging,
        }

    @abstractmethod
    def _plan(self) -> None:
        """Set ``_tuning``, and plan the warmup."""

    @abstractmethod
    def _rules(self, learning: bool) -> Tensor:
        """Settings of the next block, one vector."""

    @abstractmethod
    def _noise(self) -> Any:
        """Random numbers of a block of transitions, (T, ...) each."""

    @abstractmethod
    def _adapt(self) -> None:
        """Learn from the blocks of the warmup so far."""

    @abstractmethod
    def _settle(self) -> None:
        """Fix what is adapted, at the end of the warmup."""

    def _sizes(self) -> tuple[Any, ...]:
        """Further sizes on which the program of a block depends."""
        return ()

    def _hold(self) -> None:
        self._ended = True
        self._density.check(self._chains.position.mT)
        self._settle()
        self._window.clear()

    def _place(self, position: Tensor) -> None:
        energy, gradient = self._density.run(position)
        copies = (v.clone(memory_format=torch.contiguous_format) for v in (position.mT, energy, gradient.mT))
        self._chains = Chains(*copies)
        self._queue: deque[dict[str, Tensor]] = deque()

    def _block(self, learning: bool) -> tuple[Chains, Tensor, Any]:
        with torch.no_grad():
            return self._run(*self._inputs(learning))

    def _inputs(self, learning: bool) -> tuple[Any, ...]:
        """Arguments of a block of transitions, its noise the last of them."""
        # Other strides would compile another program.
        chains = Chains(*(v.contiguous() for v in self._chains))
        return self._density.held, chains, self._tuning, self._metric, self._rules(learning), self._noise()

    def _key(self) -> tuple[Any, ...]:
        """What decides the program of a block."""
        tensors = self._chains.position, *self._metric, *self._density.held
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        own = None if self._lasts else type(self).transitions
        return kind, own, self._density.code, self.block, self._sizes(), shapes

    @property
    def _whole(self) -> bool:
        """Whether a block is one program."""
        return self.execution != "eager" and self._density.pieces is None and self._density.like.device.type == "cpu"

    @property
    def _lasts(self) -> bool:
        """Whether other processes may use the program of a block: the key does not hold code from elsewhere."""
        return type(self).transitions.__module__.split(".")[0] == __name__.split(".")[0]

    def _plain(self) -> Callable[..., Any]:
        """A block of transitions as a function of tensors alone."""
        forward, transitions = self._density.forward, type(self).transitions

        def block(held: list[Tensor], *rest: Any) -> Any:
            return transitions(lambda q: forward(q, *held), *rest)

        return block

    def _one_chain(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        if self.model is None:
            if self._initial is None:
                raise ValueError("initial_params: expected unconstrained values of all chains, got none")
            return {n: v[0] for n, v in self._initial.items()}
        held = {n: v[0] for n, v in self._given.items()}
        model = poutine.condition(self.model, data=held) if held else self.model
        with warnings.catch_warnings(), images_as_supports():
            # Random starts of a badly scaled model overflow; Pyro tries again, and raises if it gives up.
            warnings.filterwarnings("ignore", message="Encountered")
            start = partial(initialize_model, transforms=self._given_transforms, max_plate_nesting=self._nesting)
            try:
                example, self.potential_fn, self.transforms, trace = first_valid(
                    partial(start, model, args, kwargs), MAX_START_DRAWS
                )
            except ValueError as error:
                if "cannot find valid initial params" not in str(error):
                    raise
                raise ValueError(f"model: cannot find valid initial params: {_why(model, args, kwargs)}") from None
        if not example:
            raise ValueError("model: expected a continuous latent site to sample, got none")
        if self._given_transforms is None:
            points = [{n: v[k] for n, v in self._given.items()} for k in range(min(self.num_chains, GIVEN_POINTS))]
            self._follow(follow_supports(self.potential_fn, trace, held, points))
        if held:
            self.potential_fn = _holding(self.potential_fn, held)
        return example

    def _follow(self, moving: MovingSupports | None) -> None:
        """Take a potential whose supports move, if there is one; ``sample`` then hands these sites out constrained."""
        self._moving = moving
        if moving is not None:
            self.potential_fn = moving
            self.transforms = {n: t for n, t in self.transforms.items() if n not in moving.names}

    def _traced_start(self, example: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        """Record the potential, or take what was recorded before, and place the chains where both agree."""
        model, begun = None, random_state()
        if self.model is not None and self._given_transforms is None and self._nesting is None:
            model = partial(self.model, *args, **kwargs)
        try:
            given, potential = tuple(self._given.values()), cast(Potential, self.potential_fn)
            self._density, forget = recorded(model, potential, example, self.num_chains, given)
        except Untraceable as error:
            self._density = self._untraced(example, error)
            return self._start_position()
        position = self._start_position()
        try:
            self._density.check(position)
        except Untraceable as error:
            if forget is not None:
                # Something has changed that cannot be seen from outside.
                forget()
                set_random_state(begun)
                return self._traced_start(example, args, kwargs)
            self._density = self._untraced(example, error)
        return position

    def _untraced(self, example: dict[str, Tensor], error: Untraceable) -> BatchedPotential:
        if not self._eager:
            raise error
        said = f"the chains run eagerly, one after another, because they cannot be traced: {error}"
        warnings.warn(said, stacklevel=5)
        given = tuple(self._given.values())
        return BatchedPotential(self.potential_fn, example, self.num_chains, given=given, eager=True)  # type: ignore[arg-type]

    def _start_position(self) -> Tensor:
        return self._density.pack(self._initial) if self._initial else self._random_start()

    def _random_start(self) -> Tensor:
        """Uniform starts in (-2, 2), as in Pyro, redrawn while density or gradient is not finite."""
        like, shape = self._density.like, (self.num_chains, self._density.dim)
        position = torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(-2, 2)
        for _ in range(MAX_START_DRAWS):
            energy, gradient = self._density.run(position)
            bad = ~(energy.isfinite() & gradient.isfinite().all(-1))
            if not bad.any():
                return position
            position = torch.where(bad[:, None], torch.empty_like(position).uniform_(-2, 2), position)
        raise ValueError("model: cannot find valid initial params: the density of some chains is never finite")


def _result(moves: type, tensors: list[Tensor]) -> tuple[Chains, Tensor, Any]:
    """What a block returns, from a list of its tensors."""
    return Chains(*tensors[:3]), tensors[3], moves(*tensors[4:])


def _why(model: Any, args: Any, kwargs: Any) -> str:
    """Why a model has no start: the sites whose log density is not finite where it draws the others."""
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    bad = [n for n, node in trace.nodes.items() if "log_prob" in node and not node["log_prob"].isfinite().all()]
    return (
        f"the log density of {', '.join(bad) or 'the model'} is not finite; check the data and the support of the sites"
    )


def _holding(potential: Callable[..., Tensor], held: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The potential of a model conditioned on ``held``, as a function of these values as well."""

    def call(values: dict[str, Tensor], *given: Tensor) -> Tensor:
        held.update(zip(held, given, strict=True))
        return potential(values)

    return call


def _refuse_other_moves(moves: Any, expected: Any) -> None:
    """Raise Untraceable where the first transition of a block is not the expected one.

    Trajectories of a few chains may part by rounding: they are long, or an acceptance is decided by a last digit.
    """
    rtol = 1e-3 if expected.energy.dtype == torch.float32 else 1e-6
    ours, theirs = (torch.cat([m.position[0], m.energy[:1], m.acceptance[:1]]) for m in (moves, expected))
    other, chains = int((~torch.isclose(ours, theirs, rtol, rtol, equal_nan=True)).any(0).sum()), ours.shape[-1]
    if other > PARTED * chains:
        raise Untraceable(f"a fused transition differs from the traced one in {other} of {chains} chains")
