"""Pages about Results and comparisons: whole, self-contained, readable in a browser on a desk, a phone and on paper."""

import re
import shutil
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import TensorDataset

from inference import Comparison, Result, compare, fit, sample
from inference.comparison.posteriors import quantity as quantity_of
from inference.core import source
from inference.core.bound import bind
from inference.kernels import NUTS, ChEES
from inference.report import plots, story
from inference.report.blocks import Table, section
from inference.report.checks import checks, compared
from inference.report.graph import graph, relations
from inference.report.loo import loo
from ppl_models import GAN, ZOO

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Schools:
    r"""Eight schools & <their> effects (Rubin 1981).

    .. math:: \mu \sim \mathrm{N}(0, 5^2), \qquad \theta_j = \mu + \tau \eta_j, \qquad y_j \sim \mathrm{N}(\theta_j, 1)

    The effects :math:`\theta_j` and :math:`\nosuchcommand{x}` are those of ``coaching``.

    Args:
        error: Standard errors.
    """

    def __init__(self) -> None:
        self.coords = {"schools": list("ABCDEFGH")}
        self.guide = AutoNormal(self.model)

    def model(self, error: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(error)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, error), obs=y)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """A line through points."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


DATA = {"error": ERROR, "y": EFFECT}
LINE = {"x": torch.linspace(-1, 1, 30), "y": torch.linspace(-1, 1, 30) + 0.3 * torch.sin(torch.arange(30.0))}


@pytest.fixture(scope="module")
def schools() -> Result:
    return sample(Schools(), DATA, ChEES, chains=16, draws=50, warmup=60, compile=False, progress=False)


@pytest.fixture(scope="module")
def lines() -> Comparison:
    """The posterior is N(m, v) with 1 / v = 1 / 4 + sum(x^2)."""
    precision = 0.25 + float(LINE["x"].square().sum())
    mean = float((LINE["x"] * LINE["y"]).sum()) / precision
    methods = {
        "SVI": partial(fit, steps=200, draws=100, compile=False, progress=False),
        "NUTS": partial(sample, kernel=NUTS, chains=2, draws=40, warmup=50, compile=False, progress=False),
    }
    truth = {"slope": (torch.tensor(mean), torch.tensor(precision**-0.5))}
    return compare(lambda: (regression, AutoNormal(regression)), LINE, methods, truth=truth)


@pytest.fixture(scope="module")
def pages(schools: Result, lines: Comparison, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    about = {"data": "Rubin 1981", "command": "python <schools>.py"}
    return {
        "result": schools.report(folder / "schools.html", about=about),
        "comparison": lines.report(folder / "lines.html"),
    }


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("kind", ["result", "comparison"])
def test_a_page_is_whole_and_asks_for_nothing(pages: dict[str, Path], kind: str) -> None:
    text = pages[kind].read_text(encoding="utf-8")
    page = Elements(text)
    assert "Left out" not in text and "cannot be drawn" not in text
    assert not page.of("link")[1:] and page.of("link")[0]["href"] == "data:,"
    assert not [
        a for _, a in page.found for n in ("src", "data", "poster") if n in a and not str(a[n]).startswith("data:")
    ]
    assert "@import" not in text and not re.findall(r"url\((?!#)", text)
    anchors, ids = [a["href"] for a in page.of("a")], [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert {h.removeprefix("#") for h in anchors if h and h.startswith("#")} <= set(ids)
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert set(used) <= set(ids), "markers and clips of figures are there"
    drawn = [a for a in page.of("svg") if "viewbox" in a]
    assert drawn and all(a.get("aria-label") and a.get("role") == "img" for a in drawn)
    assert all(a.get("alt") for a in page.of("img"))


def test_the_page_of_a_result_has_what_was_asked_and_what_came_out(pages: dict[str, Path], schools: Result) -> None:
    text = Elements(pages["result"].read_text(encoding="utf-8")).text
    assert "Eight schools & <their> effects (Rubin 1981)." in text
    assert r"\nosuchcommand{x}" in text, "a formula that cannot be drawn stays as it is"
    assert "Standard errors" not in text, "arguments are no part of the story"
    for title in ("The model", "The data", "Diagnosis", "Posterior", "Chains", "Predictive checks", "How to repeat it"):
        assert title in text
    assert "python <schools>.py" in text and "schools (8)" in text and "theta[C]" in text
    assert "eta has a value for each observation" in text, "why there is no leave-one-out"
    shown = float(re.search(r"E-BFMI ([\d.]+) 0.3 or more", text)[1])
    assert shown == pytest.approx(float(plots.bfmi(schools.idata.sample_stats["energy"].values).min()), rel=1e-3)


def test_the_page_of_a_comparison_has_the_table_and_the_truth(pages: dict[str, Path], lines: Comparison) -> None:
    page = Elements(pages["comparison"].read_text(encoding="utf-8"))
    assert "error_max" in page.text and "largest error of a posterior mean" in page.text
    labels = [str(a.get("aria-label")) for a in page.of("svg")]
    mean, sd = (float(v) for v in lines.truth["slope"])
    (density,) = (a for a in labels if a.startswith("Density of slope"))
    told = re.search(r"truth: ([\d.]+) ± ([\d.]+)", density)
    assert (float(told[1]), float(told[2])) == pytest.approx((mean, sd), rel=1e-3)
    assert any(a.startswith("Loss over 200 steps") for a in labels)
    assert "Leave-one-out by Pareto-smoothed importance sampling" in page.text


def test_a_report_is_written_whole_or_not_at_all(schools: Result, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        schools.report(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_section_that_fails_says_why_and_leaves_the_rest() -> None:
    def fails() -> list:
        raise KeyError("no such column")

    (said,) = section("a", "A", fails).blocks
    assert "Left out: &#x27;no such column&#x27;." in said.html


def test_notebooks_show_a_table_and_the_diagnosis(schools: Result, lines: Comparison) -> None:
    shown = schools._repr_html_()
    assert "<table" in shown and "ChEES on Schools" in shown and "mu" in shown
    assert "SVI" in lines._repr_html_() and "error_max" in lines._repr_html_()


def test_a_result_keeps_the_seed_of_its_run() -> None:
    model = (regression, AutoNormal(regression))
    made = [fit(model, LINE, steps=0, draws=4, seed=s, progress=False) for s in (0, 5)]
    assert made[1].idata.attrs["seed"] - made[0].idata.attrs["seed"] == 5


def test_the_graph_has_the_parents_and_plates_of_a_model() -> None:
    nodes = relations(bind(Schools(), DATA))
    assert {n: (set(v.parents), v.plates) for n, v in nodes.items()} == {
        "mu": (set(), ()),
        "tau": (set(), ()),
        "eta": (set(), ("schools",)),
        "theta": ({"mu", "tau", "eta"}, ("schools",)),
        "y": ({"theta"}, ("schools",)),
    }
    drawn = graph(bind(Schools(), DATA))
    assert drawn is not None and drawn.image.count("<ellipse") == 5 and drawn.image.count('class="edge"') == 4
    assert "theta (deterministic, in schools, from mu, tau, eta)" in drawn.alt


def test_the_graph_follows_distributions_of_a_pairs_own() -> None:
    entry = ZOO["naive_bayes"]
    dataset = entry.load("iris")
    nodes = relations(bind(entry.pair(dataset), dataset.train))
    assert set(nodes["x"].parents) == {"variances", "means", "y"}


def test_chains_that_disagree_leave_the_band_of_the_ranks() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(size=(8, 500))
    assert plots.ranks("a", draws).note == "0 of 8 chains leave the band"
    draws[3] += 2
    assert int(plots.ranks("a", draws).note.split()[0]) >= 1


def test_replicated_counts_are_shown_by_their_states() -> None:
    random = np.random.default_rng(0)
    seen, drawn = random.integers(0, 3, 100).astype(float), random.integers(0, 3, (20, 100)).astype(float)
    counts, smooth = compared("y", seen, drawn), compared("y", seen + 0.1, drawn + random.normal(size=drawn.shape))
    assert f"observed mean {seen.mean():.3f}".rstrip("0") in counts.alt
    assert counts.image != smooth.image


def test_leave_one_out_says_of_guides_alone_that_their_draws_are_no_posterior(lines: Comparison) -> None:
    said = [b.html for b in loo(lines.results) if not isinstance(b, Table) and b.kind == "text"]
    assert [s.partition(":")[0] for s in said if "inference.loo(result) corrects" in s] == ["SVI"]


def test_what_masks_hide_is_not_checked_as_data() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.nan_to_num())

    x = torch.randn(200) + 20
    x[:80] = torch.nan
    result = fit((model, AutoNormal(model)), x, steps=2, draws=60, compile=False, progress=False)
    said, table = checks(result)[0], checks(result)[-1]
    assert "What masks hide is left out." in said.html
    observed = {row[1].text: row[2].value for row in table.rows}
    expected = x[80:].double()
    assert observed["mean"] == pytest.approx(float(expected.mean()))
    assert observed["smallest"] == pytest.approx(float(expected.min()))


def test_the_names_of_a_loaded_result_are_those_of_its_draws(tmp_path: Path) -> None:
    """A file has draws in the order of the alphabet, and the model another one."""

    def model() -> None:
        pyro.sample("zeta", dist.Normal(5.0, 0.1))
        pyro.sample("alpha", dist.Normal(-5.0, 0.1))

    result = sample(model, None, NUTS, draws=10, warmup=20, chains=2, progress=False)
    loaded = Result.load(result.save(tmp_path / "held"), model)
    assert list(loaded.draws) == ["zeta", "alpha"]
    shuffled = replace(loaded, draws=dict(reversed(loaded.draws.items())))
    assert [quantity_of(shuffled, n, 0) for n in ("alpha", "zeta")] == ["alpha", "zeta"]


def test_a_page_about_rows_that_are_read_says_which_ones_it_shows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source, "SAMPLE", 50)

    def model(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", size or len(y), subsample=rows):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    rows = TensorDataset(torch.randn(300))
    result = fit((model, AutoNormal(model)), rows, steps=2, batch=40, draws=30, compile=False, progress=False)
    text = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "300 (shown: 50 of 300, evenly spaced)" in text
    assert "What is shown here is of those in memory: 50 of 300" in text
    assert "in the same rows, 50 of 300" in text
    # The sum over fifty rows is no score of three hundred.
    assert "not all of them scored" in text and "Leave-one-out by Pareto" not in text


@pytest.mark.parametrize("name", ZOO)
def test_formulas_of_every_entry_are_drawn(name: str) -> None:
    kind = getattr(ZOO[name].make, "__self__", ZOO[name].make)
    for part in story.story(kind.__new__(kind)):
        assert re.findall(r"<code>[^<]*\\[^<]*</code>", part.html) == []


def test_a_formula_is_an_image_that_reads_its_source() -> None:
    drawn = story.formula_of(r"x \sim \mathrm{N}(0, I)")
    assert drawn.startswith("<svg") and r'aria-label="x \sim \mathrm{N}(0, I)"' in drawn


def test_templates_are_in_the_package() -> None:
    folder = files("inference.report") / "template"
    assert {p.name for p in folder.iterdir()} >= {"page.html", "style.css", "script.js"}


def test_a_pair_without_likelihood_or_posterior_has_a_page(tmp_path: Path) -> None:
    from inference.objectives import Adversarial

    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    result = fit(GAN(2, 2, hidden=(8,)), x, Adversarial, steps=20, batch=50, compile=False, progress=False)
    text = result.report(tmp_path / "gan.html").read_text(encoding="utf-8")
    assert "Left out" not in text
    assert "x in the plane" in text and "loss of the guide" in text


BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize("kind", ["result", "comparison"])
def test_a_browser_opens_it_from_the_disk(browser, pages: dict[str, Path], kind: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[kind].as_uri())
    assert not said
    assert not [u for u in asked if not u.startswith(("file:", "data:"))] and asked[0].startswith("file:")
    # Anchors lead to their sections.
    link = page.locator("nav a").last
    target = link.get_attribute("href")
    link.click()
    assert page.evaluate("location.hash") == target
    page.wait_for_function(f"document.querySelector('{target}').getBoundingClientRect().top < innerHeight")
    # A click on a column sorts by numbers, another one the other way round.
    table = page.locator("table:has(thead button:text-is('mean')):not(.prose)").last
    column = table.locator("thead th").all_inner_texts().index("mean")
    for direction, sign in (("ascending", 1), ("descending", -1)):
        table.locator("thead button").nth(column).click()
        cells = table.locator(f"tbody tr td:nth-child({column + 1})")
        values = [float(v) * sign for v in cells.evaluate_all("cells => cells.map(c => c.dataset.value)")]
        assert values == sorted(values)
        assert table.locator("thead th").nth(column).get_attribute("aria-sort") == direction
    # A picture is drawn, and no text runs out of its figure.
    assert page.evaluate(
        "[...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 20)"
    )
    context.close()


@pytest.mark.parametrize("kind", ["result", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_on_a_phone_in_light_and_dark(browser, pages: dict[str, Path], kind: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(pages[kind].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('figure svg, figure img')].map(s => s.getBoundingClientRect().right)"
    assert max(page.evaluate(wide)) <= 390
    colours = page.evaluate(
        """[...document.querySelectorAll('p, td, th, h2, figure svg text')].map(e => {
            const style = getComputedStyle(e); return e.tagName === 'text' ? style.fill : style.color })"""
    )
    paper = luminance(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    # 4.5 to 1, as WCAG AA asks of text.
    ratios = [sorted([luminance(c) + 0.05, paper + 0.05]) for c in set(colours)]
    assert min(high / low for low, high in ratios) >= 4.5
    context.close()


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour (WCAG 2)."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints_without_its_contents_and_within_the_page(browser, pages: dict[str, Path]) -> None:
    context = browser.new_context(viewport={"width": 690, "height": 1000}, color_scheme="dark")
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert luminance(page.evaluate("getComputedStyle(document.documentElement).backgroundColor")) > 0.99
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    context.close()


def test_leave_one_out_compares_methods_on_the_same_observations() -> None:
    """Each site has a best method, whose gap is 0; the gap of the other is the difference of their sums."""

    def model(x: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu[0], 1.0), obs=x)
            pyro.sample("y", dist.Normal(mu[1], 9.0), obs=y)

    data = {"x": torch.linspace(-1.0, 1.0, 30), "y": torch.linspace(-9.0, 9.0, 30)}
    results = {
        name: fit((model, AutoNormal(model, init_scale=scale)), data, steps=0, draws=100, progress=False)
        for name, scale in (("narrow", 0.1), ("wide", 0.4))
    }
    table = next(b for b in loo(results) if isinstance(b, Table))
    shown = {row[0].text: [float(c.text.replace("−", "-")) for c in row[1:4]] for row in table.rows}
    for site in ("x", "y"):
        (first, _, gap), (second, _, other) = (shown[f"{name}, {site}"] for name in results)
        assert max(gap, other) == 0
        assert min(gap, other) == pytest.approx(-abs(first - second), rel=0.02, abs=0.02)
