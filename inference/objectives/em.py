r"""Expectation maximisation: coordinate ascent on the ELBO with the exact posterior of the labels as the guide.

.. math::

    \text{E-step: } q(z_n = k) = p(z_n = k \mid x_n, \theta), \qquad
    \text{M-step: } \theta \leftarrow \operatorname{argmax}_\theta
    \sum_n \mathrm{E}_q[\log p(x_n, z_n \mid \theta)] + \log p(\theta)

After an E-step the bound equals :math:`\log p(x \mid \theta) + \log p(\theta)`, so the loss never increases.

References: Dempster, Laird and Rubin 1977; Neal and Hinton 1998, "A view of the EM algorithm that justifies
incremental, sparse, and other variants" (EM as coordinate ascent on a bound).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.transforms import transform_to
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

Maximise = Callable[..., Mapping[str, Tensor]]


class EM(TraceEnum_ELBO):
    r"""Expectation maximisation as an objective: each call takes one E-step and one M-step.

    The guide has a point mass at each global site (``AutoDelta``), and the model one finite site per row, which is
    summed out. A call returns the loss at the current parameters (minus the log joint density of data and parameters,
    in nats) and then moves the parameters to those of the M-step. It leaves no gradients, so the optimizer does
    nothing.

    Args:
        maximise: The M-step: a function of responsibilities (rows, K) and the model's arguments that returns the value
            of each global site. Mixtures of the zoo have it as a method.
        start: Responsibilities (rows, K) for an M-step before the first E-step. Default: start from the guide.
        settings: Further arguments of ``TraceEnum_ELBO``.

    Raises:
        ValueError: The rows are a minibatch, the model does not have exactly one finite site, or the guide has no point
            mass at a site that the M-step updates.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDelta
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(1.0, 1.0).mask(False))
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        ...         pyro.sample("x", dist.Exponential(rate * (1.0 + 9.0 * z)), obs=x)
        >>> def maximise(responsibilities, x):
        ...     return {"rate": len(x) / (x * (responsibilities @ torch.tensor([1.0, 10.0]))).sum()}
        >>> guide = AutoDelta(pyro.poutine.block(model, hide=["z"]))
        >>> objective, x = EM(maximise, max_plate_nesting=1), torch.tensor([0.1, 0.2, 1.5, 2.0])
        >>> losses = [objective.loss_and_grads(model, guide, x) for _ in range(50)]
        >>> print(f"{guide()['rate'].item():.2f}", all(b <= a + 1e-6 for a, b in zip(losses, losses[1:])))
        0.68 True
    """

    all_rows = "an M-step is that of all responsibilities; use TraceEnum_ELBO"

    def __init__(self, maximise: Maximise, start: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.maximise, self.start = maximise, start

    @torch.no_grad()
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Take an E-step and an M-step; return minus the log joint density of data and parameters before them."""
        if kwargs.get("rows") is not None:
            raise ValueError("batch: EM expected all rows at every step, got a minibatch")
        if self.start is not None:
            points = self._points(next(iter(self._get_traces(model, guide, args, kwargs)))[1])
            self.m_step(points, self.start, args, kwargs)
            self.start = None
        model_trace, guide_trace = next(iter(self._get_traces(model, guide, args, kwargs)))
        loss, responsibilities = self.e_step(model_trace)
        self.m_step(self._points(guide_trace), responsibilities, args, kwargs)
        return loss

    def e_step(self, trace: Any) -> tuple[float, Tensor]:
        """The loss, and the exact posterior of the labels (rows, K), from the model's enumerated trace."""
        site = self._site(trace)
        plates = {f.name for f in site["cond_indep_stack"]}
        joint, rest = torch.zeros(()), 0.0
        for node in trace.nodes.values():
            if node["type"] != "sample":
                continue
            if plates <= {f.name for f in node["cond_indep_stack"]}:
                # A site in further plates (a feature each) adds the sum over them to the density of its row.
                further = [f.dim for f in node["cond_indep_stack"] if f.vectorized and f.name not in plates]
                joint = joint + (node["log_prob"].sum(further, keepdim=True) if further else node["log_prob"])
            else:
                rest += float(node["log_prob"].sum())
        joint = joint.flatten(1)
        evidence = joint.logsumexp(0)
        return -(float(evidence.double().sum()) + rest), (joint - evidence).exp().T

    def m_step(self, points: Mapping[str, str], responsibilities: Tensor, args: Any, kwargs: Any) -> None:
        """Move the guide's point masses to the best parameters for the responsibilities."""
        store = pyro.get_param_store()
        for site, value in self.maximise(responsibilities, *args, **kwargs).items():
            if site not in points:
                got = ", ".join(points) or "none"
                raise ValueError(f"guide: expected a point mass at {site}, as in AutoDelta, got {got}")
            constraint = store._constraints[points[site]]
            store._params[points[site]].copy_(transform_to(constraint).inv(value))

    @staticmethod
    def _site(trace: Any) -> Any:
        finite = [n for n in trace.nodes.values() if n["type"] == "sample" and n["infer"].get("enumerate")]
        if len(finite) != 1 or not finite[0]["cond_indep_stack"]:
            got = ", ".join(n["name"] for n in finite) or "none"
            raise ValueError(f"model: EM expected one finite site in a plate of rows, got {got}")
        return finite[0]

    @staticmethod
    def _points(trace: Any) -> dict[str, str]:
        """Name of the parameter in the store, by site at which the guide has a point mass."""
        params = {n: node["value"] for n, node in trace.nodes.items() if node["type"] == "param"}
        points = {}
        for name, value in params.items():
            site = name.replace("$$$", ".").rpartition(".")[2]
            distribution = trace.nodes[site]["fn"] if site in trace.nodes else None
            if (
                isinstance(distribution, Delta)
                and distribution.v.shape == value.shape
                and torch.equal(distribution.v, value)
            ):
                points[site] = name
        return points
