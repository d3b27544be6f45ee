"""Bayesian networks: brute force, published answers, d-separation, counts, learning, missing states, files."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from sklearn.metrics import mutual_info_score
from torch import Tensor

from inference import fit, log_evidence, pointwise_log_likelihood, posterior_predictive, prior_predictive
from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.draws.scoring import log_joint
from ppl_models import data
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.parts.bif import read_bif

ASIA = """
// Lauritzen and Spiegelhalter 1988.
network asia { }
variable asia { type discrete [ 2 ] { yes, no }; }
variable tub { type discrete [ 2 ] { yes, no }; }
variable smoke { type discrete [ 2 ] { yes, no }; }
variable lung { type discrete [ 2 ] { yes, no }; }
variable bronc { type discrete [ 2 ] { yes, no }; }
variable either { type discrete [ 2 ] { yes, no }; }
variable xray { type discrete [ 2 ] { yes, no }; }
variable dysp { type discrete [ 2 ] { yes, no }; }
probability ( asia ) { table 0.01, 0.99; }
probability ( tub | asia ) { (yes) 0.05, 0.95; (no) 0.01, 0.99; }
probability ( smoke ) { table 0.5, 0.5; }
probability ( lung | smoke ) { (yes) 0.1, 0.9; (no) 0.01, 0.99; }
probability ( bronc | smoke ) { (yes) 0.6, 0.4; (no) 0.3, 0.7; }
probability ( either | lung, tub ) {
  (yes, yes) 1.0, 0.0; (no, yes) 1.0, 0.0; (yes, no) 1.0, 0.0; (no, no) 0.0, 1.0;
}
probability ( xray | either ) { (yes) 0.98, 0.02; (no) 0.05, 0.95; }
probability ( dysp | bronc, either ) {
  (yes, yes) 0.9, 0.1; (no, yes) 0.7, 0.3; (yes, no) 0.8, 0.2; (no, no) 0.1, 0.9;
}
"""


def asia() -> BayesianNetwork:
    return BayesianNetwork.from_bif(ASIA)


def sprinkler() -> BayesianNetwork:
    tables = {
        "cloudy": torch.tensor([0.5, 0.5]),
        "sprinkler": torch.tensor([[0.5, 0.5], [0.9, 0.1]]),
        "rain": torch.tensor([[0.8, 0.2], [0.2, 0.8]]),
        "wet": torch.tensor([[[1.0, 0.0], [0.1, 0.9]], [[0.1, 0.9], [0.01, 0.99]]]),
    }
    parents = {"cloudy": (), "sprinkler": ("cloudy",), "rain": ("cloudy",), "wet": ("sprinkler", "rain")}
    return BayesianNetwork(parents, tables={n: t.double() for n, t in tables.items()})


def drawn(seed: int, count: int = 6) -> BayesianNetwork:
    """A random net: up to three parents, two or three states, columns in another order than the graph's."""
    dice, torch_dice = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [f"v{k}" for k in range(count)]
    parents = {n: tuple(dice.sample(names[:k], dice.randint(0, min(k, 3)))) for k, n in enumerate(names)}
    states = {n: dice.choice([2, 3]) for n in names}
    tables = {}
    for name in names:
        shape = [states[n] for n in (*parents[name], name)]
        tables[name] = torch.rand(shape, generator=torch_dice, dtype=torch.float64) + 0.05
        tables[name] /= tables[name].sum(-1, keepdim=True)
    dice.shuffle(names)
    return BayesianNetwork({n: parents[n] for n in names}, states={n: states[n] for n in names}, tables=tables)


def brute(net: BayesianNetwork) -> Tensor:
    """The whole joint table, cell by cell, from the net's own words: dimensions in the order of its columns."""
    sizes = [len(net.states[n]) for n in net.names]
    whole = torch.zeros(sizes, dtype=torch.float64)
    tables = {n: net._table(n).reshape(net._shape(n)) for n in net.names}
    for cell in itertools.product(*map(range, sizes)):
        at = dict(zip(net.names, cell, strict=True))
        whole[cell] = math.prod(float(tables[n][tuple(at[m] for m in (*net.parents[n], n))]) for n in net.names)
    return whole


def sliced(net: BayesianNetwork, whole: Tensor, target: list[str], known: dict[str, int]) -> Tensor:
    part = whole[tuple(known.get(n, slice(None)) for n in net.names)]
    left = [n for n in net.names if n not in known]
    summed = [k for k, n in enumerate(left) if n not in target]
    found = part.sum(summed) if summed else part
    kept = [n for n in left if n in target]
    return (found / found.sum()).permute([kept.index(n) for n in target])


def test_the_published_answers_of_the_sprinkler() -> None:
    net = sprinkler()
    assert float(net.query("wet")[1]) == pytest.approx(0.6471)
    assert float(net.query("sprinkler", {"wet": 1})[1]) == pytest.approx(0.4298, abs=5e-5)
    assert float(net.query("rain", {"wet": 1})[1]) == pytest.approx(0.7079, abs=5e-5)
    # Rain explains the wet grass away.
    assert float(net.query("sprinkler", {"wet": 1, "rain": 1})[1]) == pytest.approx(0.1945, abs=5e-5)


def test_the_published_answers_of_the_chest_clinic() -> None:
    net = asia()
    alone = {"tub": 0.0104, "lung": 0.055, "either": 0.064828, "bronc": 0.45, "xray": 0.11029, "dysp": 0.435971}
    for name, expected in alone.items():
        assert float(net.query(name)[0]) == pytest.approx(expected, abs=1e-6)
    seen = {"asia": "yes", "dysp": "yes"}
    for name, expected in {"tub": 0.0877, "lung": 0.0995, "bronc": 0.8114, "smoke": 0.6261}.items():
        assert float(net.query(name, seen)[0]) == pytest.approx(expected, abs=2e-4)
    assert net.parameter_count == 18


@pytest.mark.parametrize("seed", range(20))
def test_queries_of_random_nets_are_those_of_brute_force(seed: int) -> None:
    net, dice = drawn(seed), random.Random(seed + 100)
    whole = brute(net)
    assert float(whole.sum()) == pytest.approx(1.0)
    for _ in range(6):
        names = dice.sample(net.names, len(net.names))
        split = dice.randint(1, 3)
        target, known = (
            names[:split],
            {n: dice.randrange(len(net.states[n])) for n in names[split : dice.randint(split, 6)]},
        )
        torch.testing.assert_close(net.query(target, known), sliced(net, whole, target, known))


@pytest.mark.parametrize("seed", range(12))
def test_d_separation_is_independence_in_a_net_of_random_tables(seed: int) -> None:
    net = drawn(seed)
    whole = brute(net)
    for one, other in itertools.combinations(net.names, 2):
        rest = [n for n in net.names if n not in (one, other)]
        for given in itertools.chain(*(itertools.combinations(rest, k) for k in range(len(rest) + 1))):
            worst = 0.0
            for cell in itertools.product(*(range(len(net.states[n])) for n in given)):
                joint = sliced(net, whole, [one, other], dict(zip(given, cell, strict=True)))
                worst = max(worst, float((joint - joint.sum(1, keepdim=True) * joint.sum(0)).abs().max()))
            # Random tables have no independence but the graph's; a weak path leaves some 1e-5.
            assert net.separated(one, other, given) == (worst < 1e-10), (one, other, given, worst)
            assert net.separated(other, one, given) == net.separated(one, other, given)


def test_special_nets_have_the_parameters_of_theory() -> None:
    names = list("abcdef")
    assert BayesianNetwork.independent(names).parameter_count == 6
    assert BayesianNetwork.markov_chain(names).parameter_count == 11
    assert BayesianNetwork.full(names).parameter_count == 63
    assert BayesianNetwork.markov_chain(names, states=3).parameter_count == 2 + 5 * 6


def test_draws_follow_the_joint_distribution() -> None:
    net = drawn(3)
    whole = brute(net)
    values = prior_predictive(net, size=40_000, draws=1)
    x = torch.stack([values[n][0] for n in net.names], -1)
    net.check(x)
    for name in net.names:
        share = torch.bincount(values[name][0], minlength=len(net.states[name])) / 40_000
        torch.testing.assert_close(share.double(), sliced(net, whole, [name], {}), atol=0.012, rtol=0)
    one, other = net.names[:2]
    cells = torch.zeros(len(net.states[one]), len(net.states[other])).double()
    cells.index_put_((values[one][0], values[other][0]), torch.ones(40_000).double(), accumulate=True)
    torch.testing.assert_close(cells / 40_000, sliced(net, whole, [one, other], {}), atol=0.012, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_missing_states_are_summed_out(seed: int) -> None:
    net = drawn(seed)
    full = prior_predictive(net, size=30, draws=1, seed=seed)
    x = torch.stack([full[n][0] for n in net.names], -1).double()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.4] = torch.nan
    x[0] = torch.nan
    whole, expected = brute(net), []
    for row in x.tolist():
        known = tuple(slice(None) if math.isnan(v) else int(v) for v in row)
        expected.append(float(whole[known].sum().log()))
    assert net.log_evidence(x).tolist() == pytest.approx(expected, abs=1e-10)
    gaps = BayesianNetwork(
        net.parents,
        states=net.states,
        missing=True,
        tables={n: net._table(n).reshape(net._shape(n)) for n in net.names},
    )
    with isolated(), torch.no_grad():
        assert float(log_joint(bind(gaps, x), {})) == pytest.approx(sum(expected), abs=1e-8)
    found = log_evidence(gaps, x, "exact", progress=False)
    assert found.kind == "exact" and found.values.tolist() == pytest.approx(expected, abs=1e-10)


def learnt(**arguments) -> tuple[BayesianNetwork, Tensor]:
    source = sprinkler()
    full = prior_predictive(source, size=400, draws=1)
    x = torch.stack([full[n][0] for n in source.names], -1).double()
    return BayesianNetwork(source.parents, **arguments).double(), x


def test_the_posterior_is_that_of_counting() -> None:
    net, x = learnt(concentration=0.5)
    mean, sd = net.moments(x)["wet_table"]
    for sprinkled, rained in itertools.product((0, 1), (0, 1)):
        rows = x[(x[:, 1] == sprinkled) & (x[:, 2] == rained)]
        wet, count = float(rows[:, 3].sum()) + 0.5, len(rows) + 1.0
        assert float(mean[2 * sprinkled + rained, 1]) == pytest.approx(wet / count)
        assert float(sd[2 * sprinkled + rained, 1]) == pytest.approx(
            (wet * (count - wet) / count**2 / (count + 1)) ** 0.5
        )
    result = fit((net.model, net.exact), {"x": x}, steps=0, draws=3000, progress=False)
    assert result.diagnosis.pareto_k == -math.inf
    torch.testing.assert_close(result.draws["wet_table"].mean(0), mean, atol=0.02, rtol=0)
    drawn_again = posterior_predictive(result, {}, size=50)
    assert set(drawn_again) == set(net.names)
    assert float(drawn_again["wet"].double().mean()) == pytest.approx(float(x[:, 3].mean()), abs=0.05)


def test_without_a_prior_it_counts() -> None:
    net, x = learnt(prior=False, guide=AutoDelta)
    fit(net, {"x": x}, steps=600, learning_rate=0.1, draws=1, progress=False)
    result = fit(net, {"x": x}, steps=300, learning_rate=0.01, draws=1, progress=False)
    for name in net.names:
        counts = net.count(x, name)
        torch.testing.assert_close(
            result.draws[f"{name}_table"][0], counts / counts.sum(-1, keepdim=True), atol=2e-3, rtol=0
        )


def test_missing_at_random_states_do_not_bias_what_is_learnt() -> None:
    net, x = learnt(missing=True, guide=AutoDelta)
    gaps = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.15, torch.nan, x)
    result = fit(net, {"x": gaps}, steps=800, learning_rate=0.05, draws=1, progress=False)
    assert result.method == "SVI (TraceEnum_ELBO)"
    mean, sd = BayesianNetwork(net.parents).double().moments(x)["rain_table"]
    assert bool(((result.draws["rain_table"][0] - mean).abs() < 4 * sd).all())
    # At a maximum with flat priors: no other table nearby explains the rows better.
    tables = {n: result.draws[f"{n}_table"][0] for n in net.names}
    best = float(net.with_tables(tables).log_evidence(gaps).sum())
    for seed in range(5):
        noise = torch.Generator().manual_seed(seed)
        other = {n: t * torch.empty_like(t).uniform_(0.9, 1.1, generator=noise) for n, t in tables.items()}
        other = {n: t / t.sum(-1, keepdim=True) for n, t in other.items()}
        assert float(net.with_tables(other).log_evidence(gaps).sum()) < best


def test_names_reach_arviz() -> None:
    net, x = learnt()
    posterior = fit(net, {"x": x}, steps=5, draws=10, progress=False).idata.posterior
    assert posterior["wet_table"].dims == ("chain", "draw", "wet_parents", "wet_states")
    assert list(posterior.coords["wet_parents"].values)[1] == "sprinkler=0, rain=1"


def test_the_tree_of_chow_and_liu() -> None:
    wine = data.load("wine", binarise=True, dtype=torch.float64)
    x = wine.train["x"]
    net = BayesianNetwork.chow_liu(x, wine.features)
    assert [len(p) for p in net.parents.values()] == [0, *[1] * 12]
    assert tuple(net.parents) == wine.features
    column = {n: x[:, k].numpy() for k, n in enumerate(wine.features)}

    def worth(parents) -> float:
        return sum(mutual_info_score(column[n], column[p[0]]) for n, p in parents.items() if p)

    best, dice = worth(net.parents), np.random.default_rng(0)
    for _ in range(300):
        order = list(dice.permutation(wine.features))
        other = {n: (order[dice.integers(k)],) if k else () for k, n in enumerate(order)}
        assert worth(other) <= best + 1e-12
    # By Prim's algorithm, from scratch.
    inside, total = {wine.features[0]}, 0.0
    while len(inside) < 13:
        gain, name = max((mutual_info_score(column[a], column[b]), b) for a in inside for b in set(column) - inside)
        inside.add(name)
        total += gain
    assert best == pytest.approx(total)


def test_pointwise_scores_are_those_of_the_tables() -> None:
    net, x = learnt()
    result = fit((net.model, net.exact), {"x": x}, steps=0, draws=5, progress=False)
    score = pointwise_log_likelihood(result)
    one = net.with_tables({n: result.draws[f"{n}_table"][2] for n in net.names})
    torch.testing.assert_close(score[2], one.log_evidence(x))


A = {"a": (), "b": ("a",)}
REFUSED = [
    (
        lambda: BayesianNetwork({"a": ("c",), "b": ("a",), "c": ("b",)}),
        "parents: .* without cycles, got a -> b -> c -> a",
    ),
    (lambda: BayesianNetwork({"a": ("a",)}), "parents: expected a graph without cycles, got a -> a"),
    (lambda: BayesianNetwork({"a": ("d",)}), "parents: expected variables as parents of a, got 'd'"),
    (lambda: BayesianNetwork(A, states={"a": 2, "b": 1}), "states: expected at least two different ones of b, got 0"),
    (lambda: BayesianNetwork(A, states=("x", "x")), "states: expected at least two different ones of a, got x, x"),
    (lambda: BayesianNetwork(A, concentration=0.0), "concentration: expected a positive number, got 0.0"),
    (
        lambda: BayesianNetwork(A, tables={"a": torch.ones(2) / 2}),
        "tables: expected one for every variable, got none for b",
    ),
    (
        lambda: BayesianNetwork(A, tables={"a": torch.ones(2) / 2, "b": torch.ones(2) / 2}),
        r"tables: expected \(2, 2\) for b, got \(2,\)",
    ),
    (
        lambda: BayesianNetwork(A, tables={"a": torch.ones(2) / 2, "b": torch.tensor([[0.5, 0.5], [0.7, 0.4]])}),
        r"tables: expected rows of probabilities that sum to 1, got 0.7, 0.4 at b \| a=1",
    ),
    (lambda: asia().query("cough"), "target: expected one of asia, tub, .*, got 'cough'"),
    (lambda: asia().query("lung", {"xray": "maybe"}), r"given: expected a state of xray \(yes, no\), got 'maybe'"),
    (lambda: asia().query("lung", {"lung": "yes"}), "target: expected variables that are not given, got lung"),
    (
        lambda: asia().query("xray", {"lung": "yes", "either": "no"}),
        "given: expected evidence of positive probability, got lung = yes, either = no of probability 0",
    ),
    (lambda: BayesianNetwork(A).query("a"), "tables: expected given ones, got those that are to be learnt"),
    (lambda: fit(BayesianNetwork(A), torch.zeros(3, 3)), r"x: expected \(rows, 2\), got \(3, 3\)"),
    (lambda: fit(BayesianNetwork(A), torch.full((3, 2), 2.0)), "x: expected states 0 to 1 of a, got 2"),
    (lambda: fit(BayesianNetwork(A), torch.full((3, 2), 0.5)), "x: expected states 0 to 1 of a, got 0.5"),
    (lambda: fit(BayesianNetwork(A), torch.full((3, 2), torch.nan)), "x: expected finite numbers, got nan"),
    (
        lambda: BayesianNetwork(A, missing=True).moments(torch.full((3, 2), torch.nan)),
        "x: expected every state .*, got missing ones",
    ),
    (lambda: BayesianNetwork.from_bif("network {}"), "source: expected a network .*, got no variable"),
    (
        lambda: BayesianNetwork.from_bif(ASIA.replace("(no) 0.05, 0.95;", "")),
        "source: expected one line per state of the parents of xray .*, got too few",
    ),
    (
        lambda: BayesianNetwork.from_bif(ASIA.replace("( tub | asia )", "( tub | asai )")),
        r"source: expected known variables in probability \(tub \| asai\), got asai",
    ),
    (lambda: BayesianNetwork(A, states="abc"), "states: expected a number or a sequence of names for a, got 'abc'"),
    (lambda: BayesianNetwork(A, states={"a": 2}), "states: expected those of every variable, got none of b"),
    (lambda: BayesianNetwork({"a": (), "b": ("a", "a")}), "parents: expected different ones of b, got a, a"),
    (lambda: BayesianNetwork.independent(["a", "b", "a"]), "names: expected different names, got 'a' twice"),
    (
        lambda: BayesianNetwork({"a": ()}, tables={"a": torch.tensor([torch.nan, 0.5])}),
        "tables: expected rows of probabilities that sum to 1, got nan, 0.5 at a",
    ),
    (
        lambda: BayesianNetwork({"a": ()}, tables={"a": torch.ones(2) / 2, "c": torch.ones(2) / 2}),
        "tables: expected those of a, got 'c'",
    ),
    (lambda: BayesianNetwork(A).moments(torch.full((3, 2), 2.0)), "x: expected states 0 to 1 of a, got 2"),
    (lambda: BayesianNetwork(A).count(torch.zeros(3, 2), "c"), "name: expected one of a, b, got 'c'"),
    (lambda: BayesianNetwork.chow_liu(torch.full((3, 2), 5.0), ("a", "b")), "x: expected states 0 to 1, got 5"),
    (lambda: BayesianNetwork.chow_liu(torch.zeros(3, 2), ("a", "b", "c")), r"x: expected \(rows, 3\), got \(3, 2\)"),
]


@pytest.mark.parametrize(("call", "line"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_bad_input_gets_one_line(call, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_net_that_is_too_large_says_its_size() -> None:
    side = 30
    parents = {f"a{k}": () for k in range(side)} | {f"b{k}": ("a0",) for k in range(2)}
    parents["sink"] = tuple(f"a{k}" for k in range(12))
    # A square grid whose elimination holds a line of 30 variables at once.
    grid = {
        f"{i},{j}": tuple(f"{a},{b}" for a, b in ((i - 1, j), (i, j - 1)) if a >= 0 and b >= 0)
        for i in range(side)
        for j in range(side)
    }
    tables = {n: torch.full([2] * (len(p) + 1), 0.5) for n, p in grid.items()}
    net = BayesianNetwork(grid, tables=tables)
    with pytest.raises(
        ValueError, match=r"target: exact inference needs a table of \S+e\+\d+ numbers, expected at most"
    ):
        net.query("29,29")


def test_a_file_is_read(tmp_path) -> None:
    path = tmp_path / "asia.bif"
    path.write_text(ASIA)
    net = BayesianNetwork.from_bif(path)
    assert net.parents["dysp"] == ("bronc", "either")
    assert net.states["xray"] == ("yes", "no")


Truth = dict[str, tuple[tuple[str, ...], np.ndarray]]
"""Parents of each variable, and its probabilities (*states of the parents, states)."""


def truth_of(seed: int, count: int) -> Truth:
    """A random net of two or three states: its numbers, which know nothing of the code."""
    dice, rng = random.Random(seed), np.random.default_rng(seed)
    names = [f"v{k}" for k in range(count)]
    sizes = {n: dice.choice([2, 2, 3]) for n in names}
    truth: Truth = {}
    for k, name in enumerate(names):
        above = tuple(dice.sample(names[:k], dice.randint(0, min(k, 3))))
        truth[name] = above, rng.dirichlet(np.ones(sizes[name]), [sizes[n] for n in above])
    return truth


def joint_of(truth: Truth) -> np.ndarray:
    """The joint probabilities, a dimension per variable, as a product of tables."""
    names, whole = list(truth), np.ones(())
    for name, (above, table) in truth.items():
        scope = [*above, name]
        order = sorted(range(len(scope)), key=lambda k: names.index(scope[k]))
        shape = [table.shape[scope.index(n)] if n in scope else 1 for n in names]
        whole = whole * table.transpose(order).reshape(shape)
    return whole


def numbers(values: np.ndarray, between: str = ", ") -> str:
    return between.join(f"{v:.17g}" for v in values.ravel())


def bnlearn(name: str, above: tuple[str, ...], table: np.ndarray) -> str:
    """As the bnlearn repository writes it."""
    if not above:
        return f"probability ( {name} ) {{\n  table {numbers(table)};\n}}"
    rows = [f"  ({', '.join(f's{k}' for k in at)}) {numbers(table[at])};" for at in np.ndindex(table.shape[:-1])]
    return "\n".join([f"probability ( {name} | {', '.join(above)} ) {{", *rows, "}"])


def javabayes(name: str, above: tuple[str, ...], table: np.ndarray) -> str:
    """As JavaBayes writes it: quotation marks, no bar, and a table whose first dimension is the variable's own."""
    listed = "  ".join(f'"{n}"' for n in (name, *above))
    whole = numbers(np.moveaxis(table, -1, 0), " ")
    return f'probability (  {listed} ) {{ //{1 + len(above)} variable(s)\n\ttable {whole} ;\n\tproperty "a; {{b" ;\n}}'


def agrum(name: str, above: tuple[str, ...], table: np.ndarray) -> str:
    """As aGrUM writes it: ``default`` for a root, and here for the rows that equal the last one."""
    if not above:
        return f"probability ({name}) {{\n   default {numbers(table, ' ')};\n}}"
    last = table[tuple(np.array(table.shape[:-1]) - 1)]
    kept = [at for at in np.ndindex(table.shape[:-1]) if not np.array_equal(table[at], last)]
    rows = [f"   ({', '.join(f's{k}' for k in at)}) {numbers(table[at], ' ')};" for at in kept]
    return "\n".join([f"probability ({name} | {', '.join(above)}) {{", f"   default {numbers(last, ' ')};", *rows, "}"])


DIALECTS = {"bnlearn": bnlearn, "javabayes": javabayes, "agrum": agrum}


def written(truth: Truth, dialect: str) -> str:
    """A net in a dialect of the format."""
    quote = '"' if dialect == "javabayes" else ""
    lines = [f"network {quote}a net{quote} {{ property by us ; }}" if quote else "network unknown {\n}"]
    for name, (_, table) in truth.items():
        states = ("  " if quote else ", ").join(f"{quote}s{k}{quote}" for k in range(table.shape[-1]))
        extra = 'property "position = (73, 165)" ; /* { */' if quote else ""
        kind = f"type discrete[{table.shape[-1]}] {{ {states} }};"
        lines.append(f"variable {quote}{name}{quote} {{ // of {table.shape[-1]}\n  {kind} {extra}\n}}")
    lines += [DIALECTS[dialect](name, above, table) for name, (above, table) in truth.items()]
    return "\n".join(lines)


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_a_file_of_each_dialect_has_the_probabilities_of_an_enumeration(dialect: str) -> None:
    truth = truth_of(3, 14)
    truth["v13"][1][..., :] = truth["v13"][1].reshape(-1, truth["v13"][1].shape[-1])[-1]  # rows for a default
    whole, names = joint_of(truth), list(truth)
    net = BayesianNetwork.from_bif(written(truth, dialect))
    assert list(net.names) == names and net.states["v0"][:2] == ("s0", "s1")
    for k, name in enumerate(names):
        rest = tuple(j for j in range(len(names)) if j != k)
        np.testing.assert_allclose(net.query(name).numpy(), whole.sum(rest), atol=1e-9)
    dice = random.Random(1)
    for _ in range(10):
        target, *known = dice.sample(range(len(names)), 4)
        states = {j: dice.randrange(whole.shape[j]) for j in known}
        part = whole[tuple(states.get(j, slice(None)) for j in range(len(names)))]
        left = [j for j in range(len(names)) if j not in states]
        found = part.sum(tuple(k for k, j in enumerate(left) if j != target))
        answer = net.query(names[target], {names[j]: f"s{s}" for j, s in states.items()})
        np.testing.assert_allclose(answer.numpy(), found / found.sum(), atol=1e-9)


def test_the_dog_problem_of_the_format_itself() -> None:
    # Charniak 1991, as JavaBayes writes it; the probabilities are those of his figure 2.
    net = BayesianNetwork.from_bif("""
        network "Dog-Problem" { }
        variable "light-on" { type discrete[2] { "true" "false" }; }
        variable "dog-out" { type discrete[2] { "true" "false" }; }
        variable "bowel-problem" { type discrete[2] { "true" "false" }; }
        variable "family-out" { type discrete[2] { "true" "false" }; }
        probability ( "light-on" "family-out" ) { table 0.6 0.05 0.4 0.95 ; }
        probability ( "bowel-problem" ) { table 0.01 0.99 ; }
        probability ( "dog-out" "bowel-problem" "family-out" ) { table 0.99 0.97 0.9 0.3 0.01 0.03 0.1 0.7 ; }
        probability ( "family-out" ) { table 0.15 0.85 ; }
    """)
    cells = {("true", "true"): 0.99, ("true", "false"): 0.97, ("false", "true"): 0.9, ("false", "false"): 0.3}
    for (bowel, family), expected in cells.items():
        got = net.query("dog-out", {"bowel-problem": bowel, "family-out": family})
        assert float(got[0]) == pytest.approx(expected)
    assert float(net.query("light-on")[0]) == pytest.approx(0.15 * 0.6 + 0.85 * 0.05)


NUMBERS = ("0.25", ".25", "25e-2", "2.5E-1", "+0.25", "0.250000000000000000000001")


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_read_in_every_form(number: str) -> None:
    text = f"variable a {{ type discrete [ 2 ] {{ x, y }}; }} probability ( a ) {{ table {number}, 75e-2; }}"
    assert BayesianNetwork.from_bif(text).query("a").tolist() == pytest.approx([0.25, 0.75])


TWO = """
variable a { type discrete [ 2 ] { x, y }; }
variable b { type discrete [ 2 ] { x, y }; }
probability ( a ) { table 0.5, 0.5; }
"""
BAD_FILES = [
    ("probability ( b | a ) { (x) 0.1, 0.9; (y) 0.2, 0.8; (x) 0.3, 0.7; }", r"one line per .* of b, got \(x\) twice"),
    ("probability ( b | a ) { default 0.1, 0.9; default 0.2, 0.8; }", "one line per .* of b, got default twice"),
    ("probability ( b ) { table 0.5, 0.5; } probability ( b ) { table 0.1, 0.9; }", "one block .* of b, got two"),
    ("probability ( b | a ) { table 0.1 0.2 0.9 0.8; (x) 0.1, 0.9; }", "one table of b or rows, got a table and 1"),
    ("probability ( b | a ) { (x) 0.1, 0.9; }", "one line per .* of b .2., or default, got too few .1."),
    ("probability ( b | a ) { (x) 1.0; (y) 0.2, 0.8; }", "2 probabilities in each line of b, got 1"),
    ("probability ( b | a ) { table 0.5, 0.5; }", "4 probabilities in each line of b, got 2"),
    ("probability ( b | a ) { (z) 0.1, 0.9; (y) 0.2, 0.8; }", "a state of a in a row of b, got z"),
    ("probability ( b | a ) { (x, y) 0.1, 0.9; }", r"a state of each parent of b \(1\), got \(x, y\)"),
    ("probability ( b | a ) { (x) 0.1, much; }", "probabilities of b, got 'much'"),
    ("", "probabilities of every variable, got none of b"),
    ("variable a { type discrete [ 2 ] { x, y }; }", "different variables, got a twice"),
    ("variable c { type discrete [ 3 ] { x, y }; }", "3 different states of c, got x, y"),
    ("variable c { type continuous; }", "type discrete of c in line 5, got 'continuous'"),
    ('variable "c { }', "a closing quotation mark or end of a comment in line 5"),
    ("probability ( b | a ) { (x) 0.1, 0.9", "a word or ';' in line 5, got 'the end'"),
    ("nodes", "network, variable or probability in line 5, got 'nodes'"),
]


@pytest.mark.parametrize(("more", "line"), BAD_FILES, ids=[str(k) for k in range(len(BAD_FILES))])
def test_a_file_that_is_not_legal_is_refused_in_one_line(more: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"^source: expected {line}") as error:
        BayesianNetwork.from_bif(TWO + more)
    assert "\n" not in str(error.value)


def test_the_table_of_a_file_that_is_too_large_is_refused_before_it_is_made() -> None:
    names = [f"v{k}" for k in range(31)]
    lines = [f"variable {n} {{ type discrete [ 2 ] {{ x, y }}; }}" for n in names]
    lines += [f"probability ( {n} ) {{ default 0.5 0.5; }}" for n in names[:-1]]
    lines += [f"probability ( v30 | {', '.join(names[:-1])} ) {{ default 0.5 0.5; }}"]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"^source: expected tables of at most 6.7e\+07 .*, got 2.1e\+09 .* v30$"):
        BayesianNetwork.from_bif("\n".join(lines))
    parents = {n: () for n in names[:-1]} | {"v30": tuple(names[:-1])}
    with pytest.raises(
        ValueError, match=r"^parents: expected tables of at most 6.7e\+07 .*, got 2.1e\+09 of v30, which"
    ):
        BayesianNetwork(parents)
    with pytest.raises(ValueError, match="^states: expected at most 65536 of v0, got 1000000000$"):
        BayesianNetwork(parents, states=10**9)
    assert time.monotonic() - begin < 20


def test_reading_takes_time_in_proportion_to_the_size_of_a_file() -> None:
    def seconds(count: int) -> float:
        truth = {f"v{k}": ((f"v{k - 1}",) if k else (), np.full([2] * (1 + (k > 0)), 0.5)) for k in range(count)}
        # A comment without an end and a long property cost nothing either.
        text = written(truth, "bnlearn") + "\n" + "/* * */ " * count
        best = math.inf
        for _ in range(5):
            begin = time.process_time()
            read_bif(text)
            best = min(best, time.process_time() - begin)
        return best

    # Eight times the size: eight times the time, or 64 times if it were quadratic.
    assert seconds(1600) < 23 * seconds(200)


def test_log_evidence_of_a_state_that_does_not_exist_is_refused_by_name() -> None:
    net = asia()
    rows = torch.zeros(3, 8)
    for value, got in ((2.0, "2"), (-1.0, "-1"), (0.5, "0.5")):
        rows[1, 6] = value
        with pytest.raises(ValueError, match=f"^x: expected states 0 to 1 of xray, or nan .*, got {got}$"):
            net.log_evidence(rows)
    rows[1, 6] = torch.nan
    assert float(net.log_evidence(rows)[1]) == pytest.approx(
        float(net.log_evidence(torch.tensor([[0.0] * 8, [0.0] * 6 + [1.0, 0.0]])).logsumexp(0))
    )
