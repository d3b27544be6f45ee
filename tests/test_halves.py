"""The halves of a pair as modules, trained by torch's own means."""

import pyro
import pytest
import torch
from distributed_work import work
from laws import Case
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import distributed, multiprocessing

from inference import fit, isolated
from ppl_models import GaussianNaiveBayes, Pair
from ppl_models.zoo.entries import ZOO

RATE, STEPS, BATCH = 0.01, 12, 10


def vae() -> tuple[Pair, torch.Tensor]:
    case = Case(ZOO["vae"])
    return case.pair(), case.data["x"]


def minibatches(count: int, batch: int):
    """Rows as ``fit`` draws them."""
    random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    while True:
        yield from torch.randperm(count, generator=random).split(batch)


def loop(pair: Pair, x: torch.Tensor, seed: int, module=lambda loss: loss) -> list[float]:
    """A plain loop of torch."""
    with isolated(seed):
        loss = module(Trace_ELBO()(*pair.halves()))
        optimizer = torch.optim.Adam(loss.parameters(), lr=RATE)
        rows, losses = minibatches(len(x), BATCH), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            now = next(rows)
            value = loss(x[now], size=len(x), rows=now)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def test_a_loop_of_torch_takes_the_steps_of_fit_and_of_svi() -> None:
    pair, x = vae()
    losses = loop(pair, x, seed=3)
    other = vae()[0]
    adam = pyro.optim.Adam({"lr": RATE})
    result = fit(other, x, steps=STEPS, batch=BATCH, optimizer=adam, seed=3, draws=4, compile=False, progress=False)
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-5)
    for one, two in zip(pair.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    third = vae()[0]
    with isolated(3):
        svi, rows = (
            SVI(third.model, third.guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO()),
            minibatches(len(x), BATCH),
        )
        steps = [svi.step(x[now], size=len(x), rows=now) for now, _ in zip(rows, range(STEPS), strict=False)]
    assert steps == pytest.approx(losses, rel=1e-5)


def test_two_pairs_of_a_class_do_not_share_parameters_and_the_store_stays_empty() -> None:
    pyro.clear_param_store()
    (first, x), (second, _) = vae(), vae()
    loop(first, x, seed=0)
    before = [p.clone() for p in first.parameters()]
    losses = loop(second, x, seed=0)
    assert len(pyro.get_param_store()) == 0
    assert all(map(torch.equal, first.parameters(), before))
    assert losses == loop(vae()[0], x, seed=0)
    # The pair is as it was for all other uses: its parameters keep their names.
    result = fit(second, x, steps=1, draws=4, progress=False)
    assert set(result.params) == {n for n, _ in second.named_parameters()}


def test_a_frozen_parameter_stays_where_it_is() -> None:
    pair, x = vae()
    frozen = next(pair.parameters()).requires_grad_(False)
    before = frozen.clone()
    loop(pair, x, seed=0)
    assert torch.equal(frozen, before) and not frozen.requires_grad and frozen.grad is None


@pytest.mark.parametrize("name", ZOO)
def test_the_objective_as_a_module_has_all_parameters(name: str) -> None:
    case = Case(ZOO[name])
    pair = case.pair()
    model, guide = pair.halves()
    with isolated(0):
        # A model without a plate warns where it observes outside of all handlers.
        poutine.trace(model)(**case.data)
        if name != "markov_chain":
            guide(**case.data)
        loss = Trace_ELBO()(model, guide)
        assert set(loss.parameters()) == set(pair.parameters())
        if case.likelihood and not case.bound.summed:
            loss(**case.data).backward()
            assert any(p.grad is not None for p in loss.parameters())


def test_an_autoguide_is_trained_after_its_first_call() -> None:
    case = Case(ZOO["naive_bayes"])
    pair = case.pair()
    assert isinstance(pair, GaussianNaiveBayes)
    model, guide = pair.halves()
    with isolated(0):
        guide(**case.data)
        loss = Trace_ELBO()(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            value = loss(**case.data)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch was built without gloo"
)
def test_two_processes_train_a_pair_together(tmp_path) -> None:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(work, (str(tmp_path / "store"), results), nprocs=2)
        (losses, one), (others, two) = (results[rank] for rank in (0, 1))
    assert one == two, "the processes took different steps"
    assert losses != others, "the processes had the same rows, or the same noise"
    assert sum(losses[-10:]) < sum(losses[:10]) and sum(others[-10:]) < sum(others[:10])
