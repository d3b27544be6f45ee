"""Arguments of pairs that depend on a data set by more than its names: sizes and networks."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import nn

from ppl_models.data.sets import Dataset
from ppl_models.models.diffusion.denoisers import UNet
from ppl_models.models.gan import Leaky
from ppl_models.models.parts.networks import mlp
from ppl_models.models.parts.warps import RandomWarp, Warp
from ppl_models.zoo.entry import labelled

Size = TypeVar("Size")


def sized(dataset: Dataset, small: Size, large: Size) -> Size:
    """The first for few features, as of 8 x 8 digits; for images of 784 pixels the second, that of publications."""
    return small if len(dataset.features) < 784 else large


def _generator(dataset: Dataset, inputs: int) -> nn.Module:
    """Dense layers from noise to pixels in (0, 1)."""
    return nn.Sequential(mlp(inputs, 256, 256, len(dataset.features), activation=nn.ReLU), nn.Sigmoid())


def gan(dataset: Dataset, noise: int = 16) -> dict[str, Any]:
    sizes: dict[str, Any] = {"features": dataset.features, "noise": noise, "hidden": (256, 256)}
    return {**sizes, "generator": _generator(dataset, noise)}


def conditional_gan(dataset: Dataset) -> dict[str, Any]:
    return {**gan(dataset, 20), **labelled(dataset), "generator": _generator(dataset, 20 + len(dataset.classes))}


def infogan(dataset: Dataset) -> dict[str, Any]:
    pixels, shape = len(dataset.features), dataset.shape or (1, len(dataset.features))
    # Codes that ignore small shifts and turns of an image are nearer to classes.
    trunk = nn.Sequential(RandomWarp(shape), mlp(pixels, 256, 256, activation=Leaky), Leaky())
    return {**gan(dataset, 8), "codes": 10, "generator": _generator(dataset, 8 + 10), "trunk": trunk}


def cyclegan(dataset: Dataset) -> dict[str, Any]:
    pixels, shape = len(dataset.features), dataset.shape or (1, len(dataset.features))
    # Of all maps between two domains of images an affine one is learnt; a dense one has countless solutions.
    maps = {f"{name}_map": Warp(shape, angle=sign * math.pi / 2) for name, sign in (("forward", 1), ("backward", -1))}
    return {"features": (pixels, pixels), "scale": 8.0, "hidden": (128, 128), **maps}


def chain(dataset: Dataset, steps: int = 100) -> dict[str, Any]:
    """A chain over pixels of as many levels as the data have, with a small U-Net."""
    channels = sized(dataset, (32, 64), (16, 32, 32))
    network = UNet(dataset.shape or (1, len(dataset.features)), steps, channels=channels, learned_variance=True)
    pixels: dict[str, Any] = {"variance": "learned", "likelihood": "pixels", "levels": dataset.levels}
    return {"features": dataset.features, "network": network, "steps": steps, **pixels}
