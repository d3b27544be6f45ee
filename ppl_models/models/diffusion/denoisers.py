"""Networks of a diffusion chain: from noised rows, their steps and labels to a prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.models.diffusion.schedules import interpolate, ratio_of


class Denoiser(nn.Module):
    """Dense layers of rows, each moved by what the step and the label say.

    Args:
        features: Width D of a row.
        outputs: Width of the output.
        steps: T.
        hidden: Widths of the hidden layers; those of equal width are residual.
        classes: Number of classes K; a label K is a hidden one.
        waves: Frequencies of a step's code.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        steps: int,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        classes: int = 0,
        waves: int = 32,
    ) -> None:
        super().__init__()
        self.code = StepCode(steps, hidden[0], classes=classes, waves=waves)
        self.enter = nn.Linear(features, hidden[0])
        pairs = list(zip((hidden[0], *hidden), hidden, strict=False))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.moved = nn.ModuleList(nn.Linear(hidden[0], 2 * b) for _, b in pairs)
        self.leave = nn.Linear(hidden[-1], outputs)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        code = self.code(t, y)
        h = self.enter(x)
        for layer, moved in zip(self.layers, self.moved, strict=True):
            gain, level = moved(code).chunk(2, -1)
            new = nn.functional.silu(layer(h) * (1 + gain) + level)
            h = h + new if new.shape == h.shape else new
        return self.leave(h)


class StepCode(nn.Module):
    """A step (...,), and a label, as numbers (..., width): sines of many frequencies, and two layers.

    Args:
        steps: T.
        width: Of the output.
        classes: Number of classes K; a label K is a hidden one.
        waves: Number of frequencies, from half a period over all steps up to one over a few.
    """

    rates: Tensor

    def __init__(self, steps: int, width: int, *, classes: int = 0, waves: int = 32) -> None:
        super().__init__()
        self.register_buffer("rates", torch.logspace(0, math.log10(max(steps / 2, 2)), waves) * math.pi / steps)
        self.inner = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        if t.dim() and not any(t.stride()):
            # One step for all rows, as a sampler takes them, is coded once.
            t = t[(0,) * t.dim()][None]
        at = t.to(self.rates)[..., None] * self.rates
        code = self.inner(torch.cat([at.sin(), at.cos()], -1))
        return nn.functional.silu(code if self.labels is None or y is None else code + self.labels(y))


class ExactDenoiser(nn.Module):
    r"""The best network there can be, for rows of a known Gaussian mixture: the mean of x given :math:`x_t`.

    For ``prediction="sample"`` and rows that are not shifted; it has no parameters.

    .. math:: \mathrm{E}[x \mid x_t] = \sum_k r_k(x_t)\,
        \big(m_k + c_k (x_t - \sqrt{\bar\alpha_t}\, m_k)\big), \qquad
        c_k = \frac{\sqrt{\bar\alpha_t}\, s_k^2}{\bar\alpha_t s_k^2 + 1 - \bar\alpha_t}

    Args:
        means: m (K, D).
        deviations: s (K,), or a number.
        weights: (K,); None: equal ones.
        signal: :math:`\bar\alpha` (T,), the schedule of the pair.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor
    ratio: Tensor

    def __init__(
        self, means: Tensor, deviations: Tensor | float, signal: Tensor, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("variances", torch.as_tensor(deviations).to(means).square().expand(len(means)).clone())
        even = torch.full((len(means),), 1 / len(means)).to(means)
        self.register_buffer("weights", even if weights is None else weights / weights.sum())
        self.register_buffer("ratio", ratio_of(signal.double()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        ratio = interpolate(self.ratio, t)[..., None]
        level = ratio.sigmoid().to(x)
        total = level * self.variances + (-ratio).sigmoid().to(x)
        centred = x[..., None, :] - level.sqrt()[..., None] * self.means
        score = self.weights.log() - 0.5 * (centred.square().sum(-1) / total + x.shape[-1] * total.log())
        move = (level.sqrt() * self.variances / total)[..., None] * centred
        return (score.softmax(-1)[..., None] * (self.means + move)).sum(-2)


class UNet(nn.Module):
    """A U-Net of images: down to a quarter of each side and up again, each level beside that of its size on the way.

    Args:
        shape: Height and width of an image.
        steps: T.
        channels: Channels of each level, from the finest; each level but the last halves height and width.
        classes: Number of classes K; a label K is a hidden one.
        planes: Images in one row, side by side: colours.
        wide: Whether variances are predicted too.

    Rows are images as they lie, (..., planes H W).

    References: Ronneberger, Fischer and Brox 2015; Ho, Jain and Abbeel 2020, whose blocks it has.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        steps: int,
        *,
        channels: Sequence[int] = (32, 64, 64),
        classes: int = 0,
        planes: int = 1,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (planes, *shape)
        width = 4 * channels[0]
        self.code = StepCode(steps, width, classes=classes)
        self.enter = nn.Conv2d(planes, channels[0], 3, padding=1)
        before = (channels[0], *channels[:-1])
        self.down = nn.ModuleList(Block(a, b, width) for a, b in zip(before, channels, strict=True))
        self.middle = Block(channels[-1], channels[-1], width)
        self.attend = Attention(channels[-1])
        self.last = Block(channels[-1], channels[-1], width)
        after = (channels[-1], *reversed(channels[1:]))
        self.up = nn.ModuleList(Block(a + b, b, width) for a, b in zip(after, reversed(channels), strict=True))
        self.norm = nn.GroupNorm(8, channels[0])
        self.leave = nn.Conv2d(channels[0], planes * (2 if wide else 1), 3, padding=1)
        faint(self.leave)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        code = self.code(t, y)
        code = code.expand(*x.shape[:-1], -1).reshape(-1, code.shape[-1])
        h = self.enter(x.reshape(-1, *self.shape))
        beside: list[Tensor] = []
        for k, block in enumerate(self.down):
            h = block(h if k == 0 else nn.functional.avg_pool2d(h, 2, ceil_mode=True), code)
            beside.append(h)
        h = self.last(self.attend(self.middle(h, code)), code)
        for block, same in zip(self.up, reversed(beside), strict=True):
            if h.shape[-2:] != same.shape[-2:]:
                h = nn.functional.interpolate(h, scale_factor=2.0)[..., : same.shape[-2], : same.shape[-1]]
            h = block(torch.cat([h, same], 1), code)
        return self.leave(nn.functional.silu(self.norm(h))).reshape(*x.shape[:-1], -1)


class Block(nn.Module):
    """Two convolutions, moved by the code between them, beside a way around them."""

    def __init__(self, inputs: int, outputs: int, code: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.moved = nn.Linear(code, 2 * outputs)
        self.norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        faint(self.second)
        self.around = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        gain, level = self.moved(code)[..., None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + gain) + level
        return self.around(x) + self.second(nn.functional.silu(h))


class Attention(nn.Module):
    """Every place of an image looks at every other, beside what is there."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.read = nn.Conv2d(channels, 3 * channels, 1)
        self.write = nn.Conv2d(channels, channels, 1)
        faint(self.write)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.write(seen.mT.reshape(x.shape))


def faint(layer: nn.Conv2d) -> None:
    """Start a layer at a tenth of its usual weights: blocks begin near to doing nothing, and yet learn at once."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
