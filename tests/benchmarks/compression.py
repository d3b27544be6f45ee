"""``python -m tests.benchmarks compression``: held-out binarized MNIST in bytes, beside gzip, zstd, xz and PNG.

Blocks of images are drawn from the test split without overlap, and each is compressed by itself and restored. Pairs are
fitted to the training split for about a minute each, so that their figures are far from the best of their kind. Gzip,
zstd and xz compress the images as one bit per pixel or as one byte per pixel, whichever is shorter, and PNG all images
of a block as one tall picture of two colours. Bits per pixel with headers and all, and those of the model itself: means
over blocks with their standard errors.
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from inference import Result, compress, decompress, fit
from ppl_models import FVSBN, MADE, VAE, BernoulliMixture, load
from ppl_models.zoo import methods

from .outliers import summary


def results(x: Tensor) -> Iterator[tuple[str, Result]]:
    """A Result of each pair."""
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"progress": False, "draws": 2}
    minibatches: dict[str, Any] = {"batch": 100, "learning_rate": 0.002, **quiet}
    mixture = BernoulliMixture(784, components=100)
    yield "Bernoulli mixture, 100", methods.em(mixture, {"x": x[:20_000]}, steps=20, **quiet)
    yield "FVSBN", fit(FVSBN(784), {"x": x}, steps=4000, **minibatches)
    yield "MADE, 500", fit(MADE(784, hidden=(500,)), {"x": x}, steps=4000, **minibatches)
    yield "VAE, 200-200-20", fit(VAE(784, 20), {"x": x}, steps=6000, **minibatches)


def png(x: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(255 * x.reshape(-1, 28).astype(np.uint8)).convert("1").save(written, "PNG", optimize=True)
    return written.getvalue()


def shorter(squeeze: Callable[[bytes], bytes]) -> Callable[[np.ndarray], bytes]:
    """The shorter code of pixels as bits and as bytes."""
    return lambda x: min((squeeze(v.tobytes()) for v in (np.packbits(x, axis=1), x)), key=len)


def zstd(raw: bytes) -> bytes:
    return subprocess.run(["zstd", "--ultra", "-22", "-c"], input=raw, capture_output=True, check=True).stdout


PEERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "one bit per pixel": lambda x: np.packbits(x, axis=1).tobytes(),
    "gzip -9": shorter(lambda raw: gzip.compress(raw, 9, mtime=0)),
    "xz -9e": shorter(lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    "PNG": png,
}
if shutil.which("zstd"):
    PEERS["zstd -22"] = shorter(zstd)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks compression", description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--images", type=int, default=200, help="images per block")
    options = parser.parse_args(sys.argv[2:])
    data = load("binarized_mnist")
    order = torch.randperm(len(data.test["x"]), generator=torch.Generator().manual_seed(0))
    blocks = data.test["x"][order[: options.blocks * options.images]].split(options.images)
    records = []
    for name, squeeze in PEERS.items():
        for block in blocks:
            bits = 8 * len(squeeze(block.numpy().astype(np.uint8))) / block.numel()
            records.append(
                {"case": "binarized MNIST", "method": name, "bits per pixel": bits, "of the model": torch.nan}
            )
    for name, result in results(data.train["x"]):
        for block in blocks:
            code = compress(result, block)
            assert torch.equal(decompress(result, code), block)
            figures = {"bits per pixel": code.bits_per_dimension, "of the model": code.ideal}
            records.append({"case": "binarized MNIST", "method": f"{name}, {code.method}", **figures})
            print(name, code, file=sys.stderr)
    print(summary(pd.DataFrame(records)))


if __name__ == "__main__":
    main()
