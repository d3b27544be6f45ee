r"""Adam as tensor operations that a compiled program can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Adam:
    r"""Adam with a cosine schedule, as tensor operations that a program can hold.

    .. math:: \theta \leftarrow \theta - \frac{\alpha_t}{1 - \beta_1^t} \,
        \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    The learning rate :math:`\alpha_t` falls from ``rate`` to a hundredth of it along half a cosine. After the first
    loss or gradient that is not finite, calls change nothing.

    Args:
        params: Unconstrained parameters by name; each call takes them in this order.
        rate: Initial learning rate.
        steps: Number of steps of the schedule.

    Attributes:
        step: Number of calls.
        good: Number of calls before the first loss or gradient that was not finite.

    Reference: Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980).
    """

    betas, epsilon = (0.9, 0.999), 1e-8

    def __init__(self, params: Mapping[str, Tensor], rate: float, steps: int) -> None:
        self.names = list(params)
        device = next((p.device for p in params.values()), torch.device("cpu"))
        # A tensor, so that fits of any length and rate run the same program.
        self.schedule = torch.tensor([rate, rate / 100, max(steps, 1)], dtype=torch.float64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.moments = [torch.zeros_like(p) for p in params.values()]
        self.squares = [torch.zeros_like(p) for p in params.values()]

    def extend(self, params: Mapping[str, Tensor]) -> None:
        """Move further parameters too, which a step has made; programs that were traced before do not know them."""
        self.names = [*self.names, *params]
        self.moments = [*self.moments, *(torch.zeros_like(p) for p in params.values())]
        self.squares = [*self.squares, *(torch.zeros_like(p) for p in params.values())]

    @property
    def changing(self) -> list[Tensor]:
        """Tensors that a step changes, besides the parameters."""
        return [self.step, self.good, *self.moments, *self.squares]

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that a step reads or changes, besides the parameters."""
        return [*self.changing, self.schedule]

    def __call__(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        """Move the parameters, unless something is not finite now or was not before."""
        finite = loss.isfinite() & (self.good == self.step)
        for g in gradients:
            if g is not None:
                finite = finite & g.isfinite().all()
        scales = self._scales(self.step)
        for p, g, m, v in zip(params, gradients, self.moments, self.squares, strict=True):
            if g is None:
                continue
            m.copy_(torch.where(finite, m.lerp(g, 1 - self.betas[0]), m))
            v.copy_(torch.where(finite, (self.betas[1] * v).addcmul(g, g, value=1 - self.betas[1]), v))
            p.copy_(torch.where(finite, p - self._move(m, v, *scales), p))
        self.good.add_(finite)
        self.step.add_(1)

    def back(self, params: Sequence[Tensor]) -> None:
        """Undo the last good move, which led to something that is not finite."""
        if self.good:
            scales = self._scales(self.good - 1)
            for p, m, v in zip(params, self.moments, self.squares, strict=True):
                p.add_(self._move(m, v, *scales))

    def _scales(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Factor of the first moment in a move, and offset of the root of the second, after ``step`` steps."""
        rate, low, total = self.schedule.unbind()
        taken = step.double()
        # With exp instead of pow: inductor computes an exp once, all else again for each entry of a parameter.
        first, second = (1 - ((taken + 1) * math.log(beta)).exp() for beta in self.betas)
        root = second.sqrt()
        return (low + (rate - low) * (1 + (math.pi * taken / total).cos()) / 2) / first * root, self.epsilon * root

    def _move(self, m: Tensor, v: Tensor, rate: Tensor, floor: Tensor) -> Tensor:
        return rate.to(m.dtype) * m / (v.sqrt() + floor.to(m.dtype))
