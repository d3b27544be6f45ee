"""``examples/csv_to_report.py`` by PyMC, to compare the length and the figures: pip install pymc "arviz<1" typer."""

from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pymc as pm
import typer


def write_table(path: Path) -> None:
    random, sizes = np.random.default_rng(0), np.random.default_rng(1).geometric(0.08, 30) + 1
    county, uranium = np.repeat(np.arange(30), sizes), random.normal(0, 0.4, 30)
    floor, level = random.integers(0, 2, len(county)), 1.3 + 0.7 * uranium + random.normal(0, 0.35, 30)
    radon = level[county] - 0.7 * floor + random.normal(0, 0.7, len(county))
    names = [f"county {k:02d}" for k in county]
    table = {"county": names, "floor": floor, "uranium": uranium[county].round(2), "log_radon": radon.round(2)}
    pd.DataFrame(table).to_csv(path, index=False)


def model(houses: pd.DataFrame, hierarchical: bool) -> pm.Model:
    coords = {"county": houses.county.cat.categories, "house": houses.index}
    with pm.Model(coords=coords) as radon:
        county = pm.Data("county_index", houses.county.cat.codes.to_numpy(), dims="house")
        floor = pm.Data("floor", houses.floor.to_numpy(), dims="house")
        uranium = pm.Data("uranium", houses.uranium.to_numpy(), dims="house")
        a = pm.Normal("level", 0, 1.5)
        b = pm.Normal("floor_effect", 0, 1.5)
        c = pm.Normal("soil", 0, 1.5)
        s = pm.HalfNormal("noise", 1)
        mean = a + b * floor + c * uranium
        if hierarchical:
            spread = pm.HalfNormal("spread", 1)
            offset = pm.Normal("offset", 0, 1, dims="county")
            mean = mean + spread * offset[county]
        pm.Normal("log_radon", mean, s, observed=houses.log_radon.to_numpy(), shape=floor.shape[0])
    return radon


def main(draws: int = 1000, out: Path = Path("results/csv_to_report")) -> pd.DataFrame:
    """Check the prior, fit, check and compare both models, predict new houses, and write the report."""
    out.mkdir(parents=True, exist_ok=True)
    write_table(path := out / "radon.csv")
    houses = pd.read_csv(path, dtype={"county": "category", "floor": float})
    models = {"pooled": model(houses, False), "hierarchical": model(houses, True)}
    with models["hierarchical"]:
        prior = pm.sample_prior_predictive(200).prior_predictive["log_radon"]
    print(f"prior: 90 % of the houses between {prior.quantile(0.05):.1f} and {prior.quantile(0.95):.1f}")
    new = (by_county := houses.groupby("county", observed=True)).first().reset_index()
    new["county"] = new.county.astype(houses.county.dtype)
    figure, (check, predict) = plt.subplots(1, 2, figsize=(7.4, 3.8), layout="constrained")
    results = {}
    for k, (name, radon) in enumerate(models.items()):
        with radon:
            results[name] = pm.sample(draws, tune=draws // 2, chains=4, idata_kwargs={"log_likelihood": True})
            pm.sample_posterior_predictive(results[name], extend_inferencedata=True)
            pm.set_data(
                {"county_index": new.county.cat.codes, "floor": new.floor, "uranium": new.uranium},
                coords={"house": new.index},
            )
            ahead = pm.sample_posterior_predictive(results[name], predictions=True)
        print(f"{name}: worst R-hat {az.summary(results[name]).r_hat.max():.3f}")
        replicas = results[name].posterior_predictive["log_radon"].to_numpy().reshape(-1, len(houses))
        means = pd.DataFrame(replicas.T).groupby(houses.county, observed=True).transform("mean")
        check.hist(means.std(), 30, density=True, alpha=0.6, label=name)
        drawn = ahead.predictions["log_radon"].to_numpy().reshape(-1, len(new))
        low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], 0)
        predict.errorbar(np.arange(len(new))[k::5], middle[::5], [(middle - low)[::5], (high - middle)[::5]], fmt="o")
    check.axvline(by_county.log_radon.transform("mean").std(), color="black", label="observed")
    check.set(title="checked: sd of means by county", yticks=[], xlabel="log radon")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    predict.set(title="predicted: new houses, 90 %", ylabel="log radon", xlabel="county")
    table = az.compare(results)
    lead = f"{table.index[0]} leads by {table.elpd_diff.iloc[1]:.0f} ± {table.dse.iloc[1]:.0f} nats (LOO)"
    figure.suptitle(f"Radon in {len(new)} counties, 4 chains of {draws:,} draws:\n{lead}")
    figure.savefig(out / "csv_to_report.png", dpi=150)
    # The report: PyMC has none. A table and a picture in a page by hand.
    az.plot_trace(results["hierarchical"], var_names=["level", "floor_effect", "soil", "noise", "spread"])
    plt.savefig(out / "trace.png", dpi=100)
    summary = az.summary(results["hierarchical"]).to_html()
    page = f"<title>Radon by county</title>{table.to_html()}{summary}<img src=csv_to_report.png><img src=trace.png>"
    (out / "radon.html").write_text(page)
    return table


if __name__ == "__main__":
    typer.run(main)
