r"""Images seen through affine maps: one that is learnt, or another one for each image.

A map takes a place u of the new image to the place of the old one that is seen there, between pixels by bilinear
interpolation, and beyond the edge as at the edge. Places are counted from the middle, an edge at -1 and 1; what turns
or shears counts in pixels, so that images that are no squares turn rigidly.

Reference: Jaderberg, Simonyan, Zisserman and Kavukcuoglu 2015 (https://arxiv.org/abs/1506.02025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from ppl_models.models.parts.networks import mlp


def warp(x: Tensor, maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows (..., H W) of pixels, each seen through a map (..., 2, 3) of places (horizontal, vertical, 1)."""
    height, width = shape
    if x.shape[-1] != height * width:
        raise ValueError(f"x: expected images of {height} x {width} as (..., {height * width}), got {tuple(x.shape)}")
    images = x.reshape(-1, 1, *shape)
    rigid = maps.new_tensor([[1.0, height / width, 1.0], [width / height, 1.0, 1.0]])
    maps = (maps * rigid).expand(*x.shape[:-1], 2, 3).reshape(-1, 2, 3)
    grid = affine_grid(maps, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False).reshape(x.shape)


class Warp(nn.Module):
    r"""One affine map of all images, and one of each tone of theirs.

    .. math::

        b(u) = \sigma(g(a(A u + t))), \qquad A \in \mathbb{R}^{2 \times 2}, t \in \mathbb{R}^2

    It can turn, stretch and move images and change their tones, and nothing else: what a dense map between two laws of
    images lacks, which has countless ways to take the one to the other.

    Args:
        shape: Height and width of an image.
        angle: Angle in radians by which A turns at first.
        hidden: Width of the network g of one tone.

    Pixels: (..., H W) in, and out in (0, 1).
    """

    def __init__(self, shape: tuple[int, int], *, angle: float = 0.0, hidden: int = 16) -> None:
        super().__init__()
        self.shape = shape
        cos, sin = math.cos(angle), math.sin(angle)
        self.map = nn.Parameter(torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]))
        self.tone = mlp(1, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tone(warp(x, self.map, self.shape)[..., None])[..., 0].sigmoid()


class Shaken(nn.Module):
    r"""Images seen through maps of their own, drawn anew at every call in training: turned, stretched and moved.

    Before what tells real rows from generated ones, and codes from one another, it makes both blind to such changes.

    Args:
        shape: Height and width of an image.
        turn: Standard deviation of the angle, in radians.
        stretch: Standard deviation of the logarithms of height and width, and of the shear.
        shift: Standard deviation of the shifts, in pixels.
    """

    def __init__(self, shape: tuple[int, int], *, turn: float = 0.12, stretch: float = 0.1, shift: float = 0.5) -> None:
        super().__init__()
        self.shape, self.turn, self.stretch, self.shift = shape, turn, stretch, shift

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = self.shape
        angle, wide, high, shear, right, down = torch.randn(*x.shape[:-1], 6).to(x).unbind(-1)
        cos, sin = (self.turn * angle).cos(), (self.turn * angle).sin()
        wide, high = (self.stretch * wide).exp(), (self.stretch * high).exp()
        rows = (
            (cos * wide, self.stretch * shear - sin * high, 2 * self.shift / width * right),
            (sin * wide, cos * high, 2 * self.shift / height * down),
        )
        return warp(x, torch.stack([torch.stack(row, -1) for row in rows], -2), self.shape)
