r"""What the verbs may ask of a pair, an objective and a kernel.

The verbs ask nothing that is not on this page. Nothing has to be inherited: any object with a ``model``, any ELBO and
any MCMCKernel of Pyro is taken, and where it has no answer of its own the contract's holds: ``Objective.of(elbo)`` is
the ELBO as its contract sees it. Inheriting from a contract is the short way to write one of your own.

An objective is a subclass of :class:`Objective` with ``loss_and_grads``. ``fit`` calls it once per step, and an
optimizer then moves the parameters by the gradients that it has left. A kernel of one chain is a subclass of Pyro's
``MCMCKernel``; a kernel that holds all its chains in one tensor is a subclass of :class:`BatchedKernel`. Each works in
a plain Pyro program too, in ``pyro.infer.SVI`` and ``pyro.infer.MCMC``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.elbo import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

if TYPE_CHECKING:
    from inference.core.bound import BoundPair


_ALL_ROWS: dict[type, str] = {
    RenyiELBO: "the scale of a minibatch would be an exponent of its weights; use IWAE, or Trace_ELBO",
    ReweightedWakeSleep: "the scale of a minibatch would be an exponent of its weights; use RWS, or Trace_ELBO",
    TraceTailAdaptive_ELBO: "the scale of a minibatch would be an exponent of its weights; use Trace_ELBO",
    TraceTMC_ELBO: "the scale of a minibatch would be an exponent of its weights; use TraceEnum_ELBO",
    Trace_MMD: "its discrepancy is no sum over rows; use TraceMeanField_ELBO",
}


class _Answers:
    """The attributes of an owner, and the defaults of a contract bound to it."""

    def __init__(self, owner: Any, contract: type) -> None:
        self._owner, self._contract = owner, contract

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # How to copy or pickle the owner is not how to do so with this.
            raise AttributeError(name)
        if hasattr(self._owner, name):
            return getattr(self._owner, name)
        default = vars(self._contract)[name]
        return default.__get__(self._owner) if hasattr(default, "__get__") else default


def _as_contract(contract: type, owner: Any) -> Any:
    return owner if isinstance(owner, contract) else _Answers(owner, contract)


class Pair:
    """What the verbs may ask of a pair: an object with ``model`` and, for ``fit``, ``guide``.

    Attributes:
        model: A Pyro model whose arguments are data by name. Where they include ``size`` (the full number of rows) and
            ``rows`` (the indices of a minibatch), ``fit(batch=...)`` and ``log_evidence(batch=...)`` pass them.
        guide: A Pyro guide over the model's latent sites, called with the same arguments.
        coords: Names along a dimension (a plate or one of ``dims``), for ArviZ.
        dims: Names of the event dimensions of a site, for ArviZ.
        rowwise: Whether all data have one entry per row: then unequal lengths are an error.
        conditional: The exact conditionals of a site's units, as :class:`inference.kernels.Gibbs` describes them; None:
            the model's own density is used.
        log_evidence: From the data to the exact log p(x) of each row, in nats, (rows,); None: not known.
        impute: From the data by name (nan is a missing entry of the first), the number of ``draws`` and posterior draws
            of the global latent sites by name as ``latents``, to completed rows (draws, rows, columns): the missing
            entries given the known ones of their row and the data of the fit; None: not known, and model and guide
            alternate where they can.
        columnwise: From a number of ``rows`` and posterior draws of the global latent sites by name as ``latents``, to
            a generator of the columns of as many rows, one after another: it yields the column and the unnormalised
            log probability (rows, states) of each of its states 0, 1, ... given the columns before it, and is sent
            the states (rows,). Their product is p(x | data of the fit). None: not known.
        restore: From the data by name with what is seen of rows, (rows, M), as the first, the standard deviation ``sd``
            of Gaussian noise or the probability ``flips`` of a binary entry, a ``matrix`` A where A x is seen, the
            number of ``draws`` and ``latents`` as above, to the mean and standard deviation of the rows and the Monte
            Carlo error of the mean, (rows, columns) each; None: not known, and model and guide alternate if they can.
        generate_like: From the data to as many generated rows by name, of a pair that generates rows from rows; None:
            the model draws them.
        pictures: From data by name to grids of images by name, each (rows, columns, pixels) in [0, 1] with a title;
            None: the pair draws none.
        steps: Number of steps of a diffusion chain; None for other pairs.
        learning_rate: Initial rate of the default schedule of ``fit``, at which the pair trains well; None: 0.002 for
            networks, else 0.02.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None = None
    coords: Mapping[str, Sequence[Any]] = {}
    dims: Mapping[str, Sequence[str]] = {}
    rowwise: bool = False
    conditional: Callable[..., Any] | None = None
    log_evidence: Callable[..., Tensor] | None = None
    impute: Callable[..., Tensor] | None = None
    columnwise: Callable[..., Generator[tuple[int, Tensor], Tensor, None]] | None = None
    restore: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    generate_like: Callable[..., Mapping[str, Tensor]] | None = None
    pictures: Callable[..., Mapping[str, tuple[Tensor, str]]] | None = None
    steps: int | None = None
    learning_rate: float | None = None

    @staticmethod
    def of(pair: Any) -> Pair:
        """Any object as its contract sees it."""
        return cast(Pair, _as_contract(Pair, pair))

    def check(self, **data: Any) -> None:
        """Raise a ValueError of one line when the data do not fit the pair. Verbs call it before any work."""


class Objective(ELBO):
    r"""What ``fit`` may ask of an objective: an ELBO of Pyro with ``loss_and_grads``.

    ``Compiled`` records ``loss_and_grads`` as a graph. What changes from step to step must therefore be an attribute
    that is a number or a string (each value has a graph of its own) or a tensor (an input of the graph, changed in
    place).

    Attributes:
        has_posterior: Whether the guide is a posterior, to be drawn from and judged by Pareto k. Without one the Result
            has the losses and what ``advise`` says.
        cycle: Names of attributes that go round in a cycle, such as a counter of turns. Each of their values is
            compiled once.
        probe: Arguments under which the model is run once before the fit to see its sites.
        shares_rows: Whether it runs on the rows of this process and adds up gradients over a group of processes.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.util import torch_item
        >>> class MaximumLikelihood(Objective):
        ...     has_posterior = False
        ...     def loss_and_grads(self, model, guide, *args, **kwargs):
        ...         trace = pyro.poutine.trace(model).get_trace(*args, **kwargs)
        ...         loss = -trace.log_prob_sum()
        ...         loss.backward()
        ...         return torch_item(loss)
        >>> def model(x):
        ...     rate = pyro.param("rate", torch.tensor(1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Exponential(rate), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), MaximumLikelihood())
        >>> losses = [svi.step(torch.tensor([1.0, 3.0])) for _ in range(200)]
        >>> print(f"{pyro.param('rate').item():.1f}")
        0.5
    """

    has_posterior: bool = True
    cycle: Sequence[str] = ()
    probe: Mapping[str, Any] = {}
    shares_rows: bool = False

    @staticmethod
    def of(elbo: ELBO) -> Objective:
        """Any ELBO as its contract sees it.

        Example:
            >>> from pyro.infer import Trace_ELBO
            >>> Objective.of(Trace_ELBO()).has_posterior, Objective.of(TraceEnum_ELBO()).sums_out
            (True, True)
        """
        return cast(Objective, _as_contract(Objective, elbo))

    @abstractmethod
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, a number or a tuple of them; gradients are added to ``grad`` of the unconstrained parameters."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss without gradients, for ``SVI.evaluate_loss``; ``fit`` does not call it."""
        raise NotImplementedError(f"{type(self).__name__} has no loss without gradients")

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    @property
    def sums_out(self) -> bool:
        """Whether finite sites that the guide leaves out are summed out: the model is then marked for enumeration."""
        return isinstance(self, TraceEnum_ELBO)

    @property
    def all_rows(self) -> str:
        """Why every step has to see all rows, and what to use instead; empty where minibatches will do.

        Minibatches will do where the loss is a sum over rows: then its mean over minibatches, each scaled up to all
        rows, is the loss of all rows.
        """
        return next((why for kind, why in _ALL_ROWS.items() if isinstance(self, kind)), "")

    def check(self, bound: BoundPair) -> None:
        """Raise a ValueError of one line when the pair lacks what the objective needs. ``fit`` calls it before a step.

        By default the model must observe something: an ELBO of a model without a likelihood is a finite number that
        means nothing.
        """
        if bound.observes:
            return
        if bound.generated:
            raise ValueError(
                f"objective: {type(self).__name__} needs a likelihood, and the model observes nothing: its number "
                "would mean nothing; use Adversarial()"
            )
        given = ", ".join(bound.data) or "no data"
        raise ValueError(f"data: the model observes nothing, so there is nothing to fit; got {given}")

    def advise(self, bound: BoundPair, losses: np.ndarray) -> Sequence[str]:
        """Sentences about a fit that is over: what is wrong, and what to do. Its parameters are in the store.

        Args:
            bound: The pair and its data.
            losses: Loss of each step (steps,), or (steps, 2) for two losses.
        """
        return ()

    def constants(self) -> dict[str, Any]:
        """Attributes that are numbers, strings or None: a compiled step is recorded anew for each of their values."""
        return {k: v for k, v in vars(self).items() if v is None or isinstance(v, int | float | str)}

    def tensors(self) -> list[Tensor]:
        """Attributes that are tensors: inputs of a compiled step, which may change them in place."""
        return [v for v in vars(self).values() if isinstance(v, Tensor)]


class Kernel(MCMCKernel):
    """What ``sample`` may ask of a kernel: any MCMCKernel of Pyro.

    Attributes:
        batched: Whether the kernel is a :class:`BatchedKernel`. Chains of another kernel run in processes of their own.
        draws_finite: Whether the kernel draws finite sites itself. Otherwise they are summed out.
        resumes: Whether the chains of a batched kernel can go on from a checkpoint: ``state`` is then all that later
            transitions depend on, in the warmup too. It and the blocks are made of mappings, tuples, numbers and
            tensors, and named tuples come back as plain ones.
        potential_fn: Potential energy of unconstrained values by name, which ``sample`` may replace by a compiled one;
            None: the kernel has none.
        transforms: Transforms by name from constrained to unconstrained values.
    """

    batched: bool = False
    draws_finite: bool = False
    resumes: bool = False
    potential_fn: Callable[..., Tensor] | None = None
    transforms: Mapping[str, Any] | None = None

    @staticmethod
    def of(kernel: MCMCKernel) -> Kernel:
        """Any kernel as its contract sees it."""
        return cast(Kernel, _as_contract(Kernel, kernel))

    def adopt(self, pair: Pair) -> None:
        """Take from a pair what the kernel can use; called before ``setup``."""


class BatchedKernel(Kernel):
    r"""A kernel that holds all its chains in one tensor.

    In plain ``pyro.infer.MCMC`` a draw of a site is (chains, \*shape): chains are the second dimension of the draws.
    ``sample`` reads them as chains. It calls ``setup``, which starts the chains and sets ``initial_params``, then
    ``advance`` block by block, through the warmup to the last draw, ``collect`` for some of the blocks at a time, and
    ``check`` at the end.

    Attributes:
        num_chains: Number of chains C, set before ``setup``.
        jit_compile: Whether ``setup`` compiles, set before it.
        lengths: Default numbers of draws, warmup draws and chains.
        block: Transitions per call of ``advance``.
        execution: How the kernel runs: ``eager``, ``traced`` or ``fused``.
        restarted: Number of chains that the warmup moved elsewhere.
        expected: Gradients that a transition is expected to take, before the first.
        gradients: Gradients that each chain has computed so far.
        operations: Cost of one gradient of all chains before it is fused, as ``compiler.potential.count_operations``
            counts it.
        nodes: Operations in the graph of a gradient, with which the cost of fusing it grows.
        compiled: Whether what ``fuse`` compiles was compiled before, so that it costs nothing.
        kept: Whether what ``fuse`` compiles is kept for later processes.
        spent: Operations that earlier runs of the process have computed without what ``fuse`` compiles.
        state: Position and adaptation of the chains, from which they can go on.
    """

    batched = True
    lengths: tuple[int, int, int] = (250, 300, 64)
    num_chains: int = 64
    jit_compile: bool = False
    block: int = 1
    execution: str = "eager"
    restarted: int = 0
    expected: int = 4
    gradients: int = 0
    operations: int = 0
    nodes: int = 0
    compiled: bool = False
    kept: bool = False
    spent: float = 0.0
    state: Any = None

    _initial: dict[str, Tensor] | None = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        r"""Starting values by name, (chains, \*shape): finite ones as they are, continuous ones unconstrained."""
        return {} if self._initial is None else self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        wrong = [n for n, v in params.items() if v.dim() == 0 or len(v) != self.num_chains]
        if wrong:
            shape = tuple(params[wrong[0]].shape)
            raise ValueError(f"initial_params: expected ({self.num_chains}, ...) for {wrong[0]}, got {shape}")
        self._initial = params

    @property
    @abstractmethod
    def warming(self) -> bool:
        """Whether the next block belongs to the warmup."""

    @abstractmethod
    def advance(self) -> Any:
        """Run a block of transitions and return what ``collect`` needs of it: warmup first, then draws."""

    def spend(self, gradients: int) -> None:
        """Count gradients that were computed without what ``fuse`` compiles, for ``spent`` of later kernels."""

    @abstractmethod
    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Blocks of draws as values by site (draws, chains, \*shape) and statistics (draws, chains).

        Statistics are named as ArviZ names them: ``diverging``, ``acceptance_rate``, ``lp``, ``n_steps``.
        """

    def check(self) -> None:
        """Raise Untraceable where the chains are where the traced program is none of the model."""

    def fuse(self, calls: float = 0) -> None:
        """Compile what is worth it before so many gradients, and run it once, so that the cost is paid here."""

    def logging(self) -> OrderedDict[str, str]:
        """What a progress bar shows."""
        return OrderedDict()
