"""Networks of a diffusion chain: from noisy rows, their steps and labels to a prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.models.diffusion.schedules import at_steps, log_snr_of


class Denoiser(nn.Module):
    """Dense layers, each scaled and shifted by an embedding of step and label.

    Args:
        features: Width D of a row.
        outputs: Width of the output.
        steps: T.
        hidden: Widths of the hidden layers; those that keep the width are residual.
        classes: Number of classes K; a label K stands for no label.
        frequencies: Number of frequencies of the step embedding.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        steps: int,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        classes: int = 0,
        frequencies: int = 32,
    ) -> None:
        super().__init__()
        self.embedding = StepEmbedding(steps, hidden[0], classes=classes, frequencies=frequencies)
        self.inputs = nn.Linear(features, hidden[0])
        pairs = list(zip((hidden[0], *hidden), hidden, strict=False))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.modulations = nn.ModuleList(nn.Linear(hidden[0], 2 * b) for _, b in pairs)
        self.outputs = nn.Linear(hidden[-1], outputs)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        embedding = self.embedding(t, y)
        h = self.inputs(x)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(embedding).chunk(2, -1)
            new = nn.functional.silu(layer(h) * (1 + scale) + shift)
            h = h + new if new.shape == h.shape else new
        return self.outputs(h)


class StepEmbedding(nn.Module):
    """Embedding (..., width) of steps (...,) and labels: sines and cosines, followed by two dense layers.

    Args:
        steps: T.
        width: Width of the embedding.
        classes: Number of classes K; a label K stands for no label.
        frequencies: Number of frequencies, logarithmically spaced from half a period over all steps to the highest that
            T steps resolve.
    """

    rates: Tensor

    def __init__(self, steps: int, width: int, *, classes: int = 0, frequencies: int = 32) -> None:
        super().__init__()
        exponents = torch.logspace(0, math.log10(max(steps / 2, 2)), frequencies)
        self.register_buffer("rates", exponents * math.pi / steps)
        self.inner = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        if t.dim() and not any(t.stride()):
            # A sampler takes the same step for all rows, expanded: it is embedded once.
            t = t[(0,) * t.dim()][None]
        angles = t.to(self.rates)[..., None] * self.rates
        embedding = self.inner(torch.cat([angles.sin(), angles.cos()], -1))
        return nn.functional.silu(embedding if self.labels is None or y is None else embedding + self.labels(y))


class ExactDenoiser(nn.Module):
    r"""The optimal network for rows from a known Gaussian mixture, :math:`\mathrm{E}[x_0 \mid x_t]`; no parameters.

    For ``prediction="sample"`` and a pair without ``shift`` and ``scale``.

    .. math:: \mathrm{E}[x_0 \mid x_t] = \sum_k r_k(x_t)\,
        \big(m_k + c_k (x_t - \sqrt{\bar\alpha_t}\, m_k)\big), \qquad
        c_k = \frac{\sqrt{\bar\alpha_t}\, s_k^2}{\bar\alpha_t s_k^2 + 1 - \bar\alpha_t}

    Args:
        means: m (K, D).
        sd: s (K,), or a number.
        alpha_bar: :math:`\bar\alpha` (T,), the schedule of the pair.
        weights: Weights (K,) of the components. Default: equal.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor
    log_snr: Tensor

    def __init__(self, means: Tensor, sd: Tensor | float, alpha_bar: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("variances", torch.as_tensor(sd).to(means).square().expand(len(means)).clone())
        weights = torch.ones(len(means)).to(means) if weights is None else weights
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("log_snr", log_snr_of(alpha_bar.double()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        log_snr = at_steps(self.log_snr, t)[..., None]
        alpha_bar = log_snr.sigmoid().to(x)
        total = alpha_bar * self.variances + (-log_snr).sigmoid().to(x)
        centred = x[..., None, :] - alpha_bar.sqrt()[..., None] * self.means
        score = self.weights.log() - 0.5 * (centred.square().sum(-1) / total + x.shape[-1] * total.log())
        correction = (alpha_bar.sqrt() * self.variances / total)[..., None] * centred
        return (score.softmax(-1)[..., None] * (self.means + correction)).sum(-2)


class UNet(nn.Module):
    """A U-Net for images, with self-attention at the lowest resolution.

    Args:
        shape: Height and width of an image.
        steps: T.
        channels: Channels of each level, from the finest; each further level halves height and width.
        classes: Number of classes K; a label K stands for no label.
        planes: Image planes per row, such as colours.
        learned_variance: Whether the output also holds the variances.

    Rows are flattened images (..., planes H W).

    References: Ronneberger, Fischer and Brox 2015; Ho, Jain and Abbeel 2020, for the blocks.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        steps: int,
        *,
        channels: Sequence[int] = (32, 64, 64),
        classes: int = 0,
        planes: int = 1,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (planes, *shape)
        width = 4 * channels[0]
        self.embedding = StepEmbedding(steps, width, classes=classes)
        self.inputs = nn.Conv2d(planes, channels[0], 3, padding=1)
        before = (channels[0], *channels[:-1])
        self.down = nn.ModuleList(ResidualBlock(a, b, width) for a, b in zip(before, channels, strict=True))
        self.first = ResidualBlock(channels[-1], channels[-1], width)
        self.attention = Attention(channels[-1])
        self.second = ResidualBlock(channels[-1], channels[-1], width)
        after = (channels[-1], *reversed(channels[1:]))
        self.up = nn.ModuleList(ResidualBlock(a + b, b, width) for a, b in zip(after, reversed(channels), strict=True))
        self.norm = nn.GroupNorm(8, channels[0])
        self.outputs = nn.Conv2d(channels[0], planes * (2 if learned_variance else 1), 3, padding=1)
        shrink(self.outputs)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        embedding = self.embedding(t, y)
        embedding = embedding.expand(*x.shape[:-1], -1).reshape(-1, embedding.shape[-1])
        h = self.inputs(x.reshape(-1, *self.shape))
        skips: list[Tensor] = []
        for k, block in enumerate(self.down):
            h = block(h if k == 0 else nn.functional.avg_pool2d(h, 2, ceil_mode=True), embedding)
            skips.append(h)
        h = self.second(self.attention(self.first(h, embedding)), embedding)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            if h.shape[-2:] != skip.shape[-2:]:
                h = nn.functional.interpolate(h, scale_factor=2.0)[..., : skip.shape[-2], : skip.shape[-1]]
            h = block(torch.cat([h, skip], 1), embedding)
        return self.outputs(nn.functional.silu(self.norm(h))).reshape(*x.shape[:-1], -1)


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection, scaled and shifted by the embedding between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        shrink(self.second)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[..., None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(nn.functional.silu(h))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of an image, with a residual connection."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.inputs = nn.Conv2d(channels, 3 * channels, 1)
        self.outputs = nn.Conv2d(channels, channels, 1)
        shrink(self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.outputs(attended.mT.reshape(x.shape))


def shrink(layer: nn.Conv2d) -> None:
    """Divide a layer's initial weights by ten: its block starts near the identity, and yet has gradients."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
