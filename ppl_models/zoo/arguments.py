"""Arguments of pairs that depend on a data set by more than its names: sizes and networks."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import nn

from ppl_models.data.sets import Dataset
from ppl_models.models.diffusion.denoisers import UNet
from ppl_models.models.gan import Leaky
from ppl_models.models.parts.networks import LateFusion, conv_decoder, conv_encoder, mlp
from ppl_models.models.parts.warps import RandomWarp, Warp
from ppl_models.zoo.entry import labelled

LARGE = (28, 28)
"""Shape of the images for which networks are convolutional."""

Size = TypeVar("Size")


def sized(dataset: Dataset, small: Size, large: Size) -> Size:
    """The first for few features, as of 8 x 8 digits; for images of 784 pixels the second, that of publications."""
    return small if len(dataset.features) < 784 else large


def dcgan(inputs: int, beside: int = 0, *, planes: int = 1) -> dict[str, Any]:
    """Convolutional networks of images of 28 x 28: a generator of ``inputs``, and a discriminator of images.

    Args:
        inputs: Width of what the generator reads: noise, and labels or codes.
        beside: Width of what the discriminator reads beside the pixels, such as labels. It comes after them, where
            convolutions cannot read it: a dense layer joins both.
        planes: Image planes.
    """
    pixels, outputs = planes * 784, 128 if beside else 1
    generator = conv_decoder(inputs, LARGE, channels=(64, 32), planes=planes, activation=nn.ReLU, normalise=True)
    discriminator: nn.Module = conv_encoder(LARGE, outputs, channels=(32, 64), planes=planes, activation=Leaky)
    if beside:
        dense = nn.Sequential(Leaky(), nn.Linear(outputs + beside, 128), Leaky(), nn.Linear(128, 1))
        discriminator = LateFusion(discriminator, pixels, dense)
    return {"generator": nn.Sequential(generator, nn.Sigmoid()), "discriminator": discriminator}


def _generator(dataset: Dataset, inputs: int) -> nn.Module:
    """Dense layers from noise to pixels in (0, 1)."""
    return nn.Sequential(mlp(inputs, 256, 256, len(dataset.features), activation=nn.ReLU), nn.Sigmoid())


def _networks(dataset: Dataset, inputs: int, beside: int = 0) -> dict[str, Any]:
    """Networks of a GAN, as of ``dcgan``: convolutional for images of 28 x 28, dense for others."""
    if dataset.shape == LARGE:
        return dcgan(inputs, beside)
    return {"generator": _generator(dataset, inputs), "hidden": (256, 256)}


def gan(dataset: Dataset, noise: int = 16) -> dict[str, Any]:
    return {"features": dataset.features, "noise": noise, **_networks(dataset, noise)}


def bigan(dataset: Dataset, noise: int = 16) -> dict[str, Any]:
    arguments = {"features": dataset.features, "noise": noise, **_networks(dataset, noise, noise)}
    if dataset.shape == LARGE:
        arguments["encoder"] = conv_encoder(LARGE, 2 * noise, activation=Leaky)
    return arguments


def conditional_gan(dataset: Dataset) -> dict[str, Any]:
    noise, labels = 20, len(dataset.classes)
    return {**labelled(dataset), "noise": noise, **_networks(dataset, noise + labels, labels)}


def infogan(dataset: Dataset) -> dict[str, Any]:
    shape, noise, codes = dataset.shape or (1, len(dataset.features)), 8, 10
    generator: nn.Module = _generator(dataset, noise + codes)
    inner: nn.Module = mlp(math.prod(shape), 256, 256, activation=Leaky)
    if shape == LARGE:
        generator, inner = dcgan(noise + codes)["generator"], conv_encoder(LARGE, 256, activation=Leaky)
    # Codes that ignore small shifts and turns of an image are nearer to classes.
    networks = {"generator": generator, "trunk": nn.Sequential(RandomWarp(shape), inner, Leaky())}
    return {"features": dataset.features, "codes": codes, "noise": noise, "hidden": (256, 256), **networks}


def vaegan(dataset: Dataset) -> dict[str, Any]:
    factors = sized(dataset, 10, 50)
    arguments = {"features": dataset.features, "factors": factors}
    if dataset.shape != LARGE:
        return arguments
    encoder = conv_encoder(LARGE, 2 * factors)
    networks = {"encoder": encoder, "decoder": conv_decoder(factors, LARGE)}
    return {**arguments, **networks, "discriminator": dcgan(factors)["discriminator"]}


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
