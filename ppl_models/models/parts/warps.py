r"""Affine warps of images: one that is learnt, or a random one per image.

A map takes a position u in the output to the position in the input that is shown there, with bilinear interpolation
between pixels and the border value outside. Positions are relative to the centre, with edges at -1 and 1; rotation and
shear are in pixels, so that images that are not square rotate rigidly.

Reference: Jaderberg, Simonyan, Zisserman and Kavukcuoglu 2015 (https://arxiv.org/abs/1506.02025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from ppl_models.models.parts.networks import mlp


def warp(x: Tensor, maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Warp images (..., H W) by affine maps (..., 2, 3) of positions (horizontal, vertical, 1)."""
    height, width = shape
    if x.shape[-1] != height * width:
        raise ValueError(f"x: expected images of {height} x {width} as (..., {height * width}), got {tuple(x.shape)}")
    images = x.reshape(-1, 1, *shape)
    rigid = maps.new_tensor([[1.0, height / width, 1.0], [width / height, 1.0, 1.0]])
    maps = (maps * rigid).expand(*x.shape[:-1], 2, 3).reshape(-1, 2, 3)
    grid = affine_grid(maps, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False).reshape(x.shape)


class Warp(nn.Module):
    r"""A learnt affine warp of all images, followed by a learnt map of pixel values.

    .. math::

        b(u) = \sigma(g(a(A u + t))), \qquad A \in \mathbb{R}^{2 \times 2}, t \in \mathbb{R}^2

    It can only rotate, stretch, shear and shift images and change their grey values, whereas a dense network can map
    one distribution of images to another in countless ways.

    Args:
        shape: Height and width of an image.
        angle: Initial angle of A, in radians.
        hidden: Width of the hidden layer of the network g, from a grey value to a logit.

    From pixels (..., H W) to pixels (..., H W) in (0, 1).
    """

    def __init__(self, shape: tuple[int, int], *, angle: float = 0.0, hidden: int = 16) -> None:
        super().__init__()
        self.shape = shape
        cos, sin = math.cos(angle), math.sin(angle)
        self.map = nn.Parameter(torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]))
        self.tone = mlp(1, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tone(warp(x, self.map, self.shape)[..., None])[..., 0].sigmoid()


class RandomWarp(nn.Module):
    r"""Augmentation by a random affine warp per image, drawn at every call in training mode.

    In front of a network it makes it insensitive to such changes.

    Args:
        shape: Height and width of an image.
        angle: Standard deviation of the angle, in radians.
        stretch: Standard deviation of the logarithms of both scale factors, and of the shear.
        shift: Standard deviation of the shifts, in pixels.
    """

    def __init__(
        self, shape: tuple[int, int], *, angle: float = 0.12, stretch: float = 0.1, shift: float = 0.5
    ) -> None:
        super().__init__()
        self.shape, self.angle, self.stretch, self.shift = shape, angle, stretch, shift

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = self.shape
        angle, wide, high, shear, right, down = torch.randn(*x.shape[:-1], 6).to(x).unbind(-1)
        cos, sin = (self.angle * angle).cos(), (self.angle * angle).sin()
        wide, high = (self.stretch * wide).exp(), (self.stretch * high).exp()
        rows = (
            (cos * wide, self.stretch * shear - sin * high, 2 * self.shift / width * right),
            (sin * wide, cos * high, 2 * self.shift / height * down),
        )
        return warp(x, torch.stack([torch.stack(row, -1) for row in rows], -2), self.shape)
