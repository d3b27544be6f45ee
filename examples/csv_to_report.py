"""How does a table become a report that a colleague can open? Radon in houses: two models, checked, compared and used.

A CSV file has log radon, floor and uranium of the soil of houses in 30 counties. The pooled model gives all counties
one line; in the hierarchical one each differs by as much as its houses tell. The file is made up, after Gelman and Hill
2007, chapter 12. Run: python examples/csv_to_report.py
"""

from functools import partial
from pathlib import Path

import arviz_stats as azs
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from inference import loo, posterior_predictive, prior_predictive, sample

ZERO, ONE = torch.tensor([0.0, 1.0], dtype=torch.double)


def write_table(path: Path) -> None:
    random, sizes = np.random.default_rng(0), np.random.default_rng(1).geometric(0.08, 30) + 1
    county, uranium = np.repeat(np.arange(30), sizes), random.normal(0, 0.4, 30)
    floor, level = random.integers(0, 2, len(county)), 1.3 + 0.7 * uranium + random.normal(0, 0.35, 30)
    radon = level[county] - 0.7 * floor + random.normal(0, 0.7, len(county))
    table = {"county": county, "floor": floor, "uranium": uranium[county].round(2), "log_radon": radon.round(2)}
    pd.DataFrame(table).to_csv(path, index=False)


def model(counties: int, county: Tensor, floor: Tensor, uranium: Tensor, log_radon: Tensor | None = None) -> None:
    a, b, c = (pyro.sample(name, dist.Normal(ZERO, 1.5)) for name in ("level", "floor_effect", "soil"))
    s = pyro.sample("noise", dist.HalfNormal(ONE))
    mean = a + b * floor + c * uranium
    if counties:
        spread = pyro.sample("spread", dist.HalfNormal(ONE))
        with pyro.plate("counties", counties):
            offset = pyro.sample("offset", dist.Normal(ZERO, 1.0))
        mean = mean + spread * offset[..., county.long()]
    with pyro.plate("houses", len(floor)):
        pyro.sample("log_radon", dist.Normal(mean, s), obs=log_radon)


def main(draws: int = 1000, out: Path = Path("results/csv_to_report")) -> pd.DataFrame:
    """Check the prior, fit, check and compare both models, predict new houses, and write the report."""
    out.mkdir(parents=True, exist_ok=True)
    write_table(path := out / "radon.csv")
    houses = pd.read_csv(path, dtype={"county": "category", "floor": float})
    models = {"pooled": partial(model, 0), "hierarchical": partial(model, houses.county.nunique())}
    prior = prior_predictive(models["hierarchical"], houses, draws=200)["log_radon"]
    print(f"prior: 90 % of the houses between {prior.quantile(0.05):.1f} and {prior.quantile(0.95):.1f}")
    results = {name: sample(m, houses, draws=draws, warmup=draws // 2, chains=4) for name, m in models.items()}
    new = (by_county := houses.groupby("county", observed=True)).first().reset_index().drop(columns="log_radon")
    check, predict = (figure := Figure(figsize=(7.4, 3.8), layout="constrained")).subplots(1, 2)
    for k, (name, result) in enumerate(results.items()):
        print(f"{name}: {result.diagnosis}")
        replicas = posterior_predictive(result)["log_radon"].numpy()
        means = pd.DataFrame(replicas.T).groupby(houses.county, observed=True).transform("mean")
        check.hist(means.std(), 30, density=True, alpha=0.6, label=name)
        low, middle, high = np.quantile(posterior_predictive(result, new)["log_radon"].numpy(), [0.05, 0.5, 0.95], 0)
        predict.errorbar(np.arange(len(new))[k::5], middle[::5], [(middle - low)[::5], (high - middle)[::5]], fmt="o")
    check.axvline(by_county.log_radon.transform("mean").std(), color="black", label="observed")
    check.set(title="checked: sd of means by county", yticks=[], xlabel="log radon")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    predict.set(title="predicted: new houses, 90 %", ylabel="log radon", xlabel="county")
    table = azs.compare({name: loo(result) for name, result in results.items()})
    lead = f"{table.index[0]} leads by {abs(table.elpd_diff.iloc[1]):.0f} ± {table.dse.iloc[1]:.0f} nats (LOO)"
    figure.suptitle(f"Radon in {len(new)} counties, 4 chains of {draws:,} draws:\n{lead}")
    figure.savefig(out / "csv_to_report.png", dpi=150)
    results["hierarchical"].report(out / "radon.html", about={"title": "Radon by county", "data": path.name})
    print(table.to_string(float_format="{:.1f}".format))
    return table


if __name__ == "__main__":
    typer.run(main)
