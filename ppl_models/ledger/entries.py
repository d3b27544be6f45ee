r"""The ledger: published figures against those that a recipe here obtains.

A :class:`Recipe` is a pair, its data, a method and a schedule, with the published figure, its source, its protocol and
how sure the figure is. :func:`reproduce` runs it once a seed and appends a record, one line of JSON, to
``NAME.jsonl`` in a directory: the figure with its standard error over seeds, seconds, versions, machine, date, commit.
:func:`table` is the table of all records. A figure without its protocol is no figure: static and dynamic binarization
of MNIST are different benchmarks, and a bound is no likelihood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from inference.objectives import RWS, WakeSleep
from ppl_models.ledger.recipes import adversarial, bars, diffusion, likelihood, semi_supervised
from ppl_models.ledger.record import RECORDS, Recipe, Run, shown_figure
from ppl_models.models.autoregressive import FVSBN, MADE, NADE, Autoregressive


def records(directory: Path = RECORDS) -> list[dict[str, Any]]:
    """All records of a directory, in the order of the recipes and of time."""
    files = [directory / f"{name}.jsonl" for name in RECIPES]
    return [json.loads(line) for f in files if f.exists() for line in f.read_text().splitlines()]


def table(directory: Path = RECORDS) -> str:
    """The last full record of every recipe as a Markdown table; a recipe without one has a dash."""
    latest = {r["recipe"]: r for r in records(directory) if not r["quick"]}
    lines = [
        "| recipe | figure | published | obtained | seeds | protocol | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES.values():
        record = latest.get(recipe.name)
        got, seeds = (shown_figure(record), record["seeds"]) if record else ("-", "-")
        cells = f"`{recipe.name}`", recipe.title, recipe.known, got, str(seeds), recipe.protocol, recipe.origin
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _exact(name: str, make: Callable[..., Autoregressive], published: float, protocol: str, **own: Any) -> Recipe:
    schedule = {"epochs": 50, "learning_rate": 0.003, **own}
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(likelihood.autoregressive, make=make, **schedule),
        published=published,
        source="Germain et al. 2015, table of MADE" if name != "fvsbn" else "README of EugenHotaj/pytorch-generative",
        protocol=f"static binarized MNIST, exact; {protocol}",
        sure="recalled" if name != "fvsbn" else "quoted",
    )


def _layered(name: str, layers: Sequence[int], objective: Callable[[], Any], published: float) -> Recipe:
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(likelihood.belief_net, layers=layers, objective=objective, epochs=100),
        published=published,
        source="Bornschein and Bengio 2015, Q of sigmoid belief nets",
        protocol="static binarized MNIST, 5,000 samples (there up to 100,000); 100 epochs, batch 100",
        sure="recalled",
    )


def _one_layer(name: str, particles: int, published: float) -> Recipe:
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(likelihood.vae, particles=particles),
        published=published,
        source="Burda et al. 2016, one layer, as nbip/IWAE quotes it",
        protocol="static binarized MNIST, 5,000 samples; here 100 epochs, batch 100, there 3,280, batch 20",
        sure="quoted",
    )


def _modes(name: str, count: int, published: float, steps: int) -> Recipe:
    spread = {"ring": "0.01", "grid": "0.05"}[name]
    return Recipe(
        name=f"gan_{name}",
        title=f"modes found of {count}",
        run=partial(adversarial.dropped_modes, name=name, steps=steps, r1=0.1),
        published=published,
        source="Lin et al. 2018, PacGAN's best table row",
        protocol=f"{name}, sd {spread}, 100,000 samples, within 3 sd; here R1 = 0.1, {steps:,} steps of 256, cosine",
        sure="checked",
        better="higher",
        seeds=10,
    )


def _diffused(name: str, count: int, published: float) -> Recipe:
    spread = {"ring": "0.01", "grid": "0.05"}[name]
    return Recipe(
        name=f"diffusion_{name}",
        title=f"modes found of {count}",
        run=partial(diffusion.diffused_modes, name=name),
        published=published,
        source="Lin et al. 2018, PacGAN's best table row: a GAN",
        protocol=f"{name}, sd {spread}, 100,000 samples, within 3 sd; here a chain of 100 steps, 10,000 of 256 rows",
        sure="checked",
        better="higher",
        seeds=5,
    )


def _unpublished(name: str, title: str, run: Run, protocol: str, **own: Any) -> Recipe:
    return Recipe(name, title, run, None, "no canonical figure", protocol, "recalled", **own)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="bernoulli_mixture_500",
            title="test NLL, nats",
            run=partial(likelihood.bernoulli_mixture, components=500),
            published=137.64,
            source="Larochelle and Murray 2011; table of MADE, Germain et al. 2015",
            protocol="static binarized MNIST, 50,000 to fit, exact",
            sure="recalled",
        ),
        _one_layer("vae_k1", particles=1, published=88.71),
        _one_layer("iwae_k5", particles=5, published=87.63),
        _exact("fvsbn", FVSBN, 96.58, "there dynamic binarization, another benchmark", learning_rate=0.001),
        _exact("nade", partial(NADE, hidden=500), 88.33, "500 hidden units, fixed order", epochs=20),
        _exact("made", MADE, 88.40, "there one hidden layer of thousands of units, here of 500"),
        _layered("sbn_200", (200,), partial(RWS, 10), 103.1),
        _layered("sbn_200_200", (200, 200), partial(RWS, 10), 93.4),
        _layered("wake_sleep_200_200", (200, 200), WakeSleep, 106.9),
        Recipe(
            name="bars",
            title="KL, bits",
            run=bars.bars,
            published=0.10,
            source="Hinton et al. 1995",
            protocol="4 x 4 bars, law as recalled, 16-8-1 units, exact KL; best of 5 starts by the bound of RWS-10",
            sure="recalled",
            seeds=10,
        ),
        Recipe(
            name="m2_100",
            title="test accuracy, %",
            run=partial(semi_supervised.semi_supervised, labels=100),
            published=88.03,
            source="Kingma et al. 2014, as a README of a re-implementation quotes it",
            protocol="MNIST, 100 labels, ten a class; pixels made binary at one half",
            sure="quoted",
            better="higher",
            seeds=5,
        ),
        _modes("ring", 8, 7.9, 12_000),
        _modes("grid", 25, 24.8, 20_000),
        _diffused("ring", 8, 7.9),
        _diffused("grid", 25, 24.8),
        _unpublished(
            "diffusion_mnist",
            "bits a pixel, bound",
            diffusion.diffusion,
            "MNIST of 256 levels, 2,000 test images; here 1,000 steps, a small U-Net, 40,000 steps of 128",
        ),
        Recipe(
            name="cgan_mnist",
            title="digits as asked, %",
            run=adversarial.conditional_gan,
            published=98.5,
            source="Hu et al. 2018, table of CGAN",
            protocol="MNIST, 10,000 samples, a classifier of their own; here a network of 256 units fitted on MNIST",
            sure="recalled",
            better="higher",
        ),
        _unpublished(
            "infogan_digits",
            "digits as coded, %",
            adversarial.coded,
            "8 x 8 digits, codes matched to digits, a classifier fitted here; images shaken before trunk and "
            "discriminator, of four starts the one whose code tells most of the data",
            better="higher",
            seeds=3,
        ),
        _unpublished(
            "cyclegan_mnist",
            "error of the map, % of variance",
            adversarial.unpaired,
            "MNIST to other digits of it, turned by a quarter and inverted, 20,000 each, 1,000 test images; "
            "here a learnt affine map and tone, four starts, the best by energy distance",
            seeds=3,
        ),
        Recipe(
            name="dcgan_stacked_mnist",
            title="modes found of 1,000",
            run=adversarial.stacked_mnist,
            published=1000,
            source="Lin et al. 2018, table of PacDCGAN",
            protocol="three digits in three planes, 26,000 samples; here R1 and a classifier of our own",
            sure="checked",
            better="higher",
        ),
    )
}
