"""Torch networks that more than one pair uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Dense layers of the given widths, inputs first, with an activation between them."""
    layers = [[nn.Linear(a, b), activation()] for a, b in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


class Images(nn.Module):
    """Applies an image network to flattened rows with any leading dimensions, such as particles or chains.

    Args:
        inner: From (N, C, H, W), or rows (N, values), to (N, ...).
        shape: Shape of one input of ``inner``. Default: the row as it is.
    """

    def __init__(self, inner: nn.Module, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, *(self.shape or x.shape[-1:]))
        return self.inner(rows).reshape(*x.shape[:-1], -1)


class Residual(nn.Module):
    """The input plus a network of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class LateFusion(nn.Module):
    """Applies a network to the first columns of a row, and another to its output joined with the other columns.

    Args:
        inner: Network of the first columns.
        width: Number of the first columns.
        outer: Network of the outputs of ``inner`` and the other columns.
    """

    def __init__(self, inner: nn.Module, width: int, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.width, self.outer = inner, width, outer

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.cat([self.inner(x[..., : self.width]), x[..., self.width :]], -1))


class Averaged(nn.Module):
    r"""Exponential moving average of a network's parameters, :math:`m \leftarrow d m + (1 - d) p`.

    Each call in training mode updates the average and uses the parameters themselves; in evaluation mode the average is
    used. It is held in buffers: torch's ``AveragedModel`` copies parameters, which Pyro would train.

    Args:
        network: Any network.
        decay: d.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
        self.network, self.decay = network, decay
        self._names = {n: f"mean_{n.replace('.', '_')}" for n, _ in network.named_parameters()}
        for name, p in network.named_parameters():
            self.register_buffer(self._names[name], p.detach().clone())

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.training:
            means = {n: getattr(self, buffer) for n, buffer in self._names.items()}
            return functional_call(self.network, means, inputs)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                getattr(self, self._names[name]).lerp_(p, 1 - self.decay)
        return self.network(*inputs)


def conv_encoder(
    shape: tuple[int, int],
    outputs: int,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    planes: int = 1,
    activation: Callable[[], nn.Module] = nn.ELU,
) -> Images:
    """Convolutions of stride 2 and one hidden dense layer, from pixels (..., planes H W) to (..., outputs).

    Args:
        shape: Height and width of an image.
        outputs: Width of the output.
        channels: Channels of each convolution, which halves height and width.
        hidden: Width of the dense layer before the output.
        planes: Image planes per input, such as colours or the images of a pack.
        activation: Factory of an activation.
    """
    height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((planes, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
        height, width = (height + 1) // 2, (width + 1) // 2
    last = channels[-1] * height * width
    dense = [nn.Flatten(), nn.Linear(last, hidden), activation(), nn.Linear(hidden, outputs)]
    return Images(_initialised(nn.Sequential(*layers, *dense)), (planes, *shape))


def conv_decoder(
    inputs: int,
    shape: tuple[int, int],
    *,
    channels: Sequence[int] = (64, 32),
    hidden: int = 128,
    planes: int = 1,
    activation: Callable[[], nn.Module] = nn.ELU,
    normalise: bool = False,
) -> Images:
    """The mirror image of :func:`conv_encoder`, from factors (..., inputs) to pixels (..., planes H W).

    Args:
        inputs: Width of the input.
        shape: Height and width of an image.
        channels: Channels before each transposed convolution, which doubles height and width.
        hidden: Width of the dense layer after the input.
        planes: Image planes per output.
        activation: Factory of an activation.
        normalise: Whether to apply batch normalisation between convolutions, as in a DCGAN.
    """
    sizes = [shape]
    for _ in channels:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    height, width = sizes.pop()
    start = channels[0] * height * width
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, start)]
    layers.append(nn.Unflatten(1, (channels[0], height, width)))
    for (before, after), (high, wide) in zip(pairwise((*channels, planes)), reversed(sizes), strict=True):
        # A side of odd length is one pixel shorter than the doubled one.
        padding = (1 - high % 2, 1 - wide % 2)
        layers += [nn.BatchNorm2d(before)] if normalise else []
        layers += [activation(), nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding)]
    return Images(_initialised(nn.Sequential(*layers, nn.Flatten())))


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """Initialise all layers but the last as in He et al. 2015: with torch's default, signals fade over five layers."""
    layers = [m for m in network if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    for layer in layers[:-1]:
        weight: Tensor = layer.weight
        # Inputs per output: of a transposed convolution with stride 2, a quarter of the window.
        fan = weight[:, 0].numel() / 4 if isinstance(layer, nn.ConvTranspose2d) else weight[0].numel()
        nn.init.normal_(weight, std=(2 / fan) ** 0.5)
        nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]
    return network


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode."""
    training = [m for m in module.modules() if m.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def check_network(name: str, network: nn.Module, inputs: int, outputs: int, *more: Tensor) -> None:
    """Raise ValueError unless a copy of a network maps a row of zeros, and ``more`` inputs, to a row of ``outputs``."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {network!r}")
    like = next(network.parameters(), torch.empty(0))
    row = torch.zeros(1, inputs, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            out = deepcopy(network).eval()(row, *(v.to(row.device) for v in more))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: expected inputs of width {inputs}, got an error: {reason}") from None
    if not isinstance(out, Tensor) or out.shape != (1, outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name}: expected outputs of width {outputs}, got {got}")
