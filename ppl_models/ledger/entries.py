r"""The ledger: published figures and the figures that recipes here obtain.

A :class:`Recipe` is a pair, its data, a method and a schedule, with the published figure, its source, its protocol and
how it was checked. :func:`reproduce` runs it once per seed and appends a record, one line of JSON, to
``NAME.jsonl`` in a directory: the figure with its standard error over seeds, seconds, versions, machine, date, commit.
:func:`table` is the table of all records. Figures are comparable under one protocol only: static and dynamic
binarization of MNIST are different benchmarks, and a bound is not a likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from inference.kernels import NUTS
from inference.objectives import RWS, WakeSleep
from ppl_models.ledger.recipes import adversarial, bars, diffusion, likelihood, posteriors, semi_supervised, simulators
from ppl_models.ledger.record import RECORDS, Recipe, read_lines, shown_figure
from ppl_models.models.autoregressive import FVSBN, MADE, NADE


def records(directory: Path = RECORDS) -> list[dict[str, Any]]:
    """All records of a directory, in the order of the recipes and of time.

    A line that is no record, such as one that was cut short, is left out with a warning.
    """
    files = [directory / f"{name}.jsonl" for name in RECIPES]
    return [record for f in files if f.exists() for record in read_lines(f)]


def latest(directory: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """The last full record of each recipe that has one, by its name."""
    return {r["recipe"]: r for r in records(directory) if not r["quick"]}


def table(directory: Path = RECORDS) -> str:
    """The last full record of each recipe as a Markdown table, with the protocol of its run; a dash: none."""
    found = latest(directory)
    lines = [
        "| recipe | figure | published | obtained | seeds | protocol | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES.values():
        record = found.get(recipe.name)
        got, seeds = (shown_figure(record), record["seeds"]) if record else ("-", "-")
        protocol = (record or {}).get("protocol", recipe.protocol)
        cells = f"`{recipe.name}`", recipe.title, recipe.known, got, str(seeds), protocol, recipe.origin
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mnist(source: str, protocol: str, sure: str = "recalled") -> Callable[..., Recipe]:
    """Recipes of the test NLL of static binarized MNIST from one source, given name, run and published figure."""
    full = f"static binarized MNIST, {protocol}"
    return partial(Recipe, title="test NLL, nats", source=source, protocol=full, sure=sure)


_BY_RATES = partial(likelihood.autoregressive, stages=((10, 0.001),) * 6 + ((10, 0.0001),) * 2)


_BELIEF_NET = _mnist(
    "Bornschein and Bengio 2015, Q of sigmoid belief nets",
    "5,000 samples (there up to 100,000); 100 epochs, batch 100",
)


_BY_100_EPOCHS = partial(likelihood.belief_net, epochs=100)


_ONE_LAYER = _mnist(
    "Burda et al. 2016, one layer, as nbip/IWAE quotes it",
    "5,000 samples; here 364 epochs, batch 100, there 3,280, batch 20",
    "quoted",
)


_DYNAMIC = partial(
    Recipe,
    title="test NLL, nats",
    source="Burda et al. 2016, as nbip/IWAE quotes it",
    protocol="dynamic binarization of MNIST, 5,000 samples; here 59,000 images, 364 epochs, batch 100, up to nine "
    "binarizations a stage, there 60,000, 3,280, batch 20",
    sure="quoted",
)


_SIX_STAGES = partial(likelihood.vae, stages=likelihood.BURDA[:6])


_PACGAN = "Lin et al. 2018, PacGAN's best table row"


_MODES = partial(Recipe, sure="checked", better="higher")
"""Modes found, of a simulated set or of digits."""


_UNPUBLISHED = partial(Recipe, published=None, source="no canonical figure", sure="recalled")


_RIGHT = "R-hat below 1.01, means within 4 standard errors, sds within 10 %"


_POSTERIORDB = partial(
    Recipe,
    title="posteriors right of 9",
    published=9,
    source="Magnusson et al. 2024, reference draws of posteriordb",
    sure="checked",
    better="higher",
)


_NPE = {
    "two_moons": (0.725, 0.606, 0.542),
    "gaussian_linear": (0.694, 0.552, 0.506),
    "gaussian_linear_uniform": (0.696, 0.553, 0.509),
    "slcp": (0.975, 0.901, 0.831),
    "bernoulli_glm": (0.863, 0.678, 0.559),
    "sir": (0.815, 0.680, 0.585),
}
"""C2ST of neural posterior estimation at 1,000, 10,000 and 100,000 simulations, as published."""


def _npe(name: str) -> Recipe:
    """A recipe of neural posterior estimation on a simulator."""
    few, more, most = _NPE[name]
    return Recipe(
        name=f"npe_{name}",
        title="C2ST at 100,000 simulations",
        run=partial(simulators.estimated, name=name),
        published=most,
        source="Lueckmann et al. 2021, results file of the benchmark",
        protocol=f"mean of ten observations, reference draws and classifier of sbibm; there {few} and {more} at 1,000 "
        "and 10,000",
        sure="checked",
        limits="one schedule for all tasks; the classifier takes up to 2.6 minutes on a core for each of the 30 "
        "comparisons",
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _mnist("Larochelle and Murray 2011; table of MADE, Germain et al. 2015", "50,000 to fit, exact")(
            name="bernoulli_mixture_500",
            entry="bernoulli_mixture",
            run=partial(likelihood.bernoulli_mixture, components=500),
            published=137.64,
        ),
        *(
            _ONE_LAYER(name=name, entry="vae", run=partial(_SIX_STAGES, particles=k), published=figure, limits=limit)
            for name, k, figure, limit in (
                ("vae_k1", 1, 88.71, "3,280 epochs take four hours on two cores"),
                ("iwae_k5", 5, 87.63, "3,280 epochs take twelve hours on one core"),
                ("iwae_k50", 50, 87.10, "ten times the products of iwae_k5 in each epoch"),
            )
        ),
        *(
            _DYNAMIC(
                name=name,
                entry=entry,
                run=partial(_SIX_STAGES, particles=k, layers=layers, again=True),
                published=figure,
                limits=limit,
            )
            for name, entry, k, layers, figure, limit in (
                ("vae_k1_dynamic", "vae", 1, 1, 86.76, "364 of 3,280 epochs; an epoch takes 3 seconds on a core"),
                (
                    "iwae_k5_dynamic",
                    "vae",
                    5,
                    1,
                    85.54,
                    "364 of 3,280 epochs; an epoch takes 7 seconds on a core",
                ),
                ("iwae_k50_dynamic", "vae", 50, 1, 84.78, "364 epochs take six hours on a core, at a minute each"),
                (
                    "vae2_k1_dynamic",
                    "hierarchical_vae",
                    1,
                    2,
                    85.33,
                    "364 of 3,280 epochs; an epoch takes 4 seconds on a core",
                ),
            )
        ),
        _mnist("Larochelle and Murray 2011", "exact")(
            name="fvsbn",
            entry="fvsbn",
            run=partial(
                likelihood.autoregressive,
                make=FVSBN,
                stages=((10, 0.003),) * 3 + ((10, 0.001),) * 2 + ((5, 0.0003),) * 2,
            ),
            published=97.45,
            limits="it overfits: 96.0 nats in training",
        ),
        _mnist("plotting script of the author of deep NADE", "exact; 500 hidden units, fixed order", "checked")(
            name="nade",
            entry="nade",
            run=partial(_BY_RATES, make=partial(NADE, hidden=500)),
            published=88.33,
            limits="an epoch takes 130 seconds on two cores: three hours for the 80 of its stages",
        ),
        _mnist(
            "Germain et al. 2015, as karpathy/pytorch-made quotes it",
            "exact; 500 hidden units, direct connections, one mask, fixed order; here a normal prior, sd 0.45",
            "quoted",
        )(
            name="made",
            entry="made",
            run=partial(_BY_RATES, make=MADE, weight_decay=5.0),
            published=94.5,
        ),
        _mnist(
            "plotting script of the author of deep NADE",
            "exact; 500 hidden units, 128 orders; here 100 epochs, batch 100",
            "checked",
        )(
            name="eonade",
            entry="eonade",
            run=partial(likelihood.any_order, stages=((20, 0.001),) * 3 + ((20, 0.0005), (10, 0.0002), (10, 0.0001))),
            published=87.71,
            limits="100 epochs of 9 seconds on a core; its authors ran about a thousand",
        ),
        _BELIEF_NET(
            name="sbn_200",
            entry="helmholtz_machine",
            run=partial(_BY_100_EPOCHS, layers=(200,), objective=partial(RWS, 10)),
            published=103.1,
            limits="100 epochs of 6 seconds on a core; its authors stopped by validation images",
        ),
        _BELIEF_NET(
            name="sbn_200_200",
            entry="helmholtz_machine",
            run=partial(_BY_100_EPOCHS, layers=(200, 200), objective=partial(RWS, 10)),
            published=93.4,
            limits="100 epochs of 10 seconds on a core; its authors stopped by validation images",
        ),
        _BELIEF_NET(
            name="sbn_200_200_200",
            entry="helmholtz_machine",
            run=partial(_BY_100_EPOCHS, layers=(200, 200, 200), objective=partial(RWS, 10)),
            published=90.1,
            limits="100 epochs of 13 seconds on a core; its authors stopped by validation images",
        ),
        *(
            Recipe(
                name=name,
                entry="helmholtz_machine",
                title="negative validation ELBO, nats",
                run=partial(likelihood.belief_net_bound, layers=layers, epochs=100),
                published=figure,
                source="Grathwohl et al. 2018, RELAX",
                protocol="static binarized MNIST, one draw of the guide per image; the best of NVIL, VIMCO and RWS by "
                f"training images, 100 epochs, batch 100; there {epochs} epochs to the best",
                sure="checked",
                limits="three fits of 100 epochs take half an hour on a core; the published ones took 531 to 900",
            )
            for name, layers, figure, epochs in (
                ("sbn_bound_200", (200,), 113.62, 531),
                ("sbn_bound_200_200", (200, 200), 100.85, 620),
            )
        ),
        _BELIEF_NET(
            name="wake_sleep_200_200",
            entry="helmholtz_machine",
            run=partial(_BY_100_EPOCHS, layers=(200, 200), objective=WakeSleep),
            published=106.9,
        ),
        Recipe(
            name="bars",
            entry="helmholtz_machine",
            title="KL, bits",
            run=bars.bars,
            published=0.10,
            source="Hinton et al. 1995",
            protocol="4 x 4 bars, distribution as recalled, 16-8-1 units, exact KL; "
            "best of 5 starts by the bound of RWS-10",
            sure="recalled",
            seeds=10,
            limits="the best of five starts fitted by the exact likelihood reach 0.51 bits on average",
        ),
        Recipe(
            name="m2_100",
            entry="semi_supervised_vae",
            title="test accuracy, %",
            run=partial(semi_supervised.semi_supervised, labels=100),
            published=88.03,
            source="Kingma et al. 2014, as a README of a re-implementation quotes it",
            protocol="MNIST, 100 labels, ten per class; pixels made binary at one half",
            sure="quoted",
            better="higher",
            seeds=5,
            limits="an epoch takes 28 seconds on a core: five seeds of 60 epochs two hours and a half",
        ),
        _MODES(
            name="gan_ring",
            entry="gan",
            title="modes found of 8",
            run=partial(adversarial.dropped_modes, name="ring", steps=12_000, r1=0.1),
            published=7.9,
            source=_PACGAN,
            protocol="ring, sd 0.01, 100,000 samples, within 3 sd; here R1 = 0.1, 12,000 steps of 256, cosine",
            seeds=10,
        ),
        _MODES(
            name="gan_grid",
            entry="gan",
            title="modes found of 25",
            run=partial(adversarial.dropped_modes, name="grid", steps=20_000, r1=0.1),
            published=24.8,
            source=_PACGAN,
            protocol="grid, sd 0.05, 100,000 samples, within 3 sd; here R1 = 0.1, 20,000 steps of 256, cosine",
            seeds=10,
        ),
        _MODES(
            name="diffusion_ring",
            entry="diffusion",
            title="modes found of 8",
            run=partial(diffusion.diffused_modes, name="ring"),
            published=7.9,
            source=f"{_PACGAN}: a GAN",
            protocol="ring, sd 0.01, 100,000 samples, within 3 sd; here a chain of 100 steps, 10,000 of 256 rows",
            seeds=5,
        ),
        _MODES(
            name="diffusion_grid",
            entry="diffusion",
            title="modes found of 25",
            run=partial(diffusion.diffused_modes, name="grid"),
            published=24.8,
            source=f"{_PACGAN}: a GAN",
            protocol="grid, sd 0.05, 100,000 samples, within 3 sd; here a chain of 100 steps, 10,000 of 256 rows",
            seeds=5,
        ),
        _UNPUBLISHED(
            name="diffusion_mnist",
            entry="diffusion",
            title="bits per pixel, bound",
            run=diffusion.diffusion,
            source="no canonical figure; of dequantised MNIST NICE has 4.34 (read), Real NVP 1.06 and Glow 1.05 "
            "(recalled)",
            protocol="MNIST of 256 levels, 2,000 test images; here 1,000 steps, a small U-Net, 40,000 steps of 128",
            limits="40,000 steps of the U-Net take more than ten hours on two cores",
        ),
        Recipe(
            name="cgan_mnist",
            entry="conditional_gan",
            title="digits as asked, %",
            run=adversarial.conditional_gan,
            published=98.5,
            source="Hu et al. 2018, table of CGAN",
            protocol="MNIST, 10,000 samples, a classifier of their own; here a network of 256 units fitted on MNIST",
            sure="recalled",
            better="higher",
            limits="the classifier names 98.1 % of the test digits rightly; another schedule was not tried, at an hour "
            "and a half",
        ),
        _UNPUBLISHED(
            name="infogan_digits",
            entry="infogan",
            title="digits as coded, %",
            run=adversarial.coded,
            protocol="8 x 8 digits, codes matched to digits, a classifier fitted here; images shaken before trunk and "
            "discriminator, of four starts the one whose code has the most information on the data",
            better="higher",
            seeds=3,
        ),
        _UNPUBLISHED(
            name="cyclegan_mnist",
            entry="cyclegan",
            title="error of the map, % of variance",
            run=adversarial.unpaired,
            protocol="MNIST to other digits of it, turned by a quarter and inverted, 20,000 each, 1,000 test images; "
            "here a learnt affine map and tone, four starts, the best by energy distance",
            seeds=3,
        ),
        _MODES(
            name="dcgan_stacked_mnist",
            entry="gan",
            title="modes found of 1,000",
            run=adversarial.stacked_mnist,
            published=1000,
            source="Lin et al. 2018, table of PacDCGAN",
            protocol="three digits in three planes, 26,000 samples; here R1 and a classifier of our own",
            limits="50,000 steps of convolutional networks take several hours on two cores",
        ),
        _POSTERIORDB(name="posteriordb_chees", run=posteriors.posteriors, protocol=f"default ChEES; {_RIGHT}"),
        _POSTERIORDB(
            name="posteriordb_nuts",
            run=partial(posteriors.posteriors, kernel=NUTS),
            protocol=f"NUTS, 4 chains; {_RIGHT}",
        ),
        _POSTERIORDB(
            name="posteriordb_svi",
            run=posteriors.guided,
            protocol="a normal guide of full rank, 30,000 steps; means within 4 standard errors of 10,000 draws, sds "
            "within 10 %",
            limits="a normal guide: several of the posteriors are skewed, and some are far from where it begins",
        ),
        *map(_npe, _NPE),
    )
}
