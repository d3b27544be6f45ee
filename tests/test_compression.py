"""Codes of rows: decoded they are the rows, and as long as the density of the model says."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from inference import Result, bits_back, compress, decompress, fit, log_evidence, outlier_score
from inference.compression import HEADER
from ppl_models import (
    FVSBN,
    MADE,
    NADE,
    VAE,
    BayesianNetwork,
    BernoulliMixture,
    BernoulliNaiveBayes,
    ConditionalVAE,
    GaussianMixture,
    HelmholtzMachine,
    HierarchicalVAE,
    MarkovChain,
    SemiSupervisedVAE,
    SigmoidBeliefNet,
)

pytest.importorskip("constriction", reason="constriction is not installed (the extra compression)")

COLUMNS = 12
OVERHEAD = 8 * HEADER.size + 64
"""Bits of the header and of the state of the coder."""


def rows(count: int = 120) -> Tensor:
    """Binary rows of two kinds, whose columns depend on one another."""
    random = torch.Generator().manual_seed(0)
    kind = torch.randint(2, (count, 1), generator=random)
    chance = torch.where(kind == 0, 0.15, 0.85).expand(count, COLUMNS)
    return torch.bernoulli(chance, generator=random)


X = rows()


def fitted(pair: Any, data: Any = None, steps: int = 30, **arguments: Any) -> Result:
    return fit(pair, X if data is None else data, steps=steps, draws=20, progress=False, **arguments)


def network() -> BayesianNetwork:
    return BayesianNetwork.chow_liu(X, [f"v{k}" for k in range(COLUMNS)])


IN_TURN = {
    "NADE": lambda: NADE(COLUMNS, hidden=8),
    "FVSBN": lambda: FVSBN(COLUMNS),
    "MADE": lambda: MADE(COLUMNS, hidden=(20,)),
    "BernoulliMixture": lambda: BernoulliMixture(COLUMNS, components=2),
    "BernoulliNaiveBayes": lambda: BernoulliNaiveBayes(COLUMNS, 2),
    "MarkovChain": lambda: MarkovChain(COLUMNS, "ab").estimate(X),
    "BayesianNetwork": network,
}


@pytest.mark.parametrize("name", IN_TURN)
def test_columns_in_turn_cost_what_the_density_says(name: str) -> None:
    torch.manual_seed(0)
    data = {"x": X, "y": X[:, 0]} if name == "BernoulliNaiveBayes" else X
    result = fitted(IN_TURN[name](), data)
    code = compress(result, X)
    assert torch.equal(decompress(result, bytes(code)), X)
    if name == "BayesianNetwork":
        # Its tables enter linearly: the code has their posterior means.
        tables = {n: result.draws[f"{n}_table"].mean(0) for n in result.bound.pair.names}
        exact = -result.bound.pair.with_tables(tables).log_evidence(X)
    else:
        exact = outlier_score(result, X).scores
    exact = float(exact.sum()) / math.log(2)
    assert code.ideal * X.numel() == pytest.approx(exact, rel=1e-5)
    assert exact < 8 * len(code.data) < 1.01 * exact + OVERHEAD
    assert code.method == "in turn"


def test_rows_beyond_those_that_are_coded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.compression.TOGETHER", 7)
    result = fitted(NADE(COLUMNS, hidden=8), steps=5)
    for part in (X[:1], X[:7], X[:20]):
        assert torch.equal(decompress(result, compress(result, part)), part)


BITS_BACK = {
    "VAE": lambda: VAE(COLUMNS, 2, hidden=(16,)),
    "ConditionalVAE": lambda: ConditionalVAE(COLUMNS, 2, 2, hidden=(16,)),
    "SemiSupervisedVAE": lambda: SemiSupervisedVAE(COLUMNS, 2, 2, hidden=(16,)),
    "HelmholtzMachine": lambda: HelmholtzMachine(COLUMNS, (5, 3)),
}


@pytest.mark.parametrize("name", BITS_BACK)
def test_bits_back_costs_what_the_bound_says(name: str) -> None:
    """One particle of importance sampling estimates the ELBO; its draws and those of the code are independent."""
    torch.manual_seed(0)
    others = {"y": X[:, 0].long()} if name == "ConditionalVAE" else {}
    training = {"x": X, "y": X[:, 0]} if name == "SemiSupervisedVAE" else {"x": X, **others}
    # Trained: a guide that reaches far beyond the prior pays for the width of the outermost bins.
    result = fitted(BITS_BACK[name](), training, steps=400)
    code = compress(result, {"x": X, **others})
    assert torch.equal(decompress(result, code, others or None), X)
    assert code.method == "bits back"
    bound = -log_evidence(result, {"x": X, **others}, "importance", k=1, progress=False).values / math.log(2)
    error = float(bound.std()) * math.sqrt(2 * len(X))
    ideal = code.ideal * X.numel()
    assert abs(ideal - float(bound.sum())) < 6 * error
    # The random bits at the start stay in the code: those of the latent variables of one row, and a reserve.
    first = 12 * 3 + 32 * 3 * bits_back.SPARE
    assert 0.99 * ideal < 8 * len(code.data) < 1.01 * ideal + OVERHEAD + first


def test_the_mass_of_bins_is_that_of_the_guide() -> None:
    """Bins cover the line; each has the mass of a normal between its edges, with all digits in both tails."""
    edges = torch.special.ndtri(torch.arange(bits_back.BINS + 1).double() / bits_back.BINS)[None]
    for loc, scale in ((0.3, 0.2), (-3.0, 0.01), (2.9, 0.5), (0.0, 1.0)):
        masses = [
            bits_back.mass(dist.Normal(torch.tensor([sign * loc], dtype=edges.dtype), scale), edges)[0]
            for sign in (1, -1)
        ]
        exact = np.diff(stats.norm(loc, scale).cdf(edges[0].numpy()))
        np.testing.assert_allclose(masses[0], exact, atol=1e-14)
        torch.testing.assert_close(masses[0], masses[1].flip(0), rtol=1e-6, atol=1e-300)


DECODE = """
import sys, torch
from inference import Result, decompress
from ppl_models import NADE, VAE
for name, pair in {"NADE": NADE(12, hidden=8), "VAE": VAE(12, 2, hidden=(16,))}.items():
    result = Result.load(f"{sys.argv[1]}/{name}", pair, torch.load(sys.argv[1] + "/x.pt"))
    rows = decompress(result, open(f"{sys.argv[1]}/{name}.code", "rb").read())
    torch.save(rows, f"{sys.argv[1]}/{name}.pt")
"""


def test_another_process_decodes(tmp_path: Path) -> None:
    torch.save(X, tmp_path / "x.pt")
    for name in ("NADE", "VAE"):
        result = fitted((IN_TURN | BITS_BACK)[name](), steps=30)
        result.save(tmp_path / name)
        (tmp_path / f"{name}.code").write_bytes(bytes(compress(result, X)))
    subprocess.run([sys.executable, "-c", DECODE, str(tmp_path)], check=True, timeout=300)
    for name in ("NADE", "VAE"):
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), X)


def test_a_row_that_the_model_holds_impossible_is_coded_all_the_same() -> None:
    tables = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[0.5, 0.5], [0.0, 1.0]])}
    pair = BayesianNetwork({"a": (), "b": ("a",)}, tables=tables)
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    result = fit(pair, x[:1], steps=0, progress=False)
    assert torch.equal(decompress(result, compress(result, x)), x)
    mixture = BernoulliMixture(2, components=2)
    point = {"weights": torch.tensor([[0.5, 0.5]]), "probs": torch.zeros(1, 2, 2)}
    turns = mixture.columnwise(1, latents=point)
    assert next(turns)[1].exp().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (
            lambda: GaussianMixture(COLUMNS, components=2),
            "result: expected a model of finite states, got GaussianMixture",
        ),
        (
            lambda: VAE(COLUMNS, 2, hidden=(4,), likelihood="gaussian"),
            "result: expected a model of finite states, got V",
        ),
        (
            lambda: HierarchicalVAE(COLUMNS, (3, 2), hidden=(4,), between=(4,)),
            "where the prior of z_1, which is contin",
        ),
        (
            lambda: SigmoidBeliefNet(COLUMNS, (3,)),
            "result: expected a pair that gives each column given those before it",
        ),
        (lambda: MADE(COLUMNS, hidden=(9,), orders=2), "orders: expected one order to take features in turn, got 2"),
    ],
)
def test_what_has_no_code_is_refused_in_one_line(pair: Any, says: str) -> None:
    result = fitted(pair(), steps=1)
    with pytest.raises(ValueError, match=says) as refusal:
        compress(result, X[:20])
    assert "\n" not in str(refusal.value)


def test_grey_values_are_refused() -> None:
    result = fitted(VAE(COLUMNS, 2, hidden=(4,)), steps=1)
    with pytest.raises(ValueError, match=r"^x: expected 0, 1 to code without loss, got 0.5"):
        compress(result, X * 0.5)


def test_a_code_of_another_model_is_refused() -> None:
    torch.manual_seed(0)
    result, other = (fitted(NADE(COLUMNS, hidden=8), steps=30) for _ in range(2))
    code = bytes(compress(result, X))
    with pytest.raises(ValueError, match="^code: expected one of this Result, made by the same version of torch"):
        decompress(other, code)
    with pytest.raises(ValueError, match="^code: expected what compress gave, got 7 bytes of another format"):
        decompress(result, code[:7])


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fitted(FVSBN(COLUMNS), steps=1)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"^compress: expected the package constriction, got none; install it by pip"):
        compress(result, X)
