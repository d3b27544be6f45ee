"""Results of the zoo are restored from what their folders say of them."""

from pathlib import Path
from typing import Any

import pytest
from laws import same

import ppl_models
from inference import Result, isolated
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.methods import settings

QUICK = {"naive_bayes", "gaussian_mixture", "ppca", "markov_chain", "factorial_code", "vae", "vaegan", "gan"}
"""Entries whose data are small; the others are restored in the long tests."""


def about(entry: Any, method: str, seed: int) -> dict[str, Any]:
    return {"pair": entry.name, "data": entry.data, "method": method, "seed": seed}


@pytest.mark.filterwarnings("ignore:.*kept .* of .* draws", "ignore:.*left out", "ignore:.*has collapsed")
@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(n, m, marks=() if n in QUICK else pytest.mark.slow) for n, entry in ZOO.items() for m in entry.fits],
)
def test_a_fit_of_every_method_of_every_entry_is_restored(name: str, method: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    dataset, run = entry.load(), entry.methods[method]
    known = settings(run)
    few = {n: v for n, v in {"steps": 3, "draws": 5, "progress": False}.items() if n in known}
    with isolated(2):
        pair = entry.pair(dataset)
    result = run(pair, dataset.train, seed=2, **few)
    restored = ppl_models.restore(result.save(tmp_path / "run", about(entry, method, 2)))
    same(restored.params, result.params)
    same(restored.draws, result.draws)
    if result.draws:
        same(restored.draw(3, seed=4), result.draw(3, seed=4))


def test_what_no_folder_says_is_asked_for(tmp_path: Path) -> None:
    entry = ZOO["ppca"]
    dataset = entry.load()
    pair = entry.pair(dataset)
    result = entry.fit(pair, dataset.train)
    with pytest.raises(ValueError, match=r"^pair: expected the pair of .*, which does not say what it is"):
        ppl_models.restore(result.save(tmp_path / "run"))
    restored = ppl_models.restore(tmp_path / "run", result.bound.pair, dataset.train)
    assert isinstance(restored, Result)
    same(restored.params, result.params)
    result.save(tmp_path / "run", {**about(entry, "chains", 0), "method": "nothing"})
    with pytest.raises(ValueError, match=r"expected a method of ppca \(.*\), got 'nothing'"):
        ppl_models.restore(tmp_path / "run")
    # Other rows are about the same parameters.
    result.save(tmp_path / "run", about(entry, next(iter(entry.methods)), 0))
    with pytest.warns(UserWarning, match="data: x differs"):
        ppl_models.restore(tmp_path / "run", given={"x": dataset.train["x"] + 1.0})
